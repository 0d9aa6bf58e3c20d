"""Pictures and captions as people keep them outside COCO's layout: tables of file name and caption, and JSON lines."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import UserError
from .pictures import EXTENSIONS

SPLITS = ("train", "val", "validation", "valid", "test", "dev", "restval")  # what a split is called
SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")  # of a table that is looked for in a folder
IMAGE = f"(?:{'|'.join(map(re.escape, EXTENSIONS))})"
COLUMNS = {  # what a column may be called; of several that are there, the first in this order counts
    "file_name": ("file_name", "filename", "image_file", "image_path", "image_name", "file_path", "filepath", "path",
                  "file", "image", "images", "img", "name", "image_id"),
    "caption": ("caption", "captions", "caption_text", "text", "sentence", "description", "comment", "title"),
    "split": ("split", "set", "subset"),
}
EXAMPLE = "give lines such as `dog.jpg,a dog on the grass`, with or without the head `file_name,caption`"


class NoSplit(UserError):
    """The data have no split of that name."""


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark. Raises UserError for anything else."""
    try:
        content = path.read_bytes()
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start} is {content[error.start]:#x}): save it as UTF-8, "
                        "in a spreadsheet as 'CSV UTF-8'") from None


def _lines(text: str) -> list[str]:
    """A text cut at its newlines only: `splitlines` cuts at characters that a caption may hold, as U+2028, as well."""
    return re.split(r"\r\n|\r|\n", text)


def find_table(root: Path, split: str) -> Path | None:
    """The table that holds a split's captions: `root` itself if it is a file, else one in it; None without any.

    In a folder it is called after the split (val.csv, captions_val.txt, val/metadata.jsonl), or captions or metadata.
    """
    if root.is_file():
        return root
    for stem in (f"captions_{split}", split, f"{split}/captions", f"{split}/metadata", "captions", "metadata"):
        for suffix in SUFFIXES:
            if (path := root / f"{stem}{suffix}").is_file():
                return path
    return None


def read_table(path: Path, split: str) -> dict[str, Any]:
    """The captions of a split out of a table, as the object that a captions file in COCO layout holds.

    Every line has a file name and a caption; a picture may have several lines. Read are CSV with commas, semicolons,
    tabs or bars, a file name and a caption with blanks between them, JSON lines, and a JSON list, whose names for the
    two may be any of `COLUMNS`. A third column, split, says which split a line belongs to ("restval" is "train");
    without it, and unless the file is called after a split, all lines are "train". Raises UserError naming the line
    that cannot be read.
    """
    rows = list(_json_rows(path) if path.suffix.lower() in (".json", ".jsonl") else _rows(path))
    if not rows:
        raise NoSplit(f"{path} holds no line with a caption: {EXAMPLE}")
    if any("split" in row for _, row in rows):
        if blank := next((line for line, row in rows if not row.get("split")), None):
            raise UserError(f"{path}, line {blank} names no split, where others do: fill it in")
        there = sorted({str(row["split"]) for _, row in rows})
        wanted = ("train", "restval") if split.lower() == "train" else (split.lower(),)  # as Karpathy's split is used
        rows = [(line, row) for line, row in rows if str(row["split"]).lower() in wanted]
    else:
        called = path.stem.removeprefix("captions_")
        there = [called if called in SPLITS else "train"]
        rows = rows if split in (*there, called, path.parent.name) else []
    if not rows:
        raise NoSplit(f"no split {split!r} in {path}: there are {', '.join(there)}; a third column 'split' can name "
                      "others")
    numbers: dict[str, int] = {}
    notes = []
    for line, row in rows:
        name, caption = row.get("file_name"), row.get("caption")
        if not isinstance(name, str) or not name or not isinstance(caption, str):
            raise UserError(f"{path}, line {line} has no file name and caption: {EXAMPLE}")
        notes.append(dict(image_id=numbers.setdefault(name, len(numbers) + 1), caption=caption))
    return dict(images=[dict(id=number, file_name=name) for name, number in numbers.items()], annotations=notes)


