"""What was trained is handed over whole: a folder that can be moved, and a card that tells what it is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minblip2 import UserError
from minblip2.data.coco import CocoCaptions
from minblip2.evaluation import handover
from minblip2.evaluation.handover import described, export_run, licence_of, write_card
from minblip2.evaluation.measure import evaluate_run
from minblip2.training.bridge import load_bridge
from minblip2.training.recipes import GPU, LAPTOP, SCENES
from minblip2.weights.hub import MODELS

from .test_bridge import cli, run  # noqa: F401
from .test_data import layout


def weights(bridge):
    return {f"{part}.{name}": tensor for part in ("stage1", "stage2") for name, tensor in
            getattr(bridge, part).state_dict().items()}


def squeezed(text):
    """A text without the blanks that fill the cells of its tables."""
    return re.sub(" +", " ", text)


def test_an_exported_run_is_the_run_wherever_it_lies(run, tmp_path, cli, monkeypatch):  # noqa: F811
    folder, bridge = run
    evaluate_run(folder, bridge, "val")
    code, out, _ = cli("export", folder, tmp_path / "new" / "mine")
    assert code == 0 and "model card" in out
    moved = Path(shutil.move(tmp_path / "new" / "mine", tmp_path / "moved"))
    found, expected = weights(load_bridge(moved)), weights(bridge)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    features = bridge.retriever.encode_images([picture])
    assert torch.equal(load_bridge(moved).retriever.encode_images([picture]), features)
    assert load_bridge(moved).blip2.caption(features) == bridge.blip2.caption(features)

    names = {path.relative_to(moved).as_posix() for path in moved.rglob("*") if path.is_file()}
    assert {"README.md", "run.json", "results-val.json", "stage1/model.safetensors", "vit/model.safetensors"} <= names
    assert not any("cache" in name or name.endswith((".part", ".pt", ".npy")) for name in names)
    for name in names:  # nothing in it tells where it was made
        if not name.endswith(".safetensors"):
            assert str(folder.parent) not in (moved / name).read_text(encoding="utf-8"), name

    card = squeezed((moved / "README.md").read_text(encoding="utf-8"))
    results = json.loads((folder / "results-val.json").read_text())
    for said in ("license: mit", "recipe `scenes`", f"{len(CocoCaptions(folder.parent / 'data', 'train')):,} pictures",
                 "4 steps of 32 pairs", f"| {results['itc_i2t_r1']:.1f} |", "## Limits", "were trained by the recipe"):
        assert said in card, said
    (moved / "results-old.json").write_text("{}")
    export_run(folder, moved)  # again, over itself: nothing stays of what lay there
    assert not (moved / "results-old.json").exists() and (moved / "results-val.json").exists()
    for target, said in ((folder, "is the run itself"), (folder / "stage1", "holds something else"),
                         (moved / "README.md", "holds something else")):
        with pytest.raises(UserError, match=said):
            export_run(folder, target)
    assert cli("export", tmp_path / "nowhere", tmp_path / "b")[0] == 2 and not (tmp_path / "b").exists()
    code, _, err = cli("export", folder, tmp_path / "b", "--data", tmp_path / "nowhere")
    assert code == 2 and "does not exist" in err and not (tmp_path / "b").exists()


def test_an_export_that_was_stopped_can_be_done_again(run, tmp_path, monkeypatch):  # noqa: F811
    written, kept = [], handover.write_beside

    def stop(path, write):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return kept(path, write)

    monkeypatch.setattr(handover, "write_beside", stop)
    with pytest.raises(KeyboardInterrupt):
        export_run(run[0], tmp_path / "new")
    monkeypatch.setattr(handover, "write_beside", kept)
    export_run(run[0], tmp_path / "new")
    assert load_bridge(tmp_path / "new").stage2 is not None


def test_an_unfinished_run_is_not_exported(run, tmp_path):  # noqa: F811
    shutil.copytree(run[0], tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "stage2")
    with pytest.raises(UserError, match="holds no finished stage2: run `python -m minblip2 train --recipe scenes"):
        export_run(tmp_path / "half", tmp_path / "out")


def test_cards_tell_the_licences_of_frozen_models(tmp_path, run):  # noqa: F811
    assert licence_of(SCENES) == "MIT" and "Apache" in licence_of(LAPTOP) and "research only" in licence_of(GPU)
    folder, bridge = run
    sections = dict(handover._trained(folder, replace(bridge, recipe=GPU), tmp_path)[1])
    for model in map(MODELS.get, GPU.models.values()):
        assert f"| {model.repository} | {model.revision} | {model.licence} |" in squeezed(sections["What it is"])
    assert "research only, and so may this bridge" in sections["What it is"] and "--parts" in sections["What it is"]
    assert "The data are not there any more" in sections["Data"]
    assert "4 steps of 32 pairs" in sections["Training"], "as it was trained, whatever the recipe plans"
    own = replace(LAPTOP, models=LAPTOP.models | {"encoder": "mine"})
    assert licence_of(own) == handover.UNKNOWN
    sections = dict(handover._trained(folder, replace(bridge, recipe=own), tmp_path)[1])
    assert "| encoder | mine | unknown | unknown: ask whoever made it |" in squeezed(sections["What it is"])
    write_card(tmp_path, "A title", licence_of(GPU), [("A", "b")])
    head = (tmp_path / "README.md").read_text().split("---")[1]
    assert "license: other\n" in head and f"license_name: {json.dumps(licence_of(GPU))}\n" in head


def test_one_picture_has_no_other_as_a_control():
    found = handover.caption_figures(["a dog"], [["a dog"]])
    assert "cider" in found and not any(name.startswith("shuffled") for name in found)
    assert "control" not in handover.figures_table({"before": found | {"pictures": 1, "loss": 1.0, "distinct": 1}})


def test_cards_count_the_licences_of_pictures(tmp_path):
    licences = [{"id": 1, "name": "CC BY", "url": "https://a.org/by"}, {"id": 2, "name": "CC BY-SA", "url": "https://b.org"}]
    content = {"licenses": licences, "images": [
        {"id": i, "file_name": f"{i}.png", "license": 1 + (i == 2), "flickr_url": f"https://f.org/{i}"}
        for i in range(3)],
        "annotations": [{"image_id": i, "caption": "x"} for i in range(3)]}
    text = squeezed(described(CocoCaptions(layout(tmp_path / "mine", content=content), "train")))
    assert "3 pictures with 3 captions" in text and "`mine`" in text
    assert "| CC BY, https://a.org/by | 2 |" in text and "| CC BY-SA, https://b.org | 1 |" in text
    for image in content["images"]:
        image.pop("license") if image["id"] else image.pop("flickr_url")
    text = squeezed(described(CocoCaptions(layout(tmp_path / "some", content=content), "train")))
    assert "| CC BY, https://a.org/by | 1 |" in text and "f.org" not in text
    bare = described(CocoCaptions(layout(tmp_path / "bare"), "train"))
    assert "names no licences" in bare
