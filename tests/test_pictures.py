"""Pictures whose values do not fill 0..255, other people's file formats, and texts of megabytes: right or refused."""

import importlib.util
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from minblip2 import UserError
from minblip2.data.pictures import check_image, load_image
from minblip2.data.transforms import Transform
from minblip2.weights.reader import ImageReader

from .conftest import absent

GREY = np.random.default_rng(0).integers(0, 256, (24, 36)).astype(np.int64)
GREY[0, :2] = 0, 255  # both ends are there


def saved(tmp_path, values, name="picture.tif", **options):
    Image.fromarray(values).save(tmp_path / name, **options)
    return tmp_path / name


def scaled(top, kind):
    return np.round(GREY * (top / 255)).astype(kind)


@pytest.mark.parametrize(("values", "within"), [
    (scaled(65535, "u2"), 0), (scaled(16383, "u2"), 0.5), (scaled(4095, "u2"), 0.5), (scaled(1023, "u2"), 0.5),
    (scaled(255, "u2"), 0), (scaled(65535, ">u2"), 0), (scaled(4095, ">u2"), 0.5), (scaled(4000, "u2"), 6),
    (scaled(255, "i4"), 0), (scaled(4095, "i4"), 0.5), (scaled(65535, "i4"), 0), (scaled(2**31 - 1, "i4"), 0.5),
    (scaled(4000, "i4") - 1000, 0.5), (scaled(255, "i4") - 128, 0), (scaled(10**6, "i4") + 10**6, 0.5),
    ((GREY / 255).astype("f4"), 0), ((GREY / 400).astype("f4"), 255), (GREY.astype("f4"), 0),
    ((GREY * 0.99 + 0.1).astype("f4"), 3), ((GREY / 127.5 - 1).astype("f4"), 0.5), (scaled(4095, "f4"), 0.5),
    ((GREY * 7.3).astype("f4"), 0.5), ((GREY * 0.01).astype("f4"), 0.5)])
def test_values_are_scaled_to_what_they_fill(tmp_path, values, within):
    loaded = np.asarray(load_image(saved(tmp_path, values))).astype(int)
    expected = GREY if within < 255 else np.round(values * 255).astype(int)  # shares of white
    assert (loaded == loaded[..., :1]).all() and abs(loaded[..., 0] - expected).max() <= within + 0.5


def test_integers_without_sign_may_fill_32_bits(tmp_path):
    path = saved(tmp_path, (GREY * 16843009 % 2**32).astype(np.uint32).view(np.int32))
    content = path.read_bytes()
    entry = struct.pack("<HHII", 339, 3, 1, 2)  # SampleFormat: with a sign
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHII", 339, 3, 1, 1)))
    assert (np.asarray(load_image(path))[..., 0] == GREY).all()


def test_white_may_be_zero(tmp_path):
    path = saved(tmp_path, scaled(65535, "<u2"))
    entry = struct.pack("<HHII", 262, 3, 1, 1)  # PhotometricInterpretation: black is zero
    content = path.read_bytes()
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHII", 262, 3, 1, 0)))
    assert (np.asarray(load_image(path))[..., 0] == 255 - GREY).all()


def test_one_value_of_16_bits_may_be_transparent(tmp_path):
    loaded = np.asarray(load_image(saved(tmp_path, scaled(65535, "u2"), "p.png", transparency=int(GREY[3, 3]) * 257)))
    assert (loaded[GREY == GREY[3, 3]] == 255).all() and (loaded[..., 0] == GREY)[GREY != GREY[3, 3]].all()


@pytest.mark.parametrize(("values", "message"), [
    (np.where(GREY > 9, GREY / 255, np.nan).astype("f4"), "no finite numbers"),
    (np.where(GREY > 9, GREY / 255, np.inf).astype("f4"), "no finite numbers"),
    (np.full((9, 9), -3, "i4"), "the value -3 everywhere"), (np.full((9, 9), 1e9, "f4"), "everywhere")])
