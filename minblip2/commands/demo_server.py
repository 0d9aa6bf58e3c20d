"""The live page with Python behind it: a photograph is uploaded from a browser on this machine, and looked at.

Whatever arrives is judged before it is read, then decoded as all pictures are (`data.pictures`). It is kept in memory
while it is answered, and nowhere else.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.nn.functional as F
from einops import reduce
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import UserError
from ..attention import attention_weights, capture_attention
from ..course.lesson import ROOT
from ..data.pictures import load_image
from ..device import autocast
from ..lm.protocol import DecoderOnly
from ..vit import to_grid
from ..weights.blip2 import ANSWER, CAPTION, Blip2
from ..weights.retriever import Retriever

PAGE = ROOT / "docs" / "site" / "live"
FILES = {"/": ("index.html", "text/html"), "/index.html": ("index.html", "text/html"),
         "/live.css": ("live.css", "text/css"), "/live.js": ("live.js", "text/javascript")}
WAYS = {"greedy": dict(beams=1), "nucleus 0.9": dict(beams=1, top_p=0.9), "beams 5": dict(beams=5)}
MOST_BYTES = 20 * 2**20  # of a photograph
MOST_LETTERS = 300  # of a question or a sentence
PATIENCE, LONGEST = 10, 60  # seconds: without a byte, and for all of them
LINGER = 2  # seconds in which what is refused may still arrive
AT_ONCE = 4  # uploads; what is more is asked to wait
KIND = "application/octet-stream"  # a page elsewhere may not send this without being asked first, and never is


class Upload(io.BytesIO):
    """A photograph in memory."""

    def __str__(self) -> str:
        return "that you chose"


class Refused(Exception):
    """A request that is not answered: a status, and one sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


