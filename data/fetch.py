"""Files over HTTP that arrive whole or not at all, whatever the network and the server do.

urllib3 keeps connections alive, follows redirects, speaks TLS and counts bytes against Content-Length. Its own retries
are off: they start a body from its first byte again, and they do not know whether a body is what it should be.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, LocationValueError, MaxRetryError, ResponseError

from minblip2 import UserError

CHUNK = 2**18  # bytes: most pictures come in one
LONGEST_WAIT = 120  # seconds that a server may ask for with Retry-After
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Item:
    """A file to fetch: from where, to where, at most how many bytes.

    check(path, proven) raises UserError if it is wrong; `proven` means that the server published this very content's
    MD5, so that only what was published need be judged, not the way here.
    """

    url: str
    path: Path
    limit: int
    check: Callable[[Path, bool], object]


class Failed(UserError):
    """One file could not be fetched; the others may go on."""


class _Trouble(Exception):
    """What may pass: worth another try, after `wait` seconds at the earliest."""

    def __init__(self, reason: object, wait: float = 0.0, spoiled: bool = False):
        super().__init__(reason)
        self.wait, self.spoiled = wait, spoiled


class Fetcher:
    """Fetches items over at most `workers` connections, which are kept alive.

    A file grows as NAME.part, is checked, and only then renamed; a .part that is found is gone on with. A file is tried
    `attempts` times in a row without a new byte, with pauses that double from `pause` seconds, or as long as the server
    asks; a body that fails its check is fetched once more from its start. `timeout` in seconds is how long a connection
    may say nothing.
    """

    def __init__(self, workers: int = 16, timeout: float = 30.0, attempts: int = 6, pause: float = 0.5):
        if workers < 1:
            raise UserError(f"--workers is {workers}: ask for at least 1 connection")
        if not 0 < timeout < float("inf"):
            raise UserError(f"--timeout is {timeout:g}: give a number of seconds above 0")
        self.workers, self.attempts, self.pause = workers, attempts, pause
        self.received, self._stopped, self._lock = 0, threading.Event(), threading.Lock()
        self._settings = dict(
            maxsize=workers, timeout=timeout, headers={"User-Agent": "minblip2", "Accept-Encoding": "identity"},
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5))
        self._pools: dict[tuple[str, str], urllib3.PoolManager] = {}

    def all(self, items: Iterable[Item]) -> Iterator[Item]:
        """Fetch every item, those first that come first; yields each when it is there.

        Raises Failed for what could not be fetched after all others are there, or when one connection after the other
        failed; UserError at once when the disk is full.
        """
        failed: list[str] = []
        in_a_row = 0
        pool = ThreadPoolExecutor(self.workers)
        try:
            futures = {pool.submit(self.get, item): item for item in items}
            for future in as_completed(futures):
                try:
                    future.result()
                except Failed as error:
                    failed.append(str(error))
                    in_a_row += 1
                    if in_a_row > self.workers:
                        raise Failed(f"{error}; {in_a_row} files in a row failed, so the rest was not tried: check the "
                                     "network and run the same command again") from None
                else:
                    in_a_row = 0
                    yield futures.pop(future)
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()
        if failed:
            raise Failed(f"{failed[0]}" + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else "")
                         + "; all other files are there: run the same command again to try only what is missing")

    def get(self, item: Item, progress: Callable[[int, int | None], object] = lambda done, total: None) -> None:
        """Fetch one item; `progress(bytes so far, bytes in all or None)` is told of every chunk.

        Raises Failed naming the item and the reason, UserError when the disk is full.
        """
        part = item.path.with_name(item.path.name + ".part")
        failures = spoiled = 0
        while True:
            before = _size(part)
            try:
                kind, md5 = self._receive(item, part, progress)
                self._judge(item, part, kind, md5)
                os.replace(part, item.path)
                return
            except _Trouble as trouble:
                spoiled += trouble.spoiled
                failures = 1 if _size(part) > before + CHUNK else failures + 1
                if failures >= self.attempts or spoiled > 1:
                    raise Failed(f"{item.url} cannot be fetched into {item.path.name}: {trouble}") from None
                pause = min(30.0, self.pause * 2 ** (failures - 1)) * random.uniform(0.75, 1.0)
                if self._stopped.wait(max(trouble.wait, 0.0 if trouble.spoiled else pause)):
                    raise Failed(f"{item.url} was not fetched: the download stopped") from None
            except OSError as error:  # the network's errors are urllib3's: this one is the disk's
                why = "the disk is full" if error.errno in DISK_FULL else error.strerror
                raise UserError(f"{item.path} cannot be written ({why}): make room or choose another --out, then run "
                                "the same command again: it goes on where it stopped") from error

    def _receive(self, item: Item, part: Path, progress: Callable[[int, int | None], object]) -> tuple[str, str | None]:
        """Bring `part` to its full length. Returns what the server calls the content, and its MD5 where it tells."""
        have = _size(part)
        try:
            response = self._pool(item.url).request("GET", item.url, preload_content=False,
                                                    headers={"Range": f"bytes={have}-"} if have else {})
        except HTTPError as error:
            raise self._told(item, error) from None
        try:
            headers = response.headers
            if response.status == 416:  # nothing beyond what is there: whole, or of another file
                if headers.get("Content-Range", "").rpartition("/")[2] != str(have):
                    raise _restart(part, f"the server has fewer bytes than the {have} that are here")
                return "", None
            if response.status not in (200, 206):
                self._refuse(item, response)
            if response.status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise _restart(part, f"the server sent {headers.get('Content-Range')} instead of bytes from {have} on")
            if response.status == 200:
                have = 0
            length = headers.get("Content-Length", "")
            total = have + int(length) if length.isdecimal() else None
            if (total or 0) > item.limit:
                raise Failed(f"{item.url} would be {total} bytes, more than the {item.limit} that make sense")
            if total is not None and total - have > (free := shutil.disk_usage(part.parent).free):
                raise UserError(f"{item.path} needs {total - have} bytes but {free} are free: make room or choose "
                                "another --out, then run the same command again")
            with open(part, "ab" if have else "wb") as file:
                for chunk in self._chunks(item, response):
                    file.write(chunk)
                    have += len(chunk)
                    progress(have, total)
                    if have > item.limit:
                        part.unlink()
                        raise Failed(f"{item.url} sends more than the {item.limit} bytes that make sense")
            etag = headers.get("ETag", "")
            # Amazon's S3, where COCO lies, gives the MD5 of what was uploaded in one piece.
            of_s3 = headers.get("Server") == "AmazonS3" and re.fullmatch('"[0-9a-f]{32}"', etag)
            return headers.get("Content-Type", ""), etag.strip('"') if of_s3 else None
        except BaseException:
            response.close()  # the rest of its body must not be taken for the answer to the next request
            raise
        finally:
            response.release_conn()

    def _chunks(self, item: Item, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            while chunk := response.read1(CHUNK):  # what has come; stream() would lose the last part of a cut body
                with self._lock:
                    self.received += len(chunk)
                yield chunk
                if self._stopped.is_set():
                    raise Failed(f"{item.url} was not fetched: the download stopped")
        except HTTPError as error:
            raise self._told(item, error) from None

    def _judge(self, item: Item, part: Path, kind: str, md5: str | None) -> None:
        """Raise _Trouble and throw `part` away if it is not what it should be."""
        try:
            if md5 is not None and hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != md5:
                raise UserError(f"its MD5 is not the {md5} that the server tells")
            item.check(part, md5 is not None)
        except UserError as error:
            part.unlink()
            raise _Trouble(f"{error} (the server called it {kind or 'nothing'})", spoiled=True) from None

    def _refuse(self, item: Item, response: urllib3.BaseHTTPResponse) -> None:
        """Raise _Trouble for a status that may pass, Failed for one that stays."""
        said = f"the server says {response.status} {response.reason or ''}".strip()
        response.drain_conn()
        if response.status not in (408, 425, 429) and response.status < 500:
            raise Failed(f"{item.url} cannot be fetched into {item.path.name}: {said}")
        try:
            wait = urllib3.Retry().get_retry_after(response) or 0.0
        except InvalidHeader:
            wait = 0.0
        if wait > LONGEST_WAIT:
            raise Failed(f"{item.url} cannot be fetched into {item.path.name}: {said} and asks to wait {wait:.0f} s: "
                         "run the same command again then")
        raise _Trouble(said, wait)

    def _told(self, item: Item, error: HTTPError) -> Exception:
        """A network error as _Trouble, or as Failed if no other try can help."""
        reason = error.reason if isinstance(error, MaxRetryError) else error
        if isinstance(reason, ResponseError | LocationValueError):  # redirects without end, or no URL at all
            return Failed(f"{item.url} cannot be fetched into {item.path.name}: {reason}")
        return _Trouble(re.sub(r"^<?[\w.]*HTTPS?Connection(Pool)?\([^)]*\)[^:]*: ", "", str(reason)))

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Connections by way of the proxy that the environment names for the URL, if any."""
        scheme, _, rest = url.partition("://")
        site = scheme, rest.partition("/")[0]
        with self._lock:
            if site not in self._pools:
                proxy = None if urllib.request.proxy_bypass(site[1]) else urllib.request.getproxies().get(scheme)
                self._pools[site] = (urllib3.ProxyManager(proxy, **self._settings) if proxy
                                     else urllib3.PoolManager(**self._settings))
            return self._pools[site]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _restart(part: Path, reason: str) -> _Trouble:
    part.unlink(missing_ok=True)
    return _Trouble(reason, spoiled=True)
