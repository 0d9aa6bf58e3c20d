"""Pictures from files, whatever the files hold. Nothing here needs PyTorch, so that downloads start at once."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from .. import UserError

MAX_PIXELS = 50_000_000
MAX_RATIO = 100  # of the sides: the shortest edge of a thread, enlarged to 256 pixels, would be a bomb of its own
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow opens some others by starting another program
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx",
                                                             b"mif1", b"msf1"), "HEIC")}  # ISO/IEC 23008-12
LEVELS = (255, 1023, 4095, 16383, 65535)  # the greatest value in 8, 10, 12, 14 and 16 bits
BEYOND_8_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's modes of one channel that are no bytes
PNG, TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")
ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # the texts that may say which way is up


Source = str | Path | io.BytesIO  # a file, or what is one in memory, whose str() is its name


def _binary(path: Source) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    """A file from its beginning; what is in memory stays open."""
    if not isinstance(path, io.BytesIO):
        return open(path, "rb")
    path.seek(0)
    return contextlib.nullcontext(path)


def _brand(path: Source) -> str | None:
    """"AVIF" or "HEIC" for a file of that family, by its first bytes, which name it and what else can read it."""
    with _binary(path) as file:
        head = file.read(64)
    if head[4:8] != b"ftyp":
        return None
    named = [head[8:12], *(head[i:i + 4] for i in range(16, min(len(head), int.from_bytes(head[:4], "big")), 4))]
    found = [BRANDS[name] for name in named if name in BRANDS]
    return "AVIF" if "AVIF" in found else next(iter(found), None)


def _formats(path: Source) -> tuple[str, ...]:
    """What Pillow may try on a file. Raises UserError for a picture whose decoder is not installed."""
    match _brand(path):
        case "AVIF":
            if not features.check("avif"):
                raise UserError(f"image {path} is an AVIF, which this build of Pillow cannot decode: install a newer "
                                "one (`pip install -U pillow`), or save the picture as PNG or JPEG")
            return ("AVIF",)
        case "HEIC":
            if importlib.util.find_spec("pillow_heif") is None:
                raise UserError(f"image {path} is a HEIC, as phones write them: `pip install pillow-heif` to read it, "
                                "or save it as JPEG")
            import pillow_heif

            pillow_heif.register_heif_opener()
            return ("HEIF",)
    return FORMATS


def _without_texts(path: Source) -> Source:
    """The file itself; of a PNG with texts a copy without them, as Pillow refuses a picture for a text of 1 MB."""
    with _binary(path) as file:
        chunks, texts, size = [(0, 8)], False, file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(8) != PNG:
            return path
        while (start := file.tell()) + 12 <= size:
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind in TEXTS and not file.read(32).startswith(ORIENTATION):
                texts = True
            else:
                chunks.append((start, length + 12))
            file.seek(start + length + 12)
        if not texts:
            return path
        copy = io.BytesIO()
        for start, length in chunks:
            file.seek(start)
            copy.write(file.read(length))
    copy.seek(0)
    return copy


@contextlib.contextmanager
def _opened(path: Source) -> Iterator[Image.Image]:
    """A picture of which only the header was read; whatever goes wrong with it becomes a UserError."""
    try:
        if not isinstance(path, io.BytesIO) and os.path.exists(path) and not os.path.isfile(path) \
                and not os.path.isdir(path):
            raise UserError(f"image {path} cannot be read: it is a pipe or a device, name a file")
        formats = _formats(path)
        with Image.open(_without_texts(path), formats=formats) as image:  # the header only: no size is a surprise
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


def to_8_bits(values: np.ndarray, path: str | Path) -> np.ndarray:
    """Grey values of any type (h w) as brightness from 0 to 255 (h w) uint8.

    Fractions within 0..1 are shares of white. Whole numbers are taken to fill 8, 10, 12, 14 or 16 bits, the fewest that
    hold the greatest of them: cameras and microscopes store 12 bits in 16. Fractions of 64 to 255 are 8 bits. All else,
    as negative numbers, is spread from its least to its greatest value. Raises UserError where these are the same, and
    for values that are no numbers.
    """
    fractions = values.dtype.kind == "f"
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(low + high):
        raise UserError(f"image {path} holds values that are no finite numbers: fill them in and save it again")
    if low >= 0 and fractions and high <= 1:
        low, high = 0, 1
    elif low >= 0 and high <= LEVELS[-1] and (values == np.round(values)).all():
        low, high = 0, next(level for level in LEVELS if high <= level)
    elif low >= 0 and 64 <= high <= LEVELS[0]:
        low, high = 0, LEVELS[0]
    elif low == high:
        raise UserError(f"image {path} holds the value {low:g} everywhere, which tells no brightness: save it with 8 "
                        "bits")
    return np.round((values - low) * (255 / (high - low))).astype(np.uint8)


def _grey(image: Image.Image, raw: str, inverted: bool, path: str | Path) -> Image.Image:
    """A picture of one channel beyond 8 bits as one of 8; `raw`: how its file stores the values."""
    values = np.asarray(image)
    if image.mode == "I" and raw.startswith(("I;32N", "('I;32N")):  # without a sign, but Pillow's integers have one
        values = values.view(np.uint32)
    grey = to_8_bits(values, path)
    grey = Image.fromarray(255 - grey if inverted else grey)
    if isinstance(clear := image.info.get("transparency"), int):  # PNG: the one value that stands for "nothing here"
        grey.paste(255, mask=Image.fromarray(values == clear))
    return grey


def to_rgb(image: Image.Image, path: Source = "in memory", raw: str = "", inverted: bool = False) -> Image.Image:
    """A picture of any kind in RGB: transparency over white, values beyond 8 bits as in `to_8_bits`.

    A picture in RGB is given back itself.
    raw, inverted: how its file, if it is from one, stores values beyond 8 bits; see `_grey`.
    """
    if image.mode in BEYOND_8_BITS:
        image = _grey(image, raw, inverted, path)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _nearly_black(image: Image.Image) -> bool:
    """Whether no colour is above a quarter of the range. Mere black beside an alpha channel is a drawing."""
    brightest = [channel.getextrema()[1] for band, channel in zip(image.getbands(), image.split(), strict=True)
                 if band != "A"]
    return max(brightest) < 64 and (any(brightest) or len(brightest) == len(image.getbands()))


def load_image(path: Source) -> Image.Image:
    """Decode a picture to RGB: upright (EXIF), transparency over white, values beyond 8 bits as in `to_8_bits`.

    HEIC needs the package pillow-heif. Raises UserError for what is unreadable, truncated, empty, above 50 million
    pixels or 100 times as long as wide, and for colours of 16 bits that leave the upper two of them empty, of which
    Pillow drops the lower eight.
    """
    with _opened(path) as image:
        raw = " ".join(str(tile.args) for tile in image.tile)  # how the values are stored; gone once they are loaded
        inverted = getattr(image, "tag_v2", {}).get(262) == 0  # TIFF's WhiteIsZero, which Pillow minds in 8 bits only
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode not in BEYOND_8_BITS and ";16" in raw and _nearly_black(image):
            raise UserError(f"image {path} holds colours of 16 bits, none of them above a quarter of the range, so it "
                            "would be nearly black: save it with 8 bits a channel")
        return to_rgb(image, path, raw, inverted)


def check_image(path: str | Path, decode: bool = True) -> tuple[int, int]:
    """Width and height in pixels, as stored, of a picture that decodes to its end. Raises UserError as `load_image`,
    but for what that says of values.

    Without `decode` only its header is read.
    """
    with _opened(path) as image:
        size = image.size
        if decode:
            image.draft("L", (1, 1))  # a JPEG's greys at an eighth of its size: every byte is read, in half the time
            image.load()
        return size
