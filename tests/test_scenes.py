"""The drawn scenes: what is on disk is what was drawn, what is written is true, and the judge can tell what is not."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from minblip2 import UserError
from minblip2.data import scene_captions, scene_dataset, scenes
from minblip2.data.coco import CocoCaptions
from minblip2.data.scene_captions import flip_relation, holds, judge, parse, swap_colours
from minblip2.data.scene_dataset import load_scenes
from minblip2.data.scenes import HELD_OUT, SHAPES, Scene, Thing
from minblip2.evaluation.scene_scores import evaluate_scenes
from minblip2.training.bridge import load_bridge
from minblip2.training.shipping import SHIPPED

SIZES = {"train": 300, "val": 40, "test": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    scene_dataset.write_scenes(folder, **SIZES, progress=False)
    return folder


@pytest.fixture(scope="module")
def captioned():
    """2,000 scenes, half of them with held-out pairs, each with its five captions."""
    streams = [random.Random(index) for index in range(2000)]
    drawn = [scenes.draw(rng, unseen=index % 2 == 1)[1] for index, rng in enumerate(streams)]
    return [(scene, scene_captions.write_captions(scene, rng)) for scene, rng in zip(drawn, streams, strict=True)]


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(folder, kind, split):
    return json.loads((folder / "annotations" / f"{kind}_{split}.json").read_text(encoding="utf-8"))


def scene_of(*things, background="grey"):
    """Things as (colour, shape, size, left, top)."""
    return Scene(tuple(Thing(c, s, size, (x, y, 12, 12)) for c, s, size, x, y in things), background)


TWO = scene_of(("red", "circle", "small", 4, 4), ("blue", "star", "large", 46, 26))  # top left, middle right


def test_same_seed_same_bytes_and_another_seed_other_images(folder, tmp_path):
    scene_dataset.write_scenes(tmp_path / "again", **SIZES, progress=False)
    scene_dataset.write_scenes(tmp_path / "other", **SIZES, seed=1, progress=False)
    first, again, other = hashes(folder), hashes(tmp_path / "again"), hashes(tmp_path / "other")
    assert first == again
    images = [name for name in first if name.endswith(".png")]
    assert len(images) == 380 and sum(first[name] == other[name] for name in images) == 0


def test_splits_hold_what_they_promise(folder):
    keys = []
    for split, size in SIZES.items():
        truth = load_scenes(folder, split)
        assert len(truth) == size == len(list((folder / "images").glob(f"{split}_*.png")))
        assert [image["unseen"] for image in read(folder, "captions", split)["images"]] == [s.unseen for s in truth]
        assert sum(scene.unseen for scene in truth) == (0 if split == "train" else size // 2)
        keys += [(s.background, frozenset((t.colour, t.shape, t.size, t.position) for t in s.things)) for s in truth]
    assert len(set(keys)) == sum(SIZES.values()), "the same scene was drawn twice"
    things = [thing for scene in load_scenes(folder, "train") for thing in scene.things]
    assert min(Counter(thing.colour for thing in things).values()) >= 0.5 * len(things) / len(scenes.COLOURS)
    assert min(Counter(thing.shape for thing in things).values()) >= 0.5 * len(things) / len(SHAPES)
    assert len(set(HELD_OUT)) == 8 and {colour for colour, _ in HELD_OUT} == set(scenes.COLOURS)


def test_coco_layout(folder):
    for split in SIZES:
        captions, instances = read(folder, "captions", split), read(folder, "instances", split)
        assert captions["images"] == instances["images"]
        for image in captions["images"]:
            assert {"id", "file_name", "width", "height", "unseen", "background"} == set(image)
            with Image.open(folder / "images" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (64, 64) and picture.mode == "RGB"
        known = {image["id"] for image in captions["images"]}
        texts = {image_id: set() for image_id in known}
        for annotation in captions["annotations"]:
            assert {"id", "image_id", "caption"} == set(annotation)
            texts[annotation["image_id"]].add(annotation["caption"])
        assert all(len(captions) == 5 for captions in texts.values()), "five different captions for every image"
        names = {category["id"]: category["name"] for category in instances["categories"]}
        for box in instances["annotations"]:
            assert names[box["category_id"]] == box["shape"] and box["image_id"] in known
            assert {"bbox", "area", "iscrowd", "colour", "size", "position"} <= set(box)
    every = [a["id"] for split in SIZES for a in read(folder, "captions", split)["annotations"]]
    assert len(set(every)) == len(every) == 5 * sum(SIZES.values())


def test_boxes_hold_exactly_the_drawn_pixels():
    for seed in range(300):
        image, scene = scenes.draw(random.Random(seed))
        drawn = (np.asarray(image) != scenes.BACKGROUNDS[scene.background]).any(-1)
        for thing in scene.things:
            x, y, width, height = thing.box
            inside = drawn[y : y + height, x : x + width]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any(), "box too large"
            colour = np.median(np.asarray(image)[y : y + height, x : x + width][inside], axis=0)
            distance = {name: np.abs(colour - value).sum() for name, value in scenes.COLOURS.items()}
            assert min(distance, key=distance.get) == thing.colour, "the box shows another colour than it says"
        total = np.zeros_like(drawn, dtype=int)
        for x, y, width, height in (thing.box for thing in scene.things):
            total[y : y + height, x : x + width] += 1
        assert total.max() == 1, "boxes overlap"
        assert not drawn[total == 0].any(), "something is drawn outside of every box"


def test_every_written_caption_is_judged_right(captioned):
    for scene, captions in captioned:
        for caption in captions:
            assert False not in judge(caption, scene).values(), (caption, scene)


def test_captions_are_varied_short_and_of_few_words(captioned):
    words, first_kind, first_thing = set(), Counter(), Counter()
    for scene, captions in captioned:
        claims = [parse(caption) for caption in captions]
        assert any(len(claim.positions) == len(scene.things) for claim in claims), "one tells every position"
        assert any(claim.relations for claim in claims) == (len(scene.things) > 1), "one tells a relation of two things"
        extras = [claim.positions + claim.relations + claim.backgrounds + claim.sizes for claim in claims]
        assert [] in extras, "one is plain"
        assert max(len(caption.replace(",", " ,").split()) for caption in captions) <= 28, "it fits the Q-Former's text"
        placed = sum(len(claim.positions) == len(scene.things) for claim in claims)
        assert placed >= 2 and any(claim.backgrounds for claim in claims), "most tell the places, one the background"
        first_kind[extras.index([])] += 1
        if len(scene.things) > 1:
            first_thing[claims[0].things[0] == claims[1].things[0]] += 1
        words |= {word for caption in captions for word in re.findall(r"[a-z]+|[^a-z ]", caption)}
    assert 30 <= len(words) <= 60 and "," in words
    assert min(first_kind[k] for k in range(5)) > 200, "the plain caption may stand anywhere"
    assert 0.1 < first_thing[False] / first_thing.total() < 0.5, "most name things as one reads, some in another order"


def test_nine_positions_and_four_relations_follow_the_drawing():
    names = ["top left", "top middle", "top right", "middle left", "middle", "middle right"]
    names += ["bottom left", "bottom middle", "bottom right"]
    for cell, name in enumerate(names):
        assert Thing("red", "circle", "small", (5 + 21 * (cell % 3), 5 + 21 * (cell // 3), 12, 12)).position == name
    for seed in range(300):  # an independent look at the boxes: the centres must differ clearly where a relation holds
        for one in (things := scenes.draw(random.Random(seed))[1].things):
            for other in things:
                right = (one.box[0] + one.box[2] / 2) - (other.box[0] + other.box[2] / 2)
                assert holds(one, "left of", other) == (right < -10) == holds(other, "right of", one)
                down = (one.box[1] + one.box[3] / 2) - (other.box[1] + other.box[3] / 2)
                assert holds(one, "above", other) == (down < -10) == holds(other, "below", one)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a red circle and a blue star", (True, None, None, None, None)),
        ("a blue star, a red circle", (True, None, None, None, None)),
        ("a red star and a blue circle", (False, None, None, None, None)),
        ("a red circle", (False, None, None, None, None)),
        ("a red circle and a blue star and a blue star", (False, None, None, None, None)),
        ("a red circle and a star", (False, None, None, None, None)),
        ("", (False, None, None, None, None)),
        ("top left a red circle and middle right a blue star", (True, True, None, None, None)),
        ("a red circle at the top left and a blue star at the middle left", (True, False, None, None, None)),
        ("at the top left is a red circle , a blue star", (True, True, None, None, None)),
        ("at the top is a red circle and a blue star", (True, False, None, None, None)),
        ("a red circle at the top left and a pink ring at the bottom left", (False, False, None, None, None)),
        ("a red circle is to the left of a blue star", (True, None, True, None, None)),
        ("left of a blue star is a red circle", (True, None, True, None, None)),
        ("right of a blue star there is a red circle", (True, None, False, None, None)),
        ("a blue star below a red circle", (True, None, True, None, None)),
        ("a red circle and a blue star left of", (True, None, False, None, None)),
        ("a red circle above a pink star", (False, None, False, None, None)),
        ("on a grey background there is a red circle and a blue star", (True, None, None, True, None)),
        ("a black background with a red circle and a blue star", (True, None, None, False, None)),
        ("a red background with a red circle and a blue star", (True, None, None, False, None)),
        ("we see a small red circle and a large blue star .", (True, None, None, None, True)),
        ("we see a small red circle and a small blue star", (True, None, None, None, False)),
    ],
)
def test_judge(caption, expected):
    keys = ("things", "positions", "relations", "background", "size")
    assert judge(caption, TWO) == dict(zip(keys, expected, strict=True))


def test_any_text_can_be_judged():
    words = "a red blue circle star left of right top middle and , above small grey background with Zebra 3".split()
    rng, claimed = random.Random(0), Counter()
    for length in range(2000):
        verdict = judge(" ".join(rng.choices(words, k=length % 25)), TWO)
        claimed.update(name for name, answer in verdict.items() if answer is not None)
    assert min(claimed.values()) > 50 and len(claimed) == 5


def test_foils_are_false_and_change_nothing_else(captioned):
    swapped, flipped, novel = 0, 0, 0
    for scene, captions in captioned:
        for caption in captions:
            if foil := swap_colours(caption):
                swapped += 1
                assert not judge(foil, scene)["things"], (caption, foil)
                assert Counter(re.sub(r"\ban\b", "a", foil).split()) == Counter(re.sub(r"\ban\b", "a", caption).split())
                novel += not scene.unseen and any(pair in HELD_OUT for pair in parse(foil).things)
            else:
                assert len({t.colour for t in scene.things}) == 1 or len({t.shape for t in scene.things}) == 1
            if foil := flip_relation(caption):
                flipped += 1
                verdict = judge(foil, scene)
                assert verdict["things"] and verdict["relations"] is False, (caption, foil)
    assert swapped > 5000 and flipped > 1500
    assert novel < 0.2 * swapped, "foils should be made of pairs that train has shown"
    assert swap_colours("an orange circle above a red star") == "a red circle above an orange star"
    assert flip_relation("a red circle left of a blue star") == "a red circle right of a blue star"
    assert swap_colours("a red circle and a red star") is None
    assert swap_colours("a red circle and a blue circle") is None
    assert swap_colours("a red circle") is None and flip_relation("a red circle at the top left") is None


def test_a_complete_folder_is_kept_and_an_incomplete_one_rebuilt(tmp_path):
    folder, small = tmp_path / "scenes", {"train": 6, "val": 2, "test": 2, "progress": False}
    scene_dataset.write_scenes(folder, **small)
    before, stamp = hashes(folder), (folder / "scenes.json").stat().st_mtime_ns
    scene_dataset.write_scenes(folder, **small)
    assert (folder / "scenes.json").stat().st_mtime_ns == stamp, "written again without need"
    (folder / "images" / "train_000003.png").unlink()
    scene_dataset.write_scenes(folder, **small)
    assert hashes(folder) == before
    scene_dataset.write_scenes(folder, **small | {"train": 9})
    assert len(load_scenes(folder, "train")) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_interrupted_run_leaves_no_folder_and_does_not_hinder_the_next(tmp_path, monkeypatch):
    folder, small = tmp_path / "scenes", {"train": 6, "val": 2, "test": 2, "progress": False}
    draw, drawn = scenes.draw, []

    def interrupted(rng, unseen=False):
        drawn.append(unseen)
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return draw(rng, unseen)

    monkeypatch.setattr(scene_dataset, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scene_dataset.write_scenes(folder, **small)
    assert not folder.exists()
    monkeypatch.undo()
    scene_dataset.write_scenes(folder, **small)
    assert len(load_scenes(folder, "train")) == 6 and [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_bad_use_is_told_in_one_sentence(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="not drawn scenes"):
        scene_dataset.write_scenes(tmp_path, train=1, val=1, test=1, progress=False)
    assert (tmp_path / "images" / "holiday.jpg").read_bytes() == b"mine"
    with pytest.raises(UserError, match="'val' was asked to hold 0"):
        scene_dataset.write_scenes(tmp_path / "new", val=0, progress=False)
    with pytest.raises(UserError, match="split 'tset'"):
        load_scenes(tmp_path, "tset")


def test_two_that_draw_at_once_do_not_disturb_each_other(tmp_path):
    code = (f"from minblip2.data.scene_dataset import write_scenes; write_scenes({str(tmp_path / 'scenes')!r}, "
            "train=300, val=40, test=40, progress=False)")
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(one.communicate()[1], one.returncode) for one in both] == [("", 0)] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 380


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("split", ["train", "val"])
def test_figures_of_what_no_scene_has_are_left_out(tmp_path, split):
    """No scene of a train split holds a held-out pair; and the one of val has one thing, so nothing to be swapped."""
    scene_dataset.write_scenes(tmp_path / "data", train=4, val=1, test=1, seed=6, progress=False)
    bridge, data = load_bridge(SHIPPED), CocoCaptions(tmp_path / "data", split)
    truths = load_scenes(data.root, split)
    found = evaluate_scenes(bridge, data, truths, bridge.features(data, tmp_path / "cache"))
    assert {"stage2_things_seen", "told_things_seen", "ask_count_seen", "pointing"} <= found.keys()
    assert not [name for name in found if "unseen" in name]
    pairs = split == "train"
    assert [len(scene.things) for scene in truths] == [1] or pairs
    assert ("binding" in found) == ("relation_choice" in found) == ("ask_relation_own" in found) == pairs
