"""What `Blip2` and `Retriever` have in common: a frozen image encoder, and how images of any kind come to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import UserError
from ..data.features import feature_cache, weights_checksum
from ..data.pictures import load_image, to_rgb
from ..data.transforms import Transform
from ..device import autocast
from ..vit import ViT

PIXELS = "make an image of pixels with Image.fromarray(array)"  # said of what is neither an image nor features
CAPTION = dict(max_length=30, min_length=1)  # LAVIS `Blip2OPT.generate`
NO_IMAGE = "there is no image: give at least one"
Images = Image.Image | Iterable[Image.Image] | Tensor | np.ndarray


@dataclass(kw_only=True)
class ImageReader:
    """A frozen image encoder with its transform, on the device that the encoder is on.

    Wherever images are asked for, give one Pillow image, several, or frozen features (b v e), those of one image (v e).
    Images are read as `to_rgb` says. Raises UserError for no image, and for what is none, as a path, or an array of
    pixels. Modules are put into evaluation mode and stay in it: call their `train()` again in a loop of your own.
    `precision` is "float32" (compute as the weights are), "bfloat16", or "auto": see `device.autocast`.
    """

    vit: nn.Module
    transform: Transform
    precision: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.vit, ViT) and self.transform.size % (patch := self.vit.config.patch_size):
            raise UserError(f"{self.transform.size} pixels is not a multiple of the patch size {patch}: take the "
                            "preprocessing of the encoder's own folder")

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return next(self.vit.parameters()).device

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Frozen features (b v e) of normalised pixels (b c h w)."""
        weight = next(self.vit.parameters())
        with autocast(self.device, self.precision):
            return self.vit(pixels.to(weight)).float()

    def encode_images(self, images: Images) -> Tensor:
        """Frozen features (b v e) of images; features are taken as they are, wherever they lie."""
        if isinstance(images, Tensor | np.ndarray):
            features = torch.as_tensor(np.array(images) if isinstance(images, np.ndarray) else images)  # not read-only
            width = getattr(self.vit, "width", None)  # an encoder of somebody's own may not say it
            if not features.is_floating_point() or features.ndim < 2 or width not in (None, features.shape[-1]):
                raise UserError(f"an array {tuple(features.shape)} of {features.dtype} is no frozen features (b v "
                                f"{width or 'e'}): {PIXELS}")
            if not len(features):
                raise UserError(NO_IMAGE)
            return features.reshape(-1, *features.shape[-2:])
        return torch.cat(list(self.chunks(images)))

    def cached_features(self, paths: Sequence[Path], cache: Path, **view) -> np.memmap:
        """Frozen features (n v e) float16 of image files, computed once and kept in the folder `cache`.

        `view` changes the transform: flip=True for mirrored images, crop=3 for the third random crop of each. Raises
        UserError where an encoder of somebody's own does not make of the first image what is kept of it.
        """
        transform = replace(self.transform, **view)
        with autocast(self.device, self.precision):
            low = torch.is_autocast_enabled(self.device.type)  # rounded otherwise, though the weights are the same
        settings = self.vit.config if isinstance(self.vit, ViT) else ""
        kept = feature_cache(self.encode_pixels, transform, paths, cache,
                             f"{weights_checksum(self.vit)} {settings}" + " bfloat16" * low)
        if not settings:  # its code may have changed, which weights do not tell
            now = self.encode_pixels(transform(load_image(paths[0]))[None])[0].cpu().numpy()
            if now.shape != kept[0].shape or np.abs(now - kept[0]).mean() > 0.05 * np.abs(now).mean():
                raise UserError(f"{cache} holds other features of {paths[0]} than this encoder makes now: has its code "
                                "changed, or is it in training mode? Delete the folder, or name another")
        return kept

    def chunks(self, images: Images, batch_size: int = 8) -> Iterator[Tensor]:
        """Frozen features (b v e) of at most `batch_size` images at a time, in float32 on the encoder's device.

        Images are read as they are needed: an iterator of many takes no more memory than one of few.
        """
        if isinstance(images, Tensor | np.ndarray):
            yield from (chunk.to(self.device).float() for chunk in self.encode_images(images).split(batch_size))
            return
        one = isinstance(images, Image.Image | str | Path) or not isinstance(images, Iterable)
        rest = iter([images] if one else images)
        if not (first := list(islice(rest, 1))):
            raise UserError(NO_IMAGE)
        rest = chain(first, rest)
        while some := [self.transform(_picture(image)) for image in islice(rest, batch_size)]:
            yield self.encode_pixels(torch.stack(some))


def _picture(image: object) -> Image.Image:
    """A Pillow image in RGB. Raises UserError for anything else."""
    if isinstance(image, str | Path):
        raise UserError(f"{str(image)!r} is a path, not an image: open it with minblip2.data.pictures.load_image")
    if not isinstance(image, Image.Image):
        raise UserError(f"{type(image).__name__} is no Pillow image: {PIXELS}")
    return to_rgb(image)


def completed(decoding: dict[str, Any], **usual) -> dict[str, Any]:
    """The ways of decoding that are given, those that are not None, and the `usual` ones for the rest.

    Drawing takes one beam. Raises UserError for a `top_p` that is no share, and a generator that draws nothing.
    """
    given = {name: value for name, value in decoding.items() if value is not None}
    if not 0 < given.get("top_p", 1) <= 1:
        raise UserError(f"top_p is {given['top_p']}: give a share of the probability, above 0 and at most 1")
    drawn = given.keys() & {"top_p", "temperature"}
    if "generator" in given and not drawn:
        raise UserError("a generator is for drawing: give top_p or temperature as well, or leave it out")
    return usual | (dict(beams=1) if drawn else {}) | given


def is_single(images: Images) -> bool:
    """Whether this is one image, or the features (v e) of one."""
    return isinstance(images, Image.Image) or isinstance(images, Tensor | np.ndarray) and images.ndim == 2
