"""The controls beside which photographs are measured: another picture's caption, the nearest picture's, halves."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest

from minblip2.commands import evaluate
from minblip2.evaluation import measure, metrics


def test_every_picture_gets_another_ones_caption():
    assert measure.of_next_picture(["a", "b", "c"]) == ["b", "c", "a"]


def test_the_nearest_training_picture_is_found_by_the_angle_of_its_first_token():
    train = SimpleNamespace(images=[SimpleNamespace(captions=(name, "other")) for name in "xyz"])
    known = np.array([[[9, 0], [0, 1]], [[0, 1], [9, 0]], [[-1, 0], [1, 1]]], dtype=np.float16)
    asked = np.array([[[0.1, 2], [9, 0]], [[1, 0.1], [0, 9]], [[-5, 1], [9, 9]]], dtype=np.float16)
    assert measure.nearest_captions(known, asked, train) == ["y", "x", "z"]


def test_halves_spread_as_whole_sets_do(monkeypatch):
    """The mean of n numbers, of which halves are drawn, has the standard error s / sqrt(n)."""
    values = np.random.default_rng(1).normal(size=400)
    monkeypatch.setattr(metrics, "cider_d", lambda texts, references: np.mean([values[int(text)] for text in texts]))
    captions = [str(i) for i in range(400)]
    found = measure.on_halves({"one": captions, "other": captions}, [[text] for text in captions], draws=2000)
    assert found["one"] == found["other"], "the same halves"
    assert np.std(found["one"]) == pytest.approx(values.std() / 20, rel=0.05)


def test_figures_that_are_not_there_are_left_out(tmp_path):
    """A weak bridge states no position, so there is no share of right ones: JSON has no nan."""
    path = measure.keep_results(tmp_path, "val", {"things": 50.0, "positions": float("nan"), "images": 3})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {"things": 50.0, "images": 3}


def test_figures_of_other_data_or_ways_stand_beside_the_usual_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_bridge", lambda *given: None)
    monkeypatch.setattr(evaluate, "measure_run", lambda folder, bridge, split, top, begun, data: {"top": top})
    for name in ("photos.v1", "photos.v2"):
        (tmp_path / name).mkdir()
    for data, top in ((None, None), (None, 1), ("photos.v1", None), ("photos.v2", None)):
        evaluate.run(argparse.Namespace(run=tmp_path, model=None, parts=None, split="val", top=top,
                                        data=data and tmp_path / data))
    assert {path.name for path in tmp_path.glob("results-*.json")} == {
        "results-val.json", "results-val-top-1.json", "results-val-of-photos.v1.json", "results-val-of-photos.v2.json"}