def test_what_tells_no_brightness_is_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=f"picture.tif holds .*{message}"):
        load_image(saved(tmp_path, values))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(path, values, kind=2):
    """Colours (h w c) of 16 bits, which Pillow reads but does not write; kind 2 is RGB, 4 grey and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def test_colours_of_16_bits_fill_them_or_are_refused(tmp_path):
    colours = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
    assert (np.asarray(load_image(deep_png(tmp_path / "16.png", colours * 257))) == colours).all()
    opaque = np.full_like(GREY, 65535)
    black = np.stack([0 * GREY, opaque], axis=-1)
    assert (np.asarray(load_image(deep_png(tmp_path / "black.png", black, 4))) == 0).all()
    for bits, kind, values in ((12, 2, colours), (14, 2, colours), (8, 2, colours), (12, 4, colours[..., :2]),
                               (12, 6, np.dstack([colours, 0 * GREY + 255])),
                               (12, 6, np.dstack([colours, opaque * (255 / 4095)]))):
        deep_png(tmp_path / "dark.png", (values * ((2**bits - 1) / 255)).round().astype(int), kind)
        with pytest.raises(UserError, match="dark.png holds colours of 16 bits.* 8 bits a channel"):
            load_image(tmp_path / "dark.png")


@pytest.mark.parametrize("text", [
    chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2_000_000)), chunk(b"tEXt", b"Comment\0" + b"x" * 70_000_000),
    chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)), chunk(b"zTXt", b"Comment\0\0garbage")])
@pytest.mark.parametrize("behind", [33, None])
def test_a_png_may_hold_any_text(tmp_path, text, behind):
    path = saved(tmp_path, GREY.astype(np.uint8), "p.png")
    content = path.read_bytes()
    behind = behind or len(content) - 12  # before its last chunk
    path.write_bytes(content[:behind] + text + content[behind:])
    assert (np.asarray(load_image(path))[..., 0] == GREY).all() and check_image(path) == (36, 24)


def test_the_text_that_says_which_way_is_up_is_read(tmp_path):
    upright = Image.fromarray(GREY.astype(np.uint8))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    upright.save(tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    more = chunk(b"tEXt", b"Comment\0hello") + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    (tmp_path / "p.png").write_bytes(content[:33] + more + content[33:])
    assert (np.asarray(load_image(tmp_path / "p.png"))[..., 0] == np.rot90(GREY, -1)).all()


def colours():
    small = np.random.default_rng(1).integers(40, 220, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((96, 64), Image.Resampling.BICUBIC)


def test_avif_is_read(tmp_path):
    if not features.check("avif"):
        absent("this build of Pillow has no AVIF")
    colours().save(tmp_path / "p.avif", quality=95)
    (tmp_path / "p.jpg").write_bytes((tmp_path / "p.avif").read_bytes())  # whatever its name
    for name in ("p.avif", "p.jpg"):
        difference = np.asarray(load_image(tmp_path / name)).astype(int) - np.asarray(colours())
        assert abs(difference).mean() < 4
    assert check_image(tmp_path / "p.avif") == (96, 64)


def test_avif_without_a_decoder_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "p.avif").write_bytes(struct.pack(">I", 24) + b"ftypavif\0\0\0\0mif1avif" + bytes(200))
    with pytest.raises(UserError, match="p.avif cannot be read"):  # a broken one
        load_image(tmp_path / "p.avif")
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(UserError, match="p.avif is an AVIF.*pip install -U pillow"):
        load_image(tmp_path / "p.avif")


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1"])
def test_heic_without_its_plugin_is_refused_with_the_way_out(tmp_path, monkeypatch, brand):
    (tmp_path / "p.jpg").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(200))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for read in (load_image, check_image):
        with pytest.raises(UserError, match="p.jpg is a HEIC.*`pip install pillow-heif`.*JPEG"):
            read(tmp_path / "p.jpg")


def test_heic_is_read_by_its_plugin(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif: pip install pillow-heif")
    heif.register_heif_opener()
    colours().save(tmp_path / "p.heic", quality=95)
    difference = np.asarray(load_image(tmp_path / "p.heic")).astype(int) - np.asarray(colours())
    assert abs(difference).mean() < 4 and check_image(tmp_path / "p.heic") == (96, 64)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="pipe.png cannot be read: it is a pipe"):
        load_image(tmp_path / "pipe.png")


# ---------------------------------------------------------------- pictures in memory


class Pixels(torch.nn.Linear):
    """An encoder whose features (b c v) are the pixels themselves."""

    def forward(self, pixels):
        return pixels.flatten(start_dim=2)


READER = ImageReader(vit=Pixels(1, 1), transform=Transform(size=12))


def kinds():
    """The same picture in each of Pillow's modes, as one can be made."""
    half = Image.fromarray(GREY[:, ::-1].astype(np.uint8)).resize((96, 64))
    clear = colours()
    clear.putalpha(half)
    palette = colours().quantize(16)
    palette.info["transparency"] = 3
    deep = {"I;16": Image.fromarray(scaled(4095, "u2")), "I": Image.fromarray(scaled(65535, "i4")),
            "F": Image.fromarray((GREY / 255).astype("f4"))}
    return deep | {"RGBA": clear, "LA": clear.convert("LA"), "P with transparency": palette, "RGBa": clear.convert(
        "RGBa")} | {mode: colours().convert(mode) for mode in ("L", "P", "1", "CMYK", "HSV", "YCbCr", "RGB")}


@pytest.mark.parametrize("kind", kinds())
def test_pictures_in_memory_are_read_as_from_files(tmp_path, kind):
    image = kinds()[kind]
    plain = image.convert({"HSV": "RGB", "RGBa": "RGBA"}.get(kind, image.mode))  # no file holds these two
    path = tmp_path / ("p.tif" if kind in ("CMYK", "YCbCr", "I", "F") else "p.png")
    plain.save(path)
    expected = READER.encode_images(load_image(path))
    assert expected.shape == (1, 3, 144) and torch.allclose(READER.encode_images([image]), expected, atol=0.02)
    before = image.tobytes()
    assert torch.equal(READER.encode_images(image), READER.encode_images(image)) and image.tobytes() == before


@pytest.mark.parametrize("given, said", [
    ("dog.jpg", "'dog.jpg' is a path.* open it with"), (["dog.jpg"], "'dog.jpg' is a path.* open it with"),
    (Path("a") / "dog.jpg", "dog.jpg' is a path"), ([GREY.astype(np.uint8)], "ndarray is no .*Image.fromarray"),
    (np.zeros((5, 6, 3), dtype=np.uint8), "uint8 .*Image.fromarray"), ([None], "NoneType is no")])
def test_what_is_no_picture_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        READER.encode_images(given)
