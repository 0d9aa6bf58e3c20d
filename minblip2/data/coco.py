"""Pictures with captions and boxes in COCO layout, or captions alone out of a table."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import UserError
from .files import field, read_json, whole
from .pictures import check_image, load_image
from .progress import progress_bar
from .tables import SUFFIXES, NoSplit, find_table, read_table
from .workers import prefetch

YEARS = ("", "2017", "2014")  # behind a split's name, as COCO was published
FARTHEST = 1e9  # pixels from a picture's corner that a box may lie: COCO's may reach a little beyond the edges


@dataclass(frozen=True)
class Box:
    """Where an object is: its left and top edge, width and height, in pixels."""

    label: str
    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True)
class Record:
    """One picture with its captions and boxes; width and height in pixels; `credit` says whose it is, and `licence`
    under what, if it is told.

    Without boxes the size may be unknown: then it is 0.
    """

    id: int
    path: Path
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]
    width: int
    height: int
    credit: str = ""
    licence: str = ""


class CocoCaptions:
    """Pictures with captions: `.images` in the file's order, `.pairs` of (index in images, caption).

    A `root` in COCO layout holds annotations/captions_{split}.json, instances_{split}.json if there are boxes (crowds
    are left out), and pictures in images/ or {split}/; the official names, as train2017 and train2014, are found for
    "train", too. Otherwise `root` is a table of file names and captions, or a folder with one: see `read_table`.
    `limit` keeps the first usable pictures; `check` decodes each of them once, those in `without` are known to be
    broken. What has no use (caption without a word, missing or broken picture, picture without caption) is counted in
    `.skipped`, or refused if `strict`. Raises UserError for a file that is not what it should be.
    """

    def __init__(self, root: str | Path, split: str, limit: int | None = None, strict: bool = False,
                 check: bool = False, without: Collection[Path] = ()):
        self.root, self.split, self.strict, self.without = Path(root), split, strict, frozenset(without)
        self.images: list[Record] = []
        self.skipped: Counter[str] = Counter()
        if limit is not None and limit < 1:
            raise UserError(f"limit is {limit}: ask for at least 1 image")
        file, folder, content = self._find()
        self._base = _real(file.parent if self.root.is_file() else self.root)
        images = {}
        for entry in field(content, "images", list, file):
            if images.setdefault(whole(entry, "id", file), entry) is not entry:
                raise UserError(f"{file} lists image id {entry['id']} twice: ids must be unique")
        captions: dict[int, list[str]] = {number: [] for number in images}
        for entry in field(content, "annotations", list, file):
            number, caption = whole(entry, "image_id", file), field(entry, "caption", str, file)
            if number not in images:
                raise UserError(f"{file} has a caption for image id {number}, which is not among its images: list the "
                                "image, or take the caption out")
            caption = " ".join(caption.encode(errors="ignore").decode().split())  # no newlines, no lone surrogates
            if has_word(caption):
                captions[number].append(caption)
            else:
                self._skip("empty caption", f"{file}, image id {number}")
        boxes = self._boxes(file.with_name(file.name.replace("captions_", "instances_", 1)), set(images))
        listed = content.get("licenses")
        licences = {str(entry.get("id")): entry for entry in (listed if isinstance(listed, list) else ())
                    if isinstance(entry, dict) and entry.get("id") is not None}
        records = prefetch(lambda item: self._record(*item, folder, captions, boxes, file, check, licences),
                           images.items(), 2)
        total = min(limit or len(images), len(images))
        with progress_bar(total=total, desc=f"check {split}", unit="image", hidden=not check) as bar:
            for reason, record in itertools.takewhile(lambda _: len(self.images) < total, records):
                if isinstance(record, Record):
                    self.images.append(record)
                    bar.update()
                else:
                    self._skip(reason, record)
        if self.skipped:
            counts = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items())
            print(f"{file}: skipped {counts}", file=sys.stderr)
        if not self.images:
            raise UserError(f"{file} has no usable image (it looked in {folder}): check folder and captions")
        self.pairs = [(index, caption) for index, image in enumerate(self.images) for caption in image.captions]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def paths(self) -> list[Path]:
        """The files of the images."""
        return [record.path for record in self.images]

    @property
    def ids(self) -> list[int]:
        """The image ids."""
        return [record.id for record in self.images]

    @property
    def rows(self) -> list[int]:
        """Which image each of `texts` belongs to."""
        return [row for row, _ in self.pairs]

    @property
    def texts(self) -> list[str]:
        """All captions, in the order of `pairs`."""
        return [caption for _, caption in self.pairs]

    def _find(self) -> tuple[Path, Path, dict[str, Any]]:
        """The captions file, the folder that its file names start from, and what it holds."""
        notes, names = self.root / "annotations", [self.split + year for year in YEARS]
        file = next((path for name in names if (path := notes / f"captions_{name}.json").is_file()), None)
        if file is None and (table := find_table(self.root, self.split)) is not None:
            folder = next((path for name in ("images", *names) if (path := table.parent / name).is_dir()), table.parent)
            return table, _real(folder), read_table(table, self.split)
        if file is None:
            there = sorted(path.stem.removeprefix("captions_") for path in notes.glob("captions_*.json"))
            tables = sorted(path.name for path in self.root.glob("*") if path.suffix in SUFFIXES)[:3]
            raise NoSplit(f"no split {self.split!r} in {self.root}: " + (
                f"there are {', '.join(there)}" if there else
                "it holds no annotations/captions_*.json at all, and no captions.csv or captions.txt")
                + (f"; name {' or '.join(tables)} itself" if tables else ""))
        names.sort(key=lambda name: name != file.stem.removeprefix("captions_"))
        folder = next((path for name in ("images", *names) if (path := self.root / name).is_dir()), None)
        if folder is None:
            raise UserError(f"no picture folder in {self.root}: put the pictures into images/ or {self.split}2017/")
        return file, _real(folder), read_json(file)  # resolved once here instead of for each picture

    def _boxes(self, file: Path, known: set[int]) -> dict[int, list[Box]]:
        """The boxes of every image id; none when there is no instances file."""
        found: dict[int, list[Box]] = {}
        if file.suffix != ".json" or not file.name.startswith("instances_") or not file.is_file():
            return found
        content = read_json(file)
        label = {whole(entry, "id", file): field(entry, "name", str, file)
                 for entry in field(content, "categories", list, file)}
        listed = field(content, "images", list, file) if content.get("images") else ()
        known = known | {whole(entry, "id", file) for entry in listed}
        for entry in field(content, "annotations", list, file):
            number, box = read_box(entry, known, label, file)
            if not entry.get("iscrowd"):
                found.setdefault(number, []).append(box)
        return found

    def _record(self, number: int, entry: dict, folder: Path, captions: dict, boxes: dict, file: Path, check: bool,
                licences: dict) -> tuple[str, Any]:
        """("", Record), or the reason to skip the picture and its name. Runs in threads: changes nothing."""
        name = field(entry, "file_name", str, file)
        if re.search(r"[\ud800-\udc7f\udd00-\udfff]", name):  # half a letter, which stands in no file name
            return "missing picture", name
        path = self._picture(name, folder, file)
        if not os.path.isfile(path):  # also for a name that no disk could hold
            return "missing picture", path
        if not captions[number]:
            return "picture without caption", path
        width, height = (_size(entry.get(side)) for side in ("width", "height"))
        try:
            if number in boxes and not (width and height):
                width, height = check_image(path, decode=False)
            if check:
                load_image(path)
            if path in self.without:
                return "unreadable picture", path
        except UserError as error:
            return "unreadable picture", error
        named = licences.get(str(entry.get("license")), {})
        licence = ", ".join(str(named[part]) for part in ("name", "url") if named.get(part))
        credit = ", ".join(str(part) for part in (entry.get("flickr_url"), licence) if part)
        return "", Record(number, path, tuple(captions[number]), tuple(boxes.get(number, ())), width, height, credit,
                          licence)

    def _picture(self, name: str, folder: Path, file: Path) -> Path:
        """Where a picture of this name is. It may start from the data's folder as well, or be written as in Windows."""
        spelt = dict.fromkeys((name, name.replace("\\", "/")))
        base, path = next(((base, base / one) for one in spelt for base in (folder, self._base)
                           if os.path.isfile(base / one)), (folder, folder / name))
        if "\0" in name or ".." in Path(name.replace("\\", "/")).parts or \
                not _real(path).is_relative_to(base):  # a link may climb, too
            raise UserError(f"{file} names the picture {name!r}, which is outside {folder}: put it inside")
        return path

    def _skip(self, reason: str, what: object) -> None:
        if self.strict:
            raise UserError(f"{reason}: {what} (strict mode refuses what is otherwise skipped)")
        self.skipped[reason] += 1


def read_box(entry: Any, known: Container[int], label: Mapping[int, str], file: object) -> tuple[int, Box]:
    """The image id and the box of an entry of an instances file; `label`: category id -> its name.

    Raises UserError naming the `file` for an image that is not `known`, or for what is no box.
    """
    number, category = whole(entry, "image_id", file), whole(entry, "category_id", file)
    box = field(entry, "bbox", list, file)
    if number not in known or category not in label:
        raise UserError(f"{file} has a box for image id {number}, category {category}, which it does not list")
    if len(box) != 4 or not all(isinstance(side, int | float) and abs(side) < FARTHEST for side in box):
        raise UserError(f"{file} has the box {str(box)[:80]} for image id {number}: give [x, y, width, height] in "
                        "pixels")
    return number, Box(label[category], *box)


def has_word(text: str) -> bool:
    """Whether a text holds a letter or a digit: without one, as `...` or a zero-width space, it says nothing."""
    return bool(re.search(r"[^\W_]", text))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _size(value: object) -> int:
    """A side in pixels, or 0 for what is no such number."""
    try:
        return max(0, int(float(str(value))))
    except (ValueError, OverflowError):
        return 0
