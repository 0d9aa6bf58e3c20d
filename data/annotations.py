"""COCO's annotation files: out of their archive and entry by entry, with nothing in them trusted."""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fetch import sha256_of
from minblip2 import UserError
from minblip2.data.files import field, whole
from minblip2.data.pictures import MAX_PIXELS

CHUNK, LARGEST_ENTRY, LARGEST_MEMBER = 2**20, 2**22, 2**30  # bytes; COCO's largest member has 4.5e8
BOMB = 100  # times: JSON packs to a tenth or so
SAFE_NAME = re.compile(r"\w[\w-]*\.(jpg|jpeg|png)", re.ASCII)


def check_archive(path: Path, members: list[str], sha256: str | None = None) -> None:
    """Read all of `members` of a zip, which compares their CRC. Raises UserError for what is broken or hostile."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name, size = info.filename, info.file_size
                if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
                    raise UserError(f"{path} holds {name!r}, which would climb out of its folder: do not use it")
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(f"{path} holds {name!r}, a symbolic link: do not use it")
                if size > LARGEST_MEMBER or size > BOMB * info.compress_size + CHUNK:
                    raise UserError(f"{path} holds {name!r}, {info.compress_size} bytes that unpack to {size}, which "
                                    "no annotations do: do not use it")
            for member in members:
                with archive.open(member) as file:
                    while file.read(CHUNK):
                        pass
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} is not the archive of COCO's annotations: {error.args[0]}") from None
    except Exception as error:  # a damaged archive makes the decompressors raise almost anything
        raise UserError(f"{path} is not a whole zip archive ({error}): fetch it again") from error
    if sha256 is not None:
        found = sha256_of(path)
        if found != sha256:
            raise UserError(f"{path} has the sha256 {found} instead of {sha256}: fetch it again")


class Entries:
    """The entries of a JSON object's lists, one at a time: COCO's boxes would fill 4 GB of memory at once."""

    def __init__(self, file: IO[bytes], name: str):
        self.name, self._file, self._text, self._at = name, io.TextIOWrapper(file, "utf-8"), "", 0
        self._decoder = json.JSONDecoder(parse_constant=self._constant)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """(key, entry) for every entry of every list at the top. Raises UserError for what is not such an object."""
        try:
            self._take("{")
            while True:
                key = self._value()
                if not isinstance(key, str):
                    raise ValueError(f"it has the key {str(key)[:80]}")
                self._take(":")
                if self._peek() != "[":
                    self._value()
                else:
                    self._take("[")
                    ended = self._peek() == "]" and self._take("]")
                    while not ended:
                        yield key, self._value()
                        ended = self._take(",]") == "]"
                if self._take(",}") == "}":
                    return
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.name} is not what COCO's annotations are ({error}): fetch it again") from error

    def _constant(self, text: str) -> None:
        raise UserError(f"{self.name} holds {text}, which is no number: do not use it")

    def _more(self) -> bool:
        chunk = self._file.read(CHUNK)
        self._text, self._at = self._text[self._at:] + chunk, 0
        return bool(chunk)

    def _peek(self) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at:self._at + 1]

    def _take(self, expected: str) -> str:
        found = self._peek()
        if not found or found not in expected:
            raise ValueError(f"{found or 'its end'!r} stands where one of {expected!r} should")
        self._at += 1
        return found

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > LARGEST_ENTRY:
                    raise ValueError(f"the entry {self._text[self._at:self._at + 60]!r}... has more than "
                                     f"{LARGEST_ENTRY} characters") from None
                if not self._more():
                    raise ValueError(f"{error.msg} in its last {len(self._text) - self._at} characters") from None
                continue
            if end == len(self._text) and self._more():  # a number may go on in what was read now
                continue
            if end - self._at > LARGEST_ENTRY:
                raise ValueError(f"the entry {self._text[self._at:self._at + 60]!r}... has {end - self._at} characters")
            self._at = end
            return value


def entries(archive: Path, member: str, *keys: str) -> Iterator[tuple[str, dict]]:
    """(key, entry) of the lists `keys` in a member of an archive."""
    try:
        with zipfile.ZipFile(archive) as zipped, zipped.open(member) as file:
            for key, entry in Entries(file, f"{archive.name}, {member}"):
                if key in keys:
                    if not isinstance(entry, dict):
                        raise UserError(f"{archive.name}, {member} has {str(entry)[:80]!r} among its {key}")
                    yield key, entry
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is damaged ({error}): remove it and run the same command again") from error


def read_images(archive: Path, member: str) -> tuple[dict[int, dict], list[dict]]:
    """The images of a captions file by id, and its licences. Raises UserError naming any entry that cannot be true."""
    where, found, names, licences = f"{archive.name}, {member}", {}, set(), []
    for key, entry in entries(archive, member, "images", "licenses"):
        number, name = field(entry, "id", int, where), field(entry, "file_name" if key == "images" else "name", str,
                                                            where)
        whole(entry, "id", where)  # of 64 bits, too
        if key == "licenses":
            licences.append(entry)
            continue
        if not SAFE_NAME.fullmatch(name):
            raise UserError(f"{where} calls the picture {number} {name[:80]!r}, which is no plain file name of a "
                            "picture: do not use it")
        if number in found or name in names:
            raise UserError(f"{where} lists the picture {number}, {name}, twice: do not use it")
        width, height = field(entry, "width", int, where), field(entry, "height", int, where)
        if not 0 < width * height <= MAX_PIXELS or width < 0:
            raise UserError(f"{where} says that {name} is {width}x{height} pixels, which cannot be: do not use it")
        names.add(name)
        found[number] = entry
    return found, licences


def short_name(licence: dict) -> str:
    """A licence's name for the command line: by, by-nc-sa, ... for Creative Commons, else the words of its name."""
    found = re.search(r"creativecommons\.org/licenses/([a-z-]+)", str(licence.get("url", "")))
    return found[1] if found else re.sub(r"\W+", "-", str(licence.get("name", "")).lower()).strip("-")


def choose(images: dict[int, dict], number: int | None, seed: int) -> list[dict]:
    """`number` of the images, or all: those whose id and seed have the smallest hashes.

    So the choice is the same on every machine and version, and a larger one holds every smaller one.
    """
    order = sorted(images, key=lambda image: hashlib.sha256(f"{seed} {image}".encode()).digest())
    return [images[image] for image in order[:number]]
