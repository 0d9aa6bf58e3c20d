"""Pictures with captions and boxes in COCO layout."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import UserError
from .files import field, read_json
from .pictures import load_image
from .progress import progress_bar
from .workers import prefetch


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
    """One picture with its captions and boxes; width and height in pixels; `credit` says whose it is, if it is told."""

    id: int
    path: Path
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]
    width: int
    height: int
    credit: str = ""


class CocoCaptions:
    """Pictures with captions in COCO layout: `.images` in the file's order, `.pairs` of (index in images, caption).

    Reads annotations/captions_{split}.json, instances_{split}.json if there (boxes; crowds are left out), pictures
    from images/, {split}/ or {split}2017/. `limit` keeps the first usable pictures; `check` decodes each of them once.
    What has no use (empty caption, missing or broken picture, picture without caption) is counted in `.skipped`, or
    refused if `strict`. Raises UserError for a file that is not what it should be.
    """

    def __init__(self, root: str | Path, split: str, limit: int | None = None, strict: bool = False,
                 check: bool = False):
        self.root, self.split, self.strict = Path(root), split, strict
        self.images: list[Record] = []
        self.skipped: Counter[str] = Counter()
        if limit is not None and limit < 1:
            raise UserError(f"limit is {limit}: ask for at least 1 image")
        file, folder = self._find()
        content = read_json(file)
        images = {}
        for entry in field(content, "images", list, file):
            if images.setdefault(field(entry, "id", int, file), entry) is not entry:
                raise UserError(f"{file} lists image id {entry['id']} twice: ids must be unique")
        captions: dict[int, list[str]] = {number: [] for number in images}
        for entry in field(content, "annotations", list, file):
            number, caption = field(entry, "image_id", int, file), field(entry, "caption", str, file)
            if number not in images:
                raise UserError(f"{file} has a caption for image id {number}, which is not among its images")
            caption = " ".join(caption.encode(errors="ignore").decode().split())  # no newlines, no lone surrogates
            if caption:
                captions[number].append(caption)
            else:
                self._skip("empty caption", f"{file}, image id {number}")
        boxes = self._boxes(file.with_name(file.name.replace("captions_", "instances_", 1)), set(images))
        licences = {entry.get("id"): entry for entry in content.get("licenses", ()) if isinstance(entry, dict)}
        records = prefetch(lambda entry: self._record(entry, folder, captions, boxes, file, check, licences),
                           images.values(), 2)
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

    def _find(self) -> tuple[Path, Path]:
        """The captions file and the picture folder of the split, by our names or the official ones."""
        notes, names = self.root / "annotations", (self.split, f"{self.split}2017")
        file = next((path for name in names if (path := notes / f"captions_{name}.json").is_file()), None)
        if file is None:
            there = sorted(path.stem.removeprefix("captions_") for path in notes.glob("captions_*.json"))
            raise UserError(f"no split {self.split!r} in {self.root}: " + (
                f"there are {', '.join(there)}" if there else "it holds no annotations/captions_*.json at all"))
        folder = next((path for name in ("images", *names) if (path := self.root / name).is_dir()), None)
        if folder is None:
            raise UserError(f"no picture folder in {self.root}: put the pictures into images/ or {names[1]}/")
        return file, folder.resolve()  # once here instead of for each picture

    def _boxes(self, file: Path, known: set[int]) -> dict[int, list[Box]]:
        """The boxes of every image id; none when there is no instances file."""
        found: dict[int, list[Box]] = {}
        if not file.is_file():
            return found
        content = read_json(file)
        label = {field(entry, "id", int, file): field(entry, "name", str, file)
                 for entry in field(content, "categories", list, file)}
        known = known | {field(entry, "id", int, file) for entry in content.get("images", ())}
        for entry in field(content, "annotations", list, file):
            number, category, box = (field(entry, key, kind, file) for key, kind in
                                     (("image_id", int), ("category_id", int), ("bbox", list)))
            if number not in known or category not in label:
                raise UserError(f"{file} has a box for image id {number}, category {category}, which it does not list")
            if len(box) != 4 or not all(isinstance(side, int | float) for side in box):
                raise UserError(f"{file} has the box {box} for image id {number}: give [x, y, width, height] in pixels")
            if not entry.get("iscrowd"):
                found.setdefault(number, []).append(Box(label[category], *box))
        return found

    def _record(self, entry: dict, folder: Path, captions: dict, boxes: dict, file: Path, check: bool,
                licences: dict) -> tuple[str, Any]:
        """("", Record), or the reason to skip the picture and its name. Runs in threads: changes nothing."""
        number, name = entry["id"], field(entry, "file_name", str, file)
        width, height = field(entry, "width", int, file), field(entry, "height", int, file)
        path = folder / name
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or \
                not path.resolve().is_relative_to(folder):  # a link may climb, too
            raise UserError(f"{file} names the picture {name!r}, which is outside {folder}: put it inside")
        if not path.is_file():
            return "missing picture", path
        if not captions[number]:
            return "picture without caption", path
        try:
            if check:
                load_image(path)
        except UserError as error:
            return "unreadable picture", error
        source, licence = entry.get("flickr_url"), licences.get(entry.get("license"), {})
        credit = ", ".join(str(part) for part in (source, licence.get("name"), licence.get("url")) if part)
        return "", Record(number, path, tuple(captions[number]), tuple(boxes.get(number, ())), width, height, credit)

    def _skip(self, reason: str, what: object) -> None:
        if self.strict:
            raise UserError(f"{reason}: {what} (strict mode refuses what is otherwise skipped)")
        self.skipped[reason] += 1
