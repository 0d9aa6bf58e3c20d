"""The drawn scenes on disk: images, captions and boxes in COCO layout, written once and read back as scenes."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tqdm import tqdm

from .. import UserError
from .files import write_folder
from .progress import progress_bar
from .scene_captions import write_captions
from .scenes import SHAPES, SIDE, VERSION, Scene, Thing, draw

SPLITS = ("test", "val", "train")  # in this order: train must give way where a scene would occur twice


def write_scenes(
    folder: str | Path, train: int = 6000, val: int = 500, test: int = 500, seed: int = 0, progress: bool = True
) -> None:
    """Write images/ and annotations/{captions,instances}_{split}.json unless they are there already; in val and test
    every second image holds a held-out pair. Raises UserError for a size below 1 or a folder with other files in it."""
    folder, sizes = Path(folder).resolve(), {"train": train, "val": val, "test": test}
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"The split {split!r} was asked to hold {size} images; give 1 or more.")
    settings = {"version": VERSION, **sizes, "seed": seed}
    if _complete(folder, settings):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = "scenes.json" in names and names <= {"images", "annotations", "scenes.json"}
    if folder.is_file() or (names and not ours):
        raise UserError(f"{folder} holds files that are not drawn scenes, so nothing was written; name another folder.")

    def write(beside: Path) -> None:
        (beside / "images").mkdir(parents=True)
        (beside / "annotations").mkdir()
        known: set[tuple] = set()
        with progress_bar(total=sum(sizes.values()), desc="drawing scenes", unit="image", hidden=not progress) as bar:
            for split in SPLITS:
                _write_split(beside, split, sizes[split], seed, known, bar)
        (beside / "scenes.json").write_text(json.dumps(settings), encoding="utf-8")

    write_folder(folder, write, lambda: _complete(folder, settings))


def _write_split(folder: Path, split: str, size: int, seed: int, known: set[tuple], bar: tqdm) -> None:
    """Draw one split; `known` holds the scenes of all splits so far, none of which is drawn again."""
    images, captions, boxes = [], [], []
    for index in range(size):
        rng, key = random.Random(f"{seed} {split} {index}"), None
        while key is None or key in known:
            image, scene = draw(rng, unseen=split != "train" and index % 2 == 1)
            things = frozenset((thing.colour, thing.shape, thing.size, thing.cell) for thing in scene.things)
            key = (scene.background, things)
        known.add(key)
        name, image_id = f"{split}_{index:06d}.png", SPLITS.index(split) * 10_000_000 + index
        image.save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE} |
                      {"unseen": scene.unseen, "background": scene.background})  # fmt: skip
        for k, caption in enumerate(write_captions(scene, rng)):
            captions.append({"id": image_id * 5 + k, "image_id": image_id, "caption": caption})
        for k, thing in enumerate(scene.things):
            coco = {"id": image_id * 3 + k, "image_id": image_id, "category_id": SHAPES.index(thing.shape) + 1,
                    "bbox": list(thing.box), "area": thing.box[2] * thing.box[3], "iscrowd": 0}  # fmt: skip
            more = {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "position": thing.position}
            boxes.append(coco | more)
        bar.update()
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    contents = {"captions": {"annotations": captions}, "instances": {"annotations": boxes, "categories": categories}}
    for kind, content in contents.items():
        path = folder / "annotations" / f"{kind}_{split}.json"
        path.write_text(json.dumps({"images": images, **content}), encoding="utf-8")


def _complete(folder: Path, settings: dict) -> bool:
    try:
        same = json.loads((folder / "scenes.json").read_text(encoding="utf-8")) == settings
        present = {path.name for part in ("images", "annotations") for path in (folder / part).iterdir()}
    except (OSError, ValueError):
        return False
    wanted = {f"{split}_{index:06d}.png" for split in SPLITS for index in range(settings[split])}
    wanted |= {f"{kind}_{split}.json" for kind in ("captions", "instances") for split in SPLITS}
    return same and present >= wanted


def load_scenes(folder: str | Path, split: str) -> list[Scene]:
    """The truth about a split, in the order of its captions file's images. Raises UserError when it cannot be read."""
    try:
        paths = [Path(folder) / "annotations" / f"{kind}_{split}.json" for kind in ("captions", "instances")]
        captions, instances = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        things: dict[int, list[Thing]] = {}
        for box in instances["annotations"]:
            thing = Thing(box["colour"], box["shape"], box["size"], tuple(box["bbox"]))
            things.setdefault(box["image_id"], []).append(thing)
        return [Scene(tuple(things[image["id"]]), image["background"]) for image in captions["images"]]
    except (OSError, ValueError, KeyError) as error:
        message = f"No drawn scenes of the split {split!r} can be read in {folder} ({error!r})"
        raise UserError(f"{message}; write them with write_scenes.") from error
