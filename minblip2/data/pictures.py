"""Pictures from files, whatever the files hold. Nothing here needs PyTorch, so that downloads start at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .. import UserError

MAX_PIXELS = 50_000_000
MAX_RATIO = 100  # of the sides: the shortest edge of a thread, enlarged to 256 pixels, would be a bomb of its own
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow opens some others by starting another program


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture of which only the header was read; whatever goes wrong with it becomes a UserError."""
    try:
        with Image.open(path, formats=FORMATS) as image:  # reads the header only: sizes are known before any decoding
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
                raise UserError(f"image {path} is {width}x{height} pixels, beyond {MAX_PIXELS // 10**6} million or a "
                                f"ratio of {MAX_RATIO}: resize or remove it")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"image {path} cannot be read: there is no such file, check the path") from None
    except IsADirectoryError:
        raise UserError(f"image {path} cannot be read: it is a folder, name the pictures in it") from None
    except UnidentifiedImageError:
        raise UserError(f"image {path} cannot be read: none of {', '.join(FORMATS)}, so replace or remove it") from None
    except Exception as error:  # a broken file makes decoders raise almost anything
        raise UserError(f"image {path} cannot be read ({error!r}): replace or remove it") from error


def load_image(path: str | Path) -> Image.Image:
    """Decode a picture to RGB: upright (EXIF), transparency over white, 16-bit grey to 8 bits.

    Raises UserError for what is unreadable, truncated, empty, above 50 million pixels or 100 times as long as wide.
    """
    with _opened(path) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip to 255: almost all white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def check_image(path: str | Path, decode: bool = True) -> tuple[int, int]:
    """Width and height in pixels, as stored, of a picture that decodes to its end. Raises UserError as `load_image`.

    Without `decode` only its header is read.
    """
    with _opened(path) as image:
        size = image.size
        if decode:
            image.draft("L", (1, 1))  # a JPEG's greys at an eighth of its size: every byte is read, in half the time
            image.load()
        return size