def _columns(names: list[Any]) -> dict[str, int]:
    """Which column holds what, by the names in a table's head; {} when it is none."""
    names = [str(name).strip().lower().replace(" ", "_").replace("-", "_") for name in names]
    found = {kind: next((names.index(name) for name in known if name in names), None)
             for kind, known in COLUMNS.items()}
    return {kind: place for kind, place in found.items() if place is not None} if None not in (
        found["file_name"], found["caption"]) else {}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) for every line of a table that is not empty."""
    text = read_text(path)
    first = next((line for line in _lines(text) if line.strip()), "")
    for delimiter in ("\t", "|", ";", ","):
        _, cells = next(_cells(path, first, delimiter), (0, [""]))
        columns = _columns(cells)
        if columns or (len(cells) > 1 and _is_picture(cells[0])):
            break
    else:
        yield from _spaced(path, text)
        return
    has_head, width = bool(columns), len(cells) if columns else 2
    if not has_head:
        columns = dict(file_name=0, caption=1)
        ends = [cells[-1].strip().lower() if len(cells) > 2 else None for _, cells in _cells(path, text, delimiter)]
        named = sum(end in SPLITS for end in ends)
        if named and 2 * (named + ends.count("")) >= len(ends):  # in fewer lines it is the last word of a caption
            columns, width = columns | dict(split=2), 3
    last = columns["caption"] == width - 1  # only then what is left of a line belongs to its caption
    for number, (line, cells) in enumerate(_cells(path, text, delimiter)):
        if _holds_rows(cells, delimiter, columns["file_name"]):
            raise UserError(f"{path}, line {line} begins a quote that takes in the pictures of lines below it: end the "
                            "quote where its caption ends, or take it out")
        if number == 0 and has_head:
            continue
        if len(cells) > width and last:
            cells = [*cells[:columns["caption"]], delimiter.join(cells[columns["caption"]:])]
        if len(cells) > width or len(cells) <= max(columns["file_name"], columns["caption"]):
            raise UserError(f"{path}, line {line} has {len(cells)} columns, not {width}: put a caption that holds "
                            f"{delimiter!r} into quotes; {EXAMPLE}")
        row = {kind: cells[place].strip() for kind, place in columns.items() if place < len(cells)}
        yield line, row | dict(file_name=re.sub(rf"({IMAGE})#\d+$", r"\1", row["file_name"], flags=re.IGNORECASE))


def _is_picture(cell: str) -> bool:
    """Whether a cell may be the name of a picture, numbered (`a.jpg#0`) or not."""
    return bool(re.fullmatch(rf".*{IMAGE}(#\d+)?", cell.strip(' "'), re.IGNORECASE))


def _holds_rows(cells: list[str], delimiter: str, place: int) -> bool:
    """Whether several lines of what was read as one row name a picture where the row does: a quote did not end."""
    lines = [line.split(delimiter) for line in _lines(delimiter.join(cells))]
    return sum(len(line) > max(place, 1) and _is_picture(line[place]) for line in lines) > 1


def _cells(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) for every row that is not empty.

    Only between commas and semicolons may a caption in quotes have several lines; between tabs and bars a quote may
    begin a caption and not end.
    """
    if delimiter in "\t|":
        for line, content in enumerate(_lines(text), start=1):
            if content.strip():
                cells = (cell.strip() for cell in content.split(delimiter))
                yield line, [cell[1:-1].replace('""', '"') if re.fullmatch('".*"', cell) else cell for cell in cells]
        return
    # A caption's own blanks and quotes are kept, unless the file puts a blank before the quotes of its second column.
    behind_blanks = bool(re.search(rf'^[^{delimiter}"\r\n]*{delimiter} +"', text, re.MULTILINE))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=behind_blanks)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line} is no line of a table ({error}; perhaps a quote does not end): {EXAMPLE}"
                        ) from None


def _spaced(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) for lines of a file name, a colon or not, blanks, and a caption."""
    for line, content in enumerate(_lines(text), start=1):
        if content.strip():
            found = re.fullmatch(rf"\s*(.+?{IMAGE})(?:#\d+)?\s*:?\s+(.*)", content, re.IGNORECASE)
            if not found:
                raise UserError(f"{path}, line {line} has no file name and caption: {EXAMPLE}")
            yield line, dict(file_name=found[1], caption=found[2])


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or place, row) for every entry of JSON lines, or of a JSON file that is one list."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            entries = list(enumerate(json.loads(text), start=1))
        else:
            entries = [(i, json.loads(line)) for i, line in enumerate(_lines(text), start=1) if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is neither a JSON list nor JSON lines ({error}): for COCO's layout name its folder, "
                        "which holds annotations/ and images/") from None
    for line, entry in entries:
        columns = _columns(list(entry)) if isinstance(entry, dict) else {}
        if not columns:
            raise UserError(f"{path}, entry {line} has no file name and caption: write it as "
                            '{"file_name": "dog.jpg", "caption": "a dog on the grass"}')
        values = list(entry.values())
        caption = values[columns["caption"]]
        for one in caption if isinstance(caption, list) else [caption]:
            yield line, {kind: values[place] for kind, place in columns.items()} | dict(caption=one)
