"""COCO's site in small on loopback: the official paths, and misbehaviour on demand."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import zipfile
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ARCHIVE = "/annotations/annotations_trainval2017.zip"
KARPATHY = "/karpathy/caption_datasets.zip"


def packed(members: dict[str, bytes]) -> bytes:
    """A zip archive of these members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content,
                             zipfile.ZIP_DEFLATED if len(content) < 10**7 else zipfile.ZIP_STORED)
    return stream.getvalue()


def coco_files(folder: Path) -> dict[str, bytes]:
    """What COCO's site serves, by path, made of an excerpt in the official layout."""
    notes = {f"annotations/{path.name}": path.read_bytes() for path in sorted((folder / "annotations").glob("*.json"))}
    files = {ARCHIVE: packed(notes), KARPATHY: packed({"dataset_coco.json": karpathy(folder)})}
    for path in folder.glob("*2017/*.jpg"):
        files[f"/{path.parent.name}/{path.name}"] = path.read_bytes()
    return files


def karpathy(folder: Path) -> bytes:
    """A split in the form of Karpathy's: every tenth image is val, every other tenth test, two tenths restval."""
    names = ["val", "test", "restval", "restval", *["train"] * 6]
    ids = [image["id"] for split in ("train2017", "val2017")
           for image in json.loads((folder / "annotations" / f"captions_{split}.json").read_text(encoding="utf-8")
                                   )["images"]]
    images = [{"filepath": "val2014", "cocoid": number, "split": names[i % 10]} for i, number in enumerate(ids)]
    return json.dumps({"images": images, "dataset": "coco"}).encode()


class CocoServer(ThreadingHTTPServer):
    """Serves `files` and counts what it did in `.asked` (requests) and `.served` (whole bodies), both by path.

    `tricks[path]` is a list of misbehaviours, one for each request, or one string for all of them. `latency` is in
    seconds for each request, `on_request(path)` is called before each answer.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, files: dict[str, bytes], port: int = 0, latency: float = 0.0):
        super().__init__(("127.0.0.1", port), Handler)
        self.files, self.latency = files, latency
        self.headers: dict[str, dict[str, str]] = {}
        self.tricks: dict[str, list[str] | str] = {}
        self.asked: dict[str, int] = defaultdict(int)
        self.served: dict[str, int] = defaultdict(int)
        self.ranges: list[tuple[str, int]] = []
        self.on_request = lambda path: None
        self.amazon = False
        self._hashed: dict[str, tuple[bytes, str]] = {}
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.connections = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def md5(self, path: str) -> str:
        """What Amazon's S3 would give as ETag."""
        if self.files[path] is not self._hashed.get(path, (None,))[0]:
            self._hashed[path] = self.files[path], hashlib.md5(self.files[path]).hexdigest()
        return self._hashed[path][1]

    def handle_error(self, *_):
        """Clients may go away."""


class Handler(BaseHTTPRequestHandler):
    """One connection of CocoServer."""

    protocol_version = "HTTP/1.1"
    wbufsize = 2**16
    disable_nagle_algorithm = True

    def setup(self):
        """Count the connection."""
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def log_message(self, *_):
        """Keep quiet."""

    def answer(self, status, body=b"", length=None, **headers):
        """Send a whole answer; a `length` that is not the body's ends in a cut connection."""
        self.send_response(status)
        headers |= self.server.headers.get(self.path, {})
        if self.server.amazon and status in (200, 206):
            self.send_header("ETag", f'"{self.server.md5(self.path)}"')
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", len(body) if length is None else length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None and length != len(body):
            self.close_connection = True

    def do_HEAD(self):
        """What GET would say, without the body."""
        if self.path in self.server.files:
            return self.answer(200, self.server.files[self.path])
        return self.answer(404)

    def version_string(self):
        """What stands in the header Server."""
        return "AmazonS3" if self.server.amazon else "loopback"

    def do_GET(self):
        """Serve a file, whole or from a byte on, or misbehave."""
        server, path = self.server, self.path.partition("?")[0]
        server.on_request(path)
        with server.lock:
            server.asked[path] += 1
            tricks = server.tricks.get(path, [])
            trick = tricks if isinstance(tricks, str) else tricks.pop(0) if tricks else ""
        if server.latency:
            time.sleep(server.latency)
        if path not in server.files:
            return self.answer(404)
        body, first = server.files[path], 0
        asked = self.headers.get("Range", "")
        if asked and trick != "no ranges":
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            with server.lock:
                server.ranges.append((path, first))
            if first >= len(body):
                return self.answer(416, Content_Range=f"bytes */{len(body)}")
        extra = {"Content_Type": "image/jpeg"}
        if first:
            extra["Content_Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        status, rest = (206 if first else 200), body[first:]
        match trick.partition(" ")[0]:
            case "cut" | "truncated":  # a part of the body, then the connection ends
                return self.answer(status, rest[:int(len(rest) * float(trick.split()[1]))], len(rest), **extra)
            case "busy":
                return self.answer(503, b"later", Retry_After=trick.split()[1])
            case "status":
                return self.answer(int(trick.split()[1]), b"no")
            case "garbage":
                return self.answer(status, b"\x5a" * len(rest), **extra)
            case "flipped":  # in the middle of the picture's data, where decoders do not notice
                return self.answer(status, rest[:-500] + bytes([rest[-500] ^ 1]) + rest[-499:], **extra)
            case "html":
                return self.answer(200, b"<html>Please log in</html>", Content_Type="text/html")
            case "loop":
                return self.answer(302, Location=path)
            case "moved":
                return self.answer(302, Location=trick.split()[1])
            case "stall":
                self.send_response(200)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[:len(rest) // 2])
                self.wfile.flush()
                time.sleep(float(trick.split()[1]))
                self.close_connection = True
                return None
            case "endless":
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                while True:
                    self.wfile.write(b"\0" * 2**20)
        self.answer(status, rest, **extra)
        with server.lock:
            server.served[path] += 1
        return None
