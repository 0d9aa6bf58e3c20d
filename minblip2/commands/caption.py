"""caption: what is in a picture, or in each of very many."""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import UserError
from ..data.features import pixels_of
from ..data.pictures import EXTENSIONS
from ..data.transforms import Transform
from ..data.workers import prefetch
from ..weights.blip2 import Blip2
from ..weights.retriever import Retriever
from .models import note, note_unknown, open_blip2, open_retriever
from .options import add_model_choice, command, positive, seed, share

BATCH = 8  # pictures at a time: what is said of many takes no more memory than of these
SOME_BROKEN = 1  # the exit code when others could be read


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "caption", run)
    sub.add_argument("images", nargs="+", help="files, folders with all that is in them, or patterns in quotes, such "
                                               "as 'photos/*.jpg'")
    add_model_choice(sub)
    sub.add_argument("--prompt", help="text that the caption goes on from, as in --prompt 'a picture of'; only what is "
                                      "new is printed")
    sub.add_argument("--beams", type=positive, help="of the search (default: as many as the run is measured with, or 5 "
                                                    "with --model)")
    sub.add_argument("--top-p", type=share, help="draw from the nucleus of this probability instead of searching")
    sub.add_argument("--seed", type=seed, default=0, help="of the draw (default %(default)s)")
    sub.add_argument("--max-length", type=positive, default=30, help="in tokens (default %(default)s)")
    sub.add_argument("--stage1", action="store_true", help="let the Q-Former caption without a language model")
    kept = sub.add_mutually_exclusive_group()
    kept.add_argument("--csv", type=Path, help="write file names and captions to this table; pictures that it holds "
                                               "already are left out")
    kept.add_argument("--jsonl", type=Path, help="the same as JSON lines")


def run(args: argparse.Namespace) -> int:
    """Say what is in each image; 1 when some of them could not be read."""
    paths = find_pictures(args.images)
    table = Table(args.csv or args.jsonl, args.jsonl is not None) if args.csv or args.jsonl else None
    if table is not None and (known := [path for path in paths if str(path) in table.known]):
        note(f"{table.path} holds {len(known)} of these {len(paths)} pictures already, which are left as they are")
        paths = [path for path in paths if str(path) not in table.known]
    if not paths:
        return 0
    writer = open_retriever(args) if args.stage1 else open_blip2(args)
    torch.manual_seed(args.seed)  # here, for loading draws, too
    asked = dict(beams=args.beams, top_p=args.top_p, prompt=args.prompt)
    choice = {name: value for name, value in asked.items() if value is not None}
    if args.prompt is not None:
        note_unknown(writer.tokenizer, [args.prompt])
    read, broken = 0, []
    for path, caption in captions(writer, paths, max_length=args.max_length, **choice):
        if isinstance(caption, UserError):
            broken.append(caption)
            if len(paths) > 1:
                note(str(caption))
            continue
        read += 1
        print(f"{path}: {caption}", flush=True)
        if table is not None:
            table.add(path, caption)
    if broken and not read:
        raise UserError(f"none of the {len(paths)} pictures could be read" if len(paths) > 1 else str(broken[0]))
    if broken:
        note(f"{len(broken)} of {len(paths)} pictures could not be read")
    return SOME_BROKEN if broken else 0


def find_pictures(names: Iterable[str]) -> list[Path]:
    """The files that are meant by names, folders (with what is in them, folders below as well) and patterns.

    A file that was named is taken for what it is, in a folder those that are called as pictures are. Raises UserError
    for a folder without pictures and a pattern that nothing fits.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if not name:
            raise UserError("one of the pictures has no name: is a variable of your shell empty?")
        if path.is_dir():
            some = sorted(one for one in path.rglob("*") if one.suffix.lower() in EXTENSIONS and one.is_file()
                          and not any(part.startswith(".") for part in one.relative_to(path).parts))
            if not some:
                raise UserError(f"the folder {path} holds no pictures ({', '.join(sorted(EXTENSIONS))}): name another")
        elif not path.exists() and glob.has_magic(name):
            some = sorted(Path(one) for one in glob.glob(name, recursive=True) if not Path(one).is_dir())
            if not some:
                raise UserError(f"nothing is called like {name!r}: check the pattern")
        else:
            some = [path]
        found += some
    return list(dict.fromkeys(found))


def try_pixels(transform: Transform, path: Path) -> np.ndarray | UserError:
    """What an encoder sees of a picture, (h w c) uint8, or what is wrong with it."""
    try:
        return pixels_of(transform, path)
    except UserError as error:
        return error


def captions(writer: Blip2 | Retriever, paths: Iterable[Path], batch_size: int = BATCH, **choice
             ) -> Iterator[tuple[Path, str | UserError]]:
    """(path, caption) of each picture in turn, or (path, what is wrong with it); a few are in memory at a time."""
    pixels = zip(paths, prefetch(partial(try_pixels, writer.transform), paths, 2, 2 * batch_size), strict=True)
    while some := list(islice(pixels, batch_size)):
        good = [one for _, one in some if not isinstance(one, UserError)]
        written: Iterator[str] = iter(())
        if good:
            written = iter(writer.caption(writer.encode_pixels(writer.transform.normalise(np.stack(good))), **choice))
        for path, one in some:
            yield path, one if isinstance(one, UserError) else " ".join(next(written).split())


class Table:
    """File names and captions in a CSV with a head, or as JSON lines. It grows line by line, so a kill loses nothing.

    `known` are the names that it holds already. Raises UserError for a file that is something else.
    """

    HEAD = ("file_name", "caption")

    def __init__(self, path: Path, lines: bool = False):
        self.path, self.lines, self.file = path, lines, None
        if path.exists() and (path.is_symlink() or not path.is_file()):
            raise UserError(f"{path} is no regular file: name another one for the captions")
        content = path.read_bytes() if path.exists() else b""
        self.whole = content[:content.rfind(b"\n") + 1]  # a kill may have cut the last line
        first = '{"file_name": ' if lines else self._line(self.HEAD)
        begun, first = content[len(self.whole):], first.encode()
        if not self.whole and not (begun.startswith(first) or first.startswith(begun)):
            raise self._strange()
        self.known = {row[0] for row in self._rows(self.whole)}

    def add(self, path: Path, caption: str) -> None:
        """Write one line, so that others can read it at once."""
        text = "" if self.file is not None or self.whole or self.lines else self._line(self.HEAD)
        text += self._line((str(path), caption))
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "r+b" if self.path.exists() else "wb")
            self.file.truncate(len(self.whole))
            self.file.seek(len(self.whole))
        self.file.write(text.encode(errors="surrogateescape"))
        self.file.flush()

    def _line(self, cells: Sequence[str]) -> str:
        if self.lines:
            return json.dumps(dict(zip(self.HEAD, cells, strict=True)), ensure_ascii=False) + "\n"
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        return line.getvalue()

    def _rows(self, content: bytes) -> list[list[str]]:
        text = content.decode(errors="surrogateescape")
        try:
            if self.lines:
                rows = [[entry[name] for name in self.HEAD] for entry in map(json.loads, text.split("\n")[:-1])]
                if not all(isinstance(cell, str) for row in rows for cell in row):
                    raise self._strange()
                return rows
            rows = list(csv.reader(io.StringIO(text, newline="")))
        except (ValueError, KeyError, TypeError, csv.Error):
            raise self._strange() from None
        if rows and (tuple(rows[0]) != self.HEAD or any(len(row) != 2 for row in rows)):
            raise self._strange()
        return rows[1:]

    def _strange(self) -> UserError:
        return UserError(f"{self.path} is there and holds no captions as they are written here: name another file")
