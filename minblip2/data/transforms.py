"""How an encoder wants its pictures: resized, cut and normalised."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import UserError
from .files import field, read_json

CUTTING = ("CLIP", "ChineseCLIP", "Bit", "DeiT")  # whose image processors cut out the centre unless told
KINDS = (*CUTTING, "Blip", "Siglip", "ViT")  # that do nothing besides what a `Transform` does
LOG_RATIO = math.log(4 / 3)  # the longest and the tallest random crop


@dataclass(frozen=True)
class Transform:
    """An RGB picture becomes a normalised tensor (c size size), resized with Pillow's bicubic filter.

    mode "square" resizes straight to size x size pixels, as BLIP-2 evaluates (transformers `BlipImageProcessor`);
    "crop" resizes the shortest edge to `resize_to` pixels and cuts out the centre (DINOv2: `BitImageProcessor`).
    `flip` mirrors the picture: the other half of a doubled data set. `crop` numbers one of the random crops that BLIP-2
    trains on (LAVIS `Blip2ImageTrainProcessor`), in place of mode and flip: 50 to 100 % of the area, sides 3:4 to 4:3,
    stretched to the square, mirrored every other time. It is drawn from the picture itself: the same has the same.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    mode: str = "square"
    resize_to: int | None = None
    flip: bool = False
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("square", "crop"):
            raise UserError(f"transform mode is {self.mode!r}: choose 'square' or 'crop'")
        if self.size < 1 or (self.resize_to or self.size) < self.size:
            raise UserError(f"cannot cut {self.size} pixels out of {self.resize_to}: give 1 <= size <= resize_to")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Transform:
        """The transform of a hub folder: of its preprocessor_config.json or, in newer ones, processor_config.json.

        Where it scales pixels by another factor than 1/255, or does not normalise them, `mean` and `std` are those that
        give the same. Raises UserError for what is missing, garbled or not supported.
        """
        path, newer = (Path(folder) / f"{name}_config.json" for name in ("preprocessor", "processor"))
        if newer.exists() and "image_processor" in (both := read_json(newer)):  # which counts where there are two
            path, config = newer, field(both, "image_processor", dict, newer)
        else:
            config = read_json(path)
        try:
            named = config.get("image_processor_type") or config.get("feature_extractor_type")
            kind = str(named or "CLIP")
            size, cut = config["size"], config.get("crop_size")
            cuts = config.get("do_center_crop", kind.startswith(CUTTING))
            if named and cuts and cut is None and kind.startswith(CUTTING):
                cut = 224  # what these processors take as known
            if isinstance(size, int):  # files of older versions
                cutting = cut is not None and kind.startswith(CUTTING) and not kind.startswith("DeiT")
                size = {"shortest_edge": size} if cutting else {"height": size, "width": size}
            resize_to = size.get("shortest_edge")
            cut = {"height": cut, "width": cut} if isinstance(cut, int) else cut
            sides = cut if resize_to else size
            usual = 2 if kind.startswith("ViT") else 3
            resample = config.get("resample", usual) if config.get("do_resize", True) else "none"
            if str(resample).lower() not in ("3", "bicubic") or sides["height"] != sides["width"] or (
                    not cuts if resize_to else cuts and cut not in (None, sides)) or "longest_edge" in size:
                raise UserError(f"{path} asks for size {size}, crop {cut if cuts else None}, resample {resample}: only "
                                "squares and bicubic resampling (3) are supported")
            if not kind.startswith(KINDS) or config.get("do_pad") and config.get("pad_size"):
                raise UserError(f"{path} is of {kind}{' and pads pictures' * bool(config.get('do_pad'))}: only what "
                                f"{', '.join(KINDS)} do is supported")
            if type(sides["height"]) is not int or type(resize_to or 1) is not int:
                raise ValueError(f"'size', which is {size}")
            mean, std = _normalisation(config)
            return cls(sides["height"], mean, std, "crop" if resize_to else "square", resize_to)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} lacks or garbles {error}: give size, image_mean and image_std") from error

    def crop_and_resize(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the encoder sees, size x size pixels."""
        if self.crop is not None:
            return self._random_crop(image)
        width, height = self.size, self.size
        if self.mode == "crop":
            short, resize_to = min(image.size), self.resize_to or self.size
            width, height = (int(resize_to * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return ImageOps.mirror(image) if self.flip else image

    def part_seen(self, image: Image.Image) -> Image.Image:
        """The same part as a picture to be looked at: at its own size, and not squeezed into a square."""
        if self.crop is not None or self.mode == "square":
            return self._random_crop(image) if self.crop is not None else image.copy()
        side = min(image.size) * self.size / (self.resize_to or self.size)
        left, top = ((room - side) / 2 for room in image.size)
        return image.crop((round(left), round(top), round(left + side), round(top + side)))

    def _random_crop(self, image: Image.Image) -> Image.Image:
        random = np.random.default_rng([self.crop, zlib.crc32(image.tobytes())])
        for _ in range(10):
            area = random.uniform(0.5, 1) * image.width * image.height
            ratio = math.exp(random.uniform(-1, 1) * LOG_RATIO)
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            room = image.width - width, image.height - height
            if min(room) >= 0:
                left, top = (int(random.integers(0, some + 1)) for some in room)
                break
        else:  # too long or too tall for any such part: the largest, in the middle
            width = min(image.width, round(image.height * math.exp(LOG_RATIO)))
            height = min(image.height, round(image.width * math.exp(LOG_RATIO)))
            left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return ImageOps.mirror(image) if random.random() < 0.5 else image

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """What `crop_and_resize` gives, as numbers 0..255 (... h w c), as the encoder wants it: (... c h w) float32."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (torch.from_numpy(pixels).movedim(-1, -3).float() / 255 - mean) / std

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize, cut, scale to 0..1 and normalise. Returns (c size size) float32."""
        return self.normalise(np.array(self.crop_and_resize(image)))


def _normalisation(config: dict[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of colours in 0..1 that do what a hub folder's settings do, whatever their order and scale."""
    def colours(value: Any, name: str) -> list[float]:
        values = value if isinstance(value, list) else [value] * 3
        if len(values) != 3 or not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
            raise ValueError(f"{name!r}, which is {str(value)[:60]}")
        return values

    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    scale = colours(factor, "rescale_factor")[0]
    mean, std = [0.0] * 3, [1.0] * 3
    if config.get("do_normalize", True):
        mean, std = (colours(config[f"image_{name}"], f"image_{name}") for name in ("mean", "std"))
    if scale <= 0 or min(std) <= 0:
        raise ValueError("'rescale_factor' or 'image_std', which are not above 0")
    scale = 1.0 if abs(255 * scale - 1) < 1e-9 else 255 * scale  # exactly what is written there in the usual case
    mean, std = (tuple(value / scale for value in values) for values in (mean, std))
    return mean, std
