"""Pictures that tests make: smooth ones, noise, and files that are no picture, or a dangerous one."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height, seed=0):
    return noise(7, 5, seed).resize((width, height), Image.Resampling.BICUBIC)


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def encoded(kind):
    stream = io.BytesIO()
    noise(64, 64).save(stream, kind)
    return stream.getvalue()


def truncated(kind):
    return encoded(kind)[:len(encoded(kind)) // 2]


BAD = {
    "zero bytes": (b"", "cannot be read"),
    "text": (b"<html>404</html>", "cannot be read"),
    "truncated JPEG": (truncated("JPEG"), "cannot be read.*truncated"),
    "truncated PNG": (truncated("PNG"), "cannot be read"),
    "truncated WebP": (truncated("WEBP"), "cannot be read"),
    "bomb of 60 million pixels": (png_header(6000, 10000), "6000x10000 pixels"),
    "bomb above Pillow's own limit": (png_header(60000, 60000), "cannot be read.*DecompressionBomb"),
    "thread": (png_header(20000, 3), "20000x3 pixels, beyond .* ratio"),
    "PostScript, which would start another program": (encoded("EPS"), "cannot be read: none of JPEG"),
}
