"""From files to batches: images, COCO-layout captions, cached features of the frozen encoder, batches by length."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
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
        ahead = _ahead(lambda entry: self._record(entry, folder, captions, boxes, file, check), images.values(), 2)
        total = min(limit or len(images), len(images))
        with tqdm(total=total, desc=f"check {split}", unit="image", disable=not check) as bar:
            for reason, record in itertools.takewhile(lambda _: len(self.images) < total, ahead):
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


def weights_checksum(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of a module's state: equal before and after if frozen is frozen."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def feature_cache(encode: Callable[[Tensor], Tensor], transform: Transform, paths: Sequence[str | Path],
                  folder: str | Path, key: str, batch_size: int = 32, workers: int = 2, progress: bool = True
                  ) -> np.memmap:
    """What a frozen encoder makes of pictures, computed once and kept on disk. Returns (n v e) float16, memory-mapped.

    encode: images (b c h w) float32 -> (b v e); `key` names the encoder's weights (`weights_checksum`). The file's name
    hashes key, transform and each picture's name, size and date. A killed build goes on where it stopped; a finished
    file is used only if its note agrees and its length is right. One process at a time may build. Raises UserError for
    a picture that cannot be read, features that float16 cannot hold, and a disk too small.
    """
    if not paths:
        raise UserError("there are no pictures to encode: the list of paths is empty")
    try:
        listing = [(Path(path).name, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in paths]
    except OSError as error:
        raise UserError(f"image {error.filename} cannot be read ({error.strerror}): replace or remove it") from error
    identity = {"version": 1, "key": key, "transform": repr(transform), "pictures": _hash(listing)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / f"features-{_hash(identity)[:16]}.npy"
    part, note = complete.with_suffix(".npy.part"), complete.with_suffix(".json")

    def write_note(done: int, shape: tuple[int, ...]) -> None:
        _write_json(note, {**identity, "shape": list(shape), "done": done})

    if (ready := _trusted(complete, note, identity)) is not None and ready[1] == len(paths):
        return ready[0]
    array, done = _trusted(part, note, identity, "r+") or (None, 0)
    with tqdm(total=len(paths), initial=done, desc="encode", unit="image", disable=not progress) as bar:
        rest = _ahead(lambda path: transform(load_image(path)), paths[done:], workers, 2 * batch_size)
        while batch := list(itertools.islice(rest, batch_size)):
            features = encode(torch.stack(batch)).to("cpu", torch.float16)
            shape = (len(paths), *features.shape[1:])
            if features.ndim != 3 or len(features) != len(batch) or (array is not None and array.shape != shape):
                raise UserError(f"the encoder made {tuple(features.shape)} of {len(batch)} images: make it (b v e)")
            if not features.isfinite().all():
                raise UserError(f"the encoder gave values that float16 cannot hold between {paths[done]} and "
                                f"{paths[done + len(batch) - 1]}: use another layer or scale them")
            if array is None:
                needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(folder).free
                if needed > free:  # writing to a mapped file on a full disk kills the process without a word
                    raise UserError(f"the features need {needed:.1e} bytes in {folder} but {free:.1e} are free: "
                                    "make room, use fewer images or choose another folder")
                write_note(0, shape)  # first: the note of an earlier file must not vouch for the empty new one
                array = np.lib.format.open_memmap(part, "w+", np.float16, shape)
            array[done:done + len(batch)] = features.numpy()
            array.flush()  # the counter may only ever say less than what is on disk
            done += len(batch)
            write_note(done, shape)
            bar.update(len(batch))
    del array  # Windows does not rename a file that is mapped
    os.replace(part, complete)
    return np.load(complete, mmap_mode="r")


@dataclass
class Batch:
    """image (b v e) float32, text_ids (b t) long, text_mask (b t) boolean (True = not padding), image_ids (b) long."""

    image: Tensor
    text_ids: Tensor
    text_mask: Tensor
    image_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class PairBatches:
    """Batches of (picture, caption) pairs of similar length; batch(step) depends on nothing but seed and step.

    views: one array (n v e) or more, each with one row per picture, of which a pair draws one; image_ids (n): the data
    set's ids; pairs_image and pairs_ids: row and token ids of each pair. `keep` visual tokens, drawn anew for each
    batch (the first always stays), stand for the whole image: cheaper, and another view each time (arXiv 2212.00794).
    An epoch visits every pair once, but for the remainder that fills no batch; every batch has two pictures or more, so
    that each pair has an admissible negative. Raises UserError when the data cannot give that.
    """

    def __init__(self, views: Sequence[np.ndarray], pairs_image: Sequence[int], pairs_ids: Sequence[Sequence[int]],
                 image_ids: Sequence[int], batch_size: int, seed: int, pad_id: int,
                 keep: int | None = None):
        self.keep = keep
        self.views, self.pairs_ids, self.batch_size, self.pad_id = views, pairs_ids, batch_size, pad_id
        self.seed = seed % 2**63  # numpy takes no negative seed
        self.rows, self.image_ids = np.asarray(pairs_image, dtype=np.int64), np.asarray(image_ids, dtype=np.int64)
        self.lengths = np.array([len(ids) for ids in pairs_ids], dtype=np.int64)
        n = len(pairs_ids)
        pictures = {len(view) for view in views}
        if len(self.rows) != n or pictures != {len(self.image_ids)}:
            raise UserError(f"{len(self.rows)} picture rows for {n} captions, {sorted(pictures)} features for "
                            f"{len(self.image_ids)} image ids: each two must be equally many")
        if batch_size < 2 or n < batch_size:
            raise UserError(f"batch size is {batch_size} for {n} pairs: choose at least 2, at most all pairs")
        if self.rows.min() < 0 or self.rows.max() >= len(self.image_ids) or not self.lengths.all():
            raise UserError(f"a pair has no tokens or a picture row outside 0..{len(self.image_ids) - 1}: "
                            "rebuild the pairs")
        if keep is not None and not 1 <= keep <= views[0].shape[1]:
            raise UserError(f"keep is {keep} of {views[0].shape[1]} visual tokens: choose at least 1, at most all")
        self.pictures = self.image_ids[self.rows]
        most = np.unique(self.pictures, return_counts=True)[1].max()
        if n - most < len(self):  # each batch needs one pair of another picture than the most frequent
            raise UserError(f"one picture has {most} of the {n} pairs, too many for {len(self)} batches of "
                            f"{batch_size} with two pictures each: give more pictures or a larger batch size")
        self._epoch: tuple[int, np.ndarray] | None = None  # one attribute, set in one step: threads may share it

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.rows) // self.batch_size

    def plan(self, epoch: int) -> np.ndarray:
        """Which pairs form each batch of an epoch: (batches batch_size) indices."""
        random, used = np.random.default_rng([self.seed, epoch]), len(self) * self.batch_size
        order = random.permutation(len(self.rows))
        for start in range(0, used, 16 * self.batch_size):
            window = order[start:min(start + 16 * self.batch_size, used)]
            window[:] = window[self.lengths[window].argsort(kind="stable")]
        pictures = self.pictures[order]
        for first in range(0, used, self.batch_size):
            if (other := pictures != pictures[first])[first:first + self.batch_size].any():
                continue
            # All of one picture: swap a pair with a batch that keeps a second picture, or with the remainder. If none
            # had one to give, each other batch would hold at most one, and the check in __init__ would have failed.
            kept = other[:used].reshape(-1, self.batch_size).sum(axis=1) > 1
            givers = np.flatnonzero(other & np.append(kept.repeat(self.batch_size), np.ones(len(order) - used, bool)))
            giver = givers[abs(self.lengths[order[givers]] - self.lengths[order[first]]).argmin()]
            for array in (order, pictures):
                array[[first, giver]] = array[[giver, first]]
        return random.permutation(order[:used].reshape(-1, self.batch_size))

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from the start of training; texts padded to the longest."""
        epoch, place = divmod(step, len(self))
        if (known := self._epoch) is None or known[0] != epoch:
            known = self._epoch = epoch, self.plan(epoch)
        pairs = known[1][place]
        ids = torch.full((self.batch_size, int(self.lengths[pairs].max())), self.pad_id)
        for row, pair in zip(ids, pairs, strict=True):
            row[:self.lengths[pair]] = torch.tensor(self.pairs_ids[pair])
        mask = torch.arange(ids.shape[1]) < torch.from_numpy(self.lengths[pairs]).unsqueeze(1)
        random = np.random.default_rng([self.seed, step, 1])
        drawn, tokens = random.integers(len(self.views), size=len(pairs)), np.arange(self.views[0].shape[1])
        if self.keep is not None:
            tokens = np.append(0, np.sort(random.choice(tokens[1:], size=self.keep - 1, replace=False)))
        image = np.stack([self.views[view][row][tokens] for view, row in zip(drawn, self.rows[pairs], strict=True)])
        return Batch(torch.from_numpy(image.astype(np.float32)), ids, mask, torch.from_numpy(self.pictures[pairs]))

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches without end from a step on, the next one prepared in the background."""
        return _ahead(self.batch, itertools.count(start), 1, 1)


def _ahead(function: Callable[[Any], Any], items: Iterable[Any], workers: int, window: int = 64) -> Iterator[Any]:
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


def _trusted(file: Path, note: Path, identity: dict, mode: str = "r") -> tuple[np.memmap, int] | None:
    """The mapped features (n v e) and how many are done, if note, shape and byte size agree; otherwise None."""
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        array = np.load(file, mmap_mode=mode)
        agrees = all(told[name] == value for name, value in identity.items()) and list(array.shape) == told["shape"]
        if agrees and array.dtype == np.float16 and file.stat().st_size == array.offset + array.nbytes:
            return array, told["done"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        pass  # absent or garbled: not trusted, so built again
    return None


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


def _write_json(path: Path, content: object) -> None:
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(beside, path)


def _field(entry: Any, key: str, kind: type, file: Path) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise UserError(f"{file} has an entry without {key!r}: {str(entry)[:80]}")
    if not isinstance(entry[key], kind):
        raise UserError(f"{file} has {key} = {str(entry[key])[:80]!r}, which is not {kind.__name__}")
    return entry[key]


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
