"""The photographs that ship, made small out of COCO: python data/photographs/make.py FOLDER

FOLDER holds COCO 2017 in its own layout. Sixteen photographs under CC BY are written into images/, at most 256 pixels
on a side, with captions of our own in annotations/, so that `CocoCaptions` reads them; CREDITS.md says whose they are.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from minblip2 import UserError  # noqa: E402
from minblip2.data.entry import run_command  # noqa: E402
from minblip2.data.files import read_json, write_beside, write_json  # noqa: E402
from minblip2.data.pictures import load_image  # noqa: E402

SIDE, LARGEST = 256, 20_000  # pixels, bytes
LICENCE, LICENCE_URL = "CC BY 2.0", "https://creativecommons.org/licenses/by/2.0/"
CHANGED = "resized"
CAPTIONS = {  # COCO's id -> what we see
    129648: "a skateboarder rides along the edge of an empty pool",
    377575: "a dark curly dog stands beside a fire hydrant",
    214753: "two people ride horses along the beach",
    126107: "a gull flies over a beach",
    174375: "a tennis player serves on a clay court in front of a crowd",
    165518: "a man rides a motorcycle through fog",
    519208: "a man in a green sweater stands beside an elephant",
    358083: "a black and white cat sits beside a mirror",
    196393: "a white cat and a green bird eat from bowls",
    160012: "a pizza with tomatoes lies on a table",
    99053: "a bowl of noodles with meat and a fork",
    62554: "plates of broccoli and other vegetables",
    423617: "two buses, a yellow taxi and cars on a wet street",
    516008: "a laptop with a keyboard and a mouse on a desk",
    525891: "a stop sign beside a bush with red flowers",
    475678: "rows of suitcases with tags",
}


def small_jpeg(picture: Image.Image) -> bytes:
    """The picture at most SIDE pixels on a side, as a JPEG of at most LARGEST bytes, as good as that allows."""
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    for quality in range(90, 30, -5):
        picture.save(file := io.BytesIO(), "JPEG", quality=quality, optimize=True)
        if len(file.getvalue()) <= LARGEST:
            return file.getvalue()
    raise UserError(f"the picture stays larger than {LARGEST} bytes at {SIDE} pixels: leave it out")


def find(folder: Path) -> dict[int, tuple[Path, str]]:
    """Each photograph's file and its address on Flickr. Raises UserError where one is missing or not CC BY."""
    found = {}
    for split in ("train2017", "val2017"):
        content = read_json(folder / "annotations" / f"captions_{split}.json")
        free = {one["id"] for one in content["licenses"] if one["url"].rstrip("/").endswith("licenses/by/2.0")}
        for entry in content["images"]:
            if entry["id"] in CAPTIONS and entry["license"] not in free:
                raise UserError(f"COCO's picture {entry['id']} is not under {LICENCE}: take it off the list")
            found[entry["id"]] = folder / split / entry["file_name"], entry["flickr_url"]
    if missing := CAPTIONS.keys() - found.keys():
        raise UserError(f"{folder} lacks the pictures {sorted(missing)}: name a folder that holds them")
    return {number: found[number] for number in CAPTIONS}


def main() -> int:
    """Write pictures, annotations and credits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path, metavar="FOLDER")
    images, credits = [], []
    for folder in ("images", "annotations"):
        (HERE / folder).mkdir(exist_ok=True)
    for number, (path, source) in find(parser.parse_args().coco).items():
        content, name = small_jpeg(load_image(path)), f"{number:012d}.jpg"
        write_beside(HERE / "images" / name, lambda partial, content=content: partial.write_bytes(content))
        width, height = Image.open(io.BytesIO(content)).size
        images.append(dict(id=number, file_name=name, width=width, height=height, license=1, flickr_url=source))
        credits.append(f"| [{name}](images/{name}) | {CAPTIONS[number]} | <{source}> |\n")
    write_json(HERE / "annotations" / "captions_val.json", dict(
        licenses=[dict(id=1, name=f"{LICENCE} ({CHANGED})", url=LICENCE_URL)], images=images,
        annotations=[dict(id=i, image_id=number, caption=text)
                     for i, (number, text) in enumerate(CAPTIONS.items(), start=1)]))
    text = (f"# Credits\n\nSixteen photographs from COCO 2017, each under [{LICENCE}]({LICENCE_URL}) and {CHANGED} to "
            f"at most {SIDE} pixels on a side by `make.py`. COCO names the source of each, not the photographer. The "
            "captions are ours.\n\n| file | what is on it | source |\n|:--|:--|:--|\n" + "".join(credits))
    write_beside(HERE / "CREDITS.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"wrote {len(images)} photographs to {HERE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("data/photographs/make.py", main))
