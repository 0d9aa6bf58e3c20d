"""From files to tensors: pictures, how an encoder wants them, and captions in COCO layout."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from . import UserError

MAX_PIXELS = 50_000_000
MAX_RATIO = 100  # of the sides: the shortest edge of a thread, enlarged to 256 pixels, would be a bomb of its own
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow opens some others by starting another program


def load_image(path: str | Path) -> Image.Image:
    """Decode a picture to RGB: upright (EXIF), transparency over white, 16-bit grey to 8 bits.

    Raises UserError for what is unreadable, truncated, empty, above 50 million pixels or 100 times as long as wide.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads the header only: sizes are known before any decoding
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
                raise UserError(f"image {path} is {width}x{height} pixels, beyond {MAX_PIXELS // 10**6} million or a "
                                f"ratio of {MAX_RATIO}: resize or remove it")
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip to 255: almost all white
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # a broken file makes decoders raise almost anything
        raise UserError(f"image {path} cannot be read ({error!r}): replace or remove it") from error


@dataclass(frozen=True)
class Transform:
    """An RGB picture becomes a normalised tensor (c size size), resized with Pillow's bicubic filter.

    mode "square" resizes straight to size x size pixels, as BLIP-2 evaluates (transformers `BlipImageProcessor`);
    "crop" resizes the shortest edge to `resize_to` pixels and cuts out the centre (DINOv2: `BitImageProcessor`).
    `flip` mirrors the picture: the other half of a doubled data set.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    mode: str = "square"
    resize_to: int | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("square", "crop"):
            raise UserError(f"transform mode is {self.mode!r}: choose 'square' or 'crop'")
        if self.size < 1 or (self.resize_to or self.size) < self.size:
            raise UserError(f"cannot cut {self.size} pixels out of {self.resize_to}: give 1 <= size <= resize_to")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Transform:
        """The transform that a model hub folder describes in its preprocessor_config.json."""
        path = Path(folder) / "preprocessor_config.json"
        config = _read_json(path)
        try:
            size, cut = config["size"], config.get("crop_size")
            if isinstance(size, int):  # files of older versions
                size = {"shortest_edge": size} if cut is not None else {"height": size, "width": size}
            resize_to = size.get("shortest_edge")
            sides = {"height": cut, "width": cut} if isinstance(cut, int) else cut
            sides = sides if resize_to else size
            cuts = config.get("do_center_crop", True)
            if config.get("resample", 3) != 3 or sides["height"] != sides["width"] or (resize_to and not cuts):
                raise UserError(f"{path} asks for size {size}, crop {cut if cuts else None}, resample "
                                f"{config.get('resample')}: only squares and bicubic resampling (3) are supported")
            return cls(sides["height"], tuple(config["image_mean"]), tuple(config["image_std"]),
                       "crop" if resize_to else "square", resize_to)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} lacks or garbles {error}: give size, image_mean and image_std") from error

    def shown(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the encoder sees, size x size pixels."""
        width, height = self.size, self.size
        if self.mode == "crop":
            short, resize_to = min(image.size), self.resize_to or self.size
            width, height = (int(resize_to * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return ImageOps.mirror(image) if self.flip else image

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize, cut, scale to 0..1 and normalise. Returns (c size size) float32."""
        pixels = torch.from_numpy(np.array(self.shown(image))).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


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
    """One picture with its captions and boxes; width and height in pixels."""

    id: int
    path: Path
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]
    width: int
    height: int


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
        content = _read_json(file)
        images = {}
        for entry in _field(content, "images", list, file):
            if images.setdefault(_field(entry, "id", int, file), entry) is not entry:
                raise UserError(f"{file} lists image id {entry['id']} twice: ids must be unique")
        captions: dict[int, list[str]] = {number: [] for number in images}
        for entry in _field(content, "annotations", list, file):
            number, caption = _field(entry, "image_id", int, file), _field(entry, "caption", str, file)
            if number not in images:
                raise UserError(f"{file} has a caption for image id {number}, which is not among its images")
            caption = " ".join(caption.encode(errors="ignore").decode().split())  # no newlines, no lone surrogates
            if caption:
                captions[number].append(caption)
            else:
                self._skip("empty caption", f"{file}, image id {number}")
        boxes = self._boxes(file.with_name(file.name.replace("captions_", "instances_", 1)), set(images))
        records = ahead(lambda entry: self._record(entry, folder, captions, boxes, file, check), images.values(), 2)
        total = min(limit or len(images), len(images))
        with tqdm(total=total, desc=f"check {split}", unit="image", disable=not check) as bar:
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
        content = _read_json(file)
        label = {_field(entry, "id", int, file): _field(entry, "name", str, file)
                 for entry in _field(content, "categories", list, file)}
        known = known | {_field(entry, "id", int, file) for entry in content.get("images", ())}
        for entry in _field(content, "annotations", list, file):
            number, category, box = (_field(entry, key, kind, file) for key, kind in
                                     (("image_id", int), ("category_id", int), ("bbox", list)))
            if number not in known or category not in label:
                raise UserError(f"{file} has a box for image id {number}, category {category}, which it does not list")
            if len(box) != 4 or not all(isinstance(side, int | float) for side in box):
                raise UserError(f"{file} has the box {box} for image id {number}: give [x, y, width, height] in pixels")
            if not entry.get("iscrowd"):
                found.setdefault(number, []).append(Box(label[category], *box))
        return found

    def _record(self, entry: dict, folder: Path, captions: dict, boxes: dict, file: Path, check: bool
                ) -> tuple[str, Any]:
        """("", Record), or the reason to skip the picture and its name. Runs in threads: changes nothing."""
        number, name = entry["id"], _field(entry, "file_name", str, file)
        width, height = _field(entry, "width", int, file), _field(entry, "height", int, file)
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
        return "", Record(number, path, tuple(captions[number]), tuple(boxes.get(number, ())), width, height)

    def _skip(self, reason: str, what: object) -> None:
        if self.strict:
            raise UserError(f"{reason}: {what} (strict mode refuses what is otherwise skipped)")
        self.skipped[reason] += 1


def ahead(function: Callable[[Any], Any], items: Iterable[Any], workers: int, window: int = 64) -> Iterator[Any]:
    """function of each item, in order, by threads at most `window` items ahead (`pool.map` would take all at once)."""
    with ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(function, item) for item in items)
        waiting = deque(itertools.islice(futures, window))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(itertools.islice(futures, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): download or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object with keys: download or write it again")
    return content


def _field(entry: Any, key: str, kind: type, file: Path) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise UserError(f"{file} has an entry without {key!r}: {str(entry)[:80]}")
    if not isinstance(entry[key], kind):
        raise UserError(f"{file} has {key} = {str(entry[key])[:80]!r}, which is not {kind.__name__}")
    return entry[key]