# --- what the model says ----------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """While open, keeps the weights (b h s k) of all attention that is computed, whoever computes it."""

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for each of its functions."""
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.weights.append(attention_weights(*args[:2], kwargs["attn_mask"], scale=kwargs["scale"]))
        return function(*args, **kwargs)


def with_queries(blip2: Blip2, shown: Sequence[int]) -> Blip2:
    """The same model whose language model is given these queries only."""
    stage2, soft_prompt = copy.copy(blip2.stage2), blip2.stage2.soft_prompt
    stage2.soft_prompt = lambda image_features: soft_prompt(image_features)[:, list(shown)]
    return replace(blip2, stage2=stage2)


@torch.no_grad()
def word_by_word(blip2: Blip2, features: Tensor, prompt: str, queries: int, **decoding) -> dict[str, Any]:
    """A text after an image's features (1 v e) and a prompt, and of each token its probability, the five likeliest in
    its place, and its attention to the queries (their number), mean over heads and layers."""
    tokenizer, stage2 = blip2.tokenizer, blip2.stage2.eval()
    blip2.require_positions([prompt], decoding["max_length"])
    ids, mask = blip2.prompt_ids([prompt])
    written = blip2.write(features, ids, mask, **decoding)
    length = min([*(written[0] == tokenizer.eos_id).nonzero()[:, 0].tolist(), written.shape[1] - 1]) + 1
    target, everything = written[:, :length], torch.ones(1, length, dtype=torch.bool, device=features.device)
    with autocast(blip2.device, blip2.precision):
        given, given_mask = stage2.given(features, ids, mask)
        with Watch() as watch:
            hidden = stage2.lm.teacher_forcing(given, given_mask, stage2.lm.embed(target), everything)
        chances = stage2.lm.lm_logits(hidden[0]).float().softmax(dim=-1)
    looked = [[]] * length
    if isinstance(stage2.lm, DecoderOnly):  # the row before each token, the columns of the queries
        rows = torch.stack([layer[0, :, given.shape[1] - 1:-1, :queries] for layer in watch.weights])
        looked = reduce(rows.float(), "n h t q -> t q", "mean").tolist()

    def word(number: int) -> str:
        text = tokenizer.backend.decode([number], skip_special_tokens=False)
        return "(end)" if number == tokenizer.eos_id else text.strip() or ("⏎" if "\n" in text else "␣")
    best = chances.topk(5)
    steps = [dict(text=word(number), p=chances[row, number].item(), looked=looked[row], best=[
        (word(other), p, other == number) for p, other in zip(best.values[row].tolist(), best.indices[row].tolist(),
                                                              strict=True)])
        for row, number in enumerate(target[0].tolist())]
    return dict(text=tokenizer.decode(written[0]), steps=steps)


@dataclass
class Model:
    """What stands behind the page: a model that writes, and where there is one, one that compares."""

    name: str
    blip2: Blip2
    retriever: Retriever | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)

    def data(self) -> dict[str, Any]:
        """What the page asks for first."""
        qformer = self.blip2.stage2.qformer
        blocks = [i + 1 for i, block in enumerate(qformer.blocks) if block.cross_attention is not None]
        return dict(photographs=True, name=self.name, queries=qformer.config.num_queries, blocks=blocks,
                    compares=self.retriever is not None, ways=list(WAYS), kind=KIND, most_bytes=MOST_BYTES)

    def caption(self, photograph: Image.Image, way: str = "greedy", hidden: str = "") -> dict[str, Any]:
        """A caption, word by word; each query's cross-attention, block by block; and what the encoder sees."""
        if way not in WAYS:
            raise UserError(f"there is no way {way!r} to choose words: take one of {', '.join(WAYS)}")
        features, shown = self.blip2.encode_images(photograph), self._shown(hidden)
        stage2 = self.blip2.stage2.eval()
        with torch.no_grad(), capture_attention(*stage2.qformer.cross_attentions) as weights:
            stage2.soft_prompt(features)
        maps = to_grid(torch.cat([reduce(layer.float(), "1 h q v -> 1 q v", "mean") for layer in weights]),
                       self.blip2.vit.config.class_token)
        said = word_by_word(with_queries(self.blip2, shown), features, self.blip2.prompt, len(shown),
                            **CAPTION | WAYS[way])
        for step in said["steps"]:  # hidden ones were given no attention
            step["looked"] = [dict(zip(shown, step["looked"], strict=False)).get(q, 0.0) for q in range(maps.shape[1])]
        return said | dict(maps=dict(dims=[*maps.shape[:2], maps[0, 0].numel()], data=maps.flatten().tolist()),
                           seen=self._seen(photograph))

    def ask(self, photograph: Image.Image, question: str = "") -> dict[str, Any]:
        """An answer, word by word."""
        features, queries = self.blip2.encode_images(photograph), self.blip2.stage2.qformer.config.num_queries
        return word_by_word(self.blip2, features, self.blip2.put(question), queries,
                            beams=self.blip2.beams, **ANSWER)

    def match(self, photograph: Image.Image, sentence: str = "") -> dict[str, Any]:
        """Whether a sentence fits: ITM's probability, each query's cosine, and what made it fit."""
        if self.retriever is None:
            raise UserError("this model does not compare pictures with sentences: show a run, with --run")
        features, texts = self.retriever.encode_images(photograph), [sentence]
        cosines = self.retriever.embed_images(features)[0] @ self.retriever.embed_texts(texts)[0]
        ids, word = self.retriever.text_ids(texts)[0][0].tolist(), self.retriever.tokenizer.backend.id_to_token
        heat = self.retriever.attention_maps(features, texts)[0]
        return dict(cosines=cosines.tolist(), match=self.retriever.match(features, texts).item(),
                    tokens=[word(number) for number in ids[1:-1]],
                    map=dict(side=heat.shape[0], data=heat.flatten().tolist()))

    def _shown(self, hidden: str) -> list[int]:
        queries = range(self.blip2.stage2.qformer.config.num_queries)
        numbers = hidden.split(",") if hidden else []
        if not all(number.isdecimal() and int(number) in queries for number in numbers):
            raise UserError(f"queries are numbered from 0 to {len(queries) - 1}, not {hidden[:40]!r}")
        return [q for q in queries if str(q) not in numbers]

    def _seen(self, photograph: Image.Image) -> str:
        file = io.BytesIO()
        self.blip2.transform.crop_and_resize(photograph).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# --- the server -------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers the page, and refuses everything else with one sentence."""

    server: Server
    timeout = PATIENCE
    server_version, sys_version = "minblip2", ""

    def do_GET(self) -> None:
        """The page's files, by name, and what it asks of the model first."""
        def answer() -> tuple[str, bytes]:
            path = urlsplit(self.path).path
            if path == "/data.json":
                return "application/json", json.dumps(self.server.model.data()).encode()
            if path not in FILES:
                raise Refused(404, "there is no such page here: open the address that the terminal shows")
            name, kind = FILES[path]
            return f"{kind}; charset=utf-8", (PAGE / name).read_bytes()
        self.give(answer)

    def do_POST(self) -> None:
        """A photograph, and what is wanted of it."""
        def answer() -> tuple[str, bytes]:
            path, given = self.wanted()
            photograph = Upload(self.body())
            with self.server.model.busy:
                said = getattr(self.server.model, path)(load_image(photograph), **given)
            return "application/json", json.dumps(said).encode()
        self.give(answer)

    def wanted(self) -> tuple[str, dict[str, str]]:
        """Which answer, with which texts. Raises Refused."""
        parts = urlsplit(self.path)
        allowed = {"/caption": {"way", "hidden"}, "/ask": {"question"}, "/match": {"sentence"}}
        if parts.path not in allowed:
            raise Refused(404, f"there is no {parts.path[:40]!r} here: send a photograph to {', '.join(allowed)}")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        if site != "same-origin" or origin not in (None, f"http://{self.headers['Host']}"):
            raise Refused(403, "another site's page may not ask here: open the address that the terminal shows")
        if self.headers.get("Content-Type") != KIND:
            raise Refused(415, f"send the photograph's bytes as they are, with Content-Type: {KIND}")
        try:
            given = parse_qs(parts.query, strict_parsing=bool(parts.query), max_num_fields=4, errors="strict")
        except ValueError:
            raise Refused(400, "what stands behind the question mark cannot be read: give name=text") from None
        if not given.keys() <= allowed[parts.path] or any(len(texts) > 1 for texts in given.values()):
            raise Refused(400, f"{parts.path} takes {' and '.join(sorted(allowed[parts.path]))}, once each")
        if any(len(text) > MOST_LETTERS for texts in given.values() for text in texts):
            raise Refused(413, f"a text is longer than {MOST_LETTERS} letters: shorten it")
        return parts.path[1:], {name: texts[0] for name, texts in given.items()}

    def body(self) -> bytes:
        """As many bytes as were announced. Raises Refused."""
        if self.headers.get("Transfer-Encoding") is not None or self.headers.get("Content-Encoding") is not None:
            raise Refused(411, "send the photograph in one piece as it is, with its Content-Length")
        announced = self.headers.get_all("Content-Length", [])
        if len(announced) != 1 or not (announced[0].isascii() and announced[0].isdigit()):
            raise Refused(411, "say once in Content-Length how many bytes the photograph has")
        if len(announced[0]) > 12 or int(announced[0]) > MOST_BYTES:
            raise Refused(413, f"the photograph is larger than {MOST_BYTES >> 20} MB: save it smaller")
        left, chunks, until = int(announced[0]), [], time.monotonic() + LONGEST
        if not left:
            raise Refused(400, "the photograph is empty: choose another file")
        while left:
            try:
                chunk = self.rfile.read1(min(left, 2**16))
            except TimeoutError:
                chunk = b""
            if not chunk or time.monotonic() > until:
                raise Refused(408, "the photograph ended before the bytes that were announced: send it again")
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)

    def give(self, answer: Callable[[], tuple[str, bytes]]) -> None:
        """Send an answer, or why there is none."""
        try:
            if self.headers.get_all("Host") not in ([name] for name in self.server.names):
                raise Refused(403, "this server answers to its own address only: open the one that the terminal shows")
            if not self.server.places.acquire(blocking=False):
                raise Refused(503, "others are being answered: try again in a moment")
            try:
                status, (kind, content) = 200, answer()
            finally:
                self.server.places.release()
        except Refused as error:
            return self.send_error(error.status, str(error))
        except UserError as error:
            return self.send_error(422, str(error))
        except Exception:
            traceback.print_exc()
            return self.send_error(500, "the model failed: the terminal says how")
        self.send(status, kind, content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One sentence instead of a page; also what the standard library says of a request that is none."""
        self.close_connection = True
        self.send(code, "text/plain; charset=utf-8", f"{message or 'this is not understood'}\n".encode())
        self.read_on()

    def read_on(self) -> None:
        """Throw away what still comes, for a moment: closed on unread bytes, a connection loses the answer, too."""
        until = time.monotonic() + LINGER
        with suppress(OSError):  # whoever asked has gone, or says nothing more
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER)
            while self.connection.recv(2**16) and time.monotonic() < until:
                pass

    def send(self, status: int, kind: str, content: bytes) -> None:
        """An answer that a browser takes for nothing else than what it is."""
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(content))),
                            ("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"),
                            ("Cross-Origin-Resource-Policy", "same-origin"), ("Referrer-Policy", "no-referrer"),
                            ("Content-Security-Policy", "default-src 'self'; img-src 'self' data:; frame-ancestors "
                                                        "'none'")):
            self.send_header(name, value)
        with suppress(ConnectionError):  # whoever asked has gone
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *message: object) -> None:
        """Nothing: what is asked is nobody's business."""


class Server(ThreadingHTTPServer):
    """The page and a model behind it, for browsers of this machine. Raises UserError when the page is not there."""

    daemon_threads = True

    def __init__(self, model: Model, port: int):
        if not (PAGE / "index.html").exists():
            raise UserError(f"{PAGE} is not there: the page is part of the repository, so run this in a clone of it")
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.places = model, threading.BoundedSemaphore(AT_ONCE)
        self.names = [f"{host}:{self.server_port}" for host in ("127.0.0.1", "localhost")]


def open_model(run: Path | None, model: Path | None, parts: Path | None) -> Model:
    """The model of a run, or of a BLIP-2 folder as on the hub."""
    from ..training.bridge import load_bridge

    if model:
        return Model(str(model), Blip2.from_folder(model))
    bridge = load_bridge(run, parts)
    return Model(str(run), bridge.blip2, bridge.retriever)
