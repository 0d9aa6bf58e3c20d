"""The bridge that ships: it is small, it loads without training, it says what its results file says."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from minblip2 import UserError
from minblip2.data.coco import CocoCaptions
from minblip2.data.files import read_json
from minblip2.data.scene_dataset import load_scenes, write_scenes
from minblip2.evaluation.scene_scores import QUESTIONS, scene_accuracy, write_after
from minblip2.training import shipping
from minblip2.training.bridge import load_bridge
from minblip2.training.loop import read_log

LIMIT = 6e6  # bytes, of weights, logs and results together


def test_it_is_small_whole_and_in_half_precision():
    files = [path for path in shipping.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT and shipping.finished(shipping.SHIPPED)
    for part in shipping.PARTS:
        with safe_open(shipping.SHIPPED / part / "model.safetensors", framework="pt") as file:
            kinds = {file.get_tensor(name).dtype for name in file.keys()}
        assert kinds <= {torch.float16, torch.int64} and torch.float16 in kinds
        steps = [line["step"] for line in read_log(shipping.SHIPPED / part / "log.jsonl")]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1000
    assert read_json(shipping.SHIPPED / "run.json")["data"] is None, "no path of the machine that trained it"


def test_its_results_are_those_of_a_fresh_evaluation(tmp_path):
    write_scenes(tmp_path / "data", progress=False)
    bridge, kept = load_bridge(shipping.SHIPPED), read_json(shipping.SHIPPED / "results-val.json")
    data, truths = CocoCaptions(tmp_path / "data", "val"), load_scenes(tmp_path / "data", "val")
    features = torch.from_numpy(bridge.features(data, tmp_path / "cache").copy())
    written = write_after(bridge.blip2, features, QUESTIONS["things"])
    # Rounding differs from machine to machine, and now and then tips a word: one caption of 500 is 0.2 points.
    assert scene_accuracy(written, truths)["things"] == pytest.approx(kept["stage2_things"], abs=1.0)
    shuffled = scene_accuracy(written[2:] + written[:2], truths)["things"]
    assert shuffled == pytest.approx(kept["shuffled_things"], abs=1.0) and shuffled < 5 < kept["stage2_things"]


def test_a_caption_takes_seconds_where_nothing_was_trained(tmp_path):
    from PIL import Image, ImageDraw

    drawing = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(drawing).ellipse((24, 24, 40, 40), fill="red")
    drawing.save(tmp_path / "drawing.png")
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "minblip2", "caption", "drawing.png"], cwd=tmp_path, encoding="utf-8",
                          capture_output=True, env={"PYTHONPATH": str(shipping.SHIPPED.parents[2]), "PATH": ""})
    assert done.returncode == 0 and done.stdout.startswith("drawing.png: "), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawing.png"], "a caption leaves nothing behind"
    print(f"{time.perf_counter() - started:.1f} seconds")


def test_a_run_of_ones_own_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipping.usual_run() == shipping.SHIPPED
    copy = shipping.working_copy()
    assert copy.resolve() == tmp_path / "runs" / "shipped"
    assert shipping.run_checksum(copy) == shipping.run_checksum(shipping.SHIPPED)
    (copy / "stage2" / "model.safetensors").write_bytes(b"of another version")
    assert shipping.run_checksum(shipping.working_copy()) == shipping.run_checksum(shipping.SHIPPED), "copied again"
    shutil.copytree(shipping.SHIPPED, tmp_path / shipping.OWN)
    (tmp_path / shipping.OWN / "stage2" / "model.safetensors").unlink()
    assert shipping.usual_run() == shipping.SHIPPED, "what is not finished takes nobody's place"
    shutil.copy(shipping.SHIPPED / "stage2" / "model.safetensors", tmp_path / shipping.OWN / "stage2")
    assert shipping.usual_run() == shipping.OWN == shipping.working_copy()


def test_what_ships_can_be_shipped_again_and_an_unfinished_run_cannot(tmp_path):
    write_scenes(tmp_path / "data", progress=False)
    run = shutil.copytree(shipping.SHIPPED, tmp_path / "run")
    record = read_json(run / "run.json") | {"data": str(tmp_path / "data")}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    shipping.ship(run, tmp_path / "again")
    assert shipping.run_checksum(tmp_path / "again") == shipping.run_checksum(shipping.SHIPPED)
    (run / "stage2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no finished bridge"):
        shipping.ship(run, tmp_path / "more")
