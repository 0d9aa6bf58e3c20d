"""What lesson 15 shows of the photographs: marks, packed maps, and the file that is kept of one run."""

import re

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import ranking
from minblip2.course import photographs
from minblip2.course.lesson import DATA, RUN
from minblip2.data.coco import CocoCaptions
from minblip2.data.files import read_json
from minblip2.data.pictures import load_image
from minblip2.data.scene_captions import phrase
from minblip2.data.scene_dataset import load_scenes
from minblip2.evaluation.retrieval import evaluate_retrieval
from minblip2.training.bridge import load_bridge
from minblip2.training.recipes import LAPTOP


@pytest.fixture(scope="module")
def said():
    return photographs.kept()


def test_our_own_captions_name_every_subject_and_the_next_one_s_hardly_any():
    data = photographs.photographs()
    ours = [record.captions[0] for record in data.images]
    assert list(photographs.ASKED) == data.ids
    assert all(photographs.named(ours)) and sum(photographs.named([*ours[1:], *ours[:1]])) <= 2
    assert photographs.marked(ours)[0] == f"✓ {ours[0]}" and not any(photographs.named(["a category of hotdogs"] * 16))
    assert [photographs.subject(k) for k in (1, 7, 8, 12)] == ["dog", "cat", "cat or bird", "bus or car"]
    assert all(question.endswith("?") for question in photographs.QUESTIONS)


def test_what_is_kept_is_small_whole_and_says_where_it_is_from(said):
    assert photographs.KEPT.stat().st_size < 100_000
    assert re.fullmatch(r"[0-9a-f]{64}", said["checksum"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", said["date"])
    for name in ("captions", "alone", "answers", "answers_to_another", "answers_as_paper", "maps", "counted", "falls"):
        assert len(said[name]) == 16, name
    cosine, match = (torch.tensor(said[name]) for name in ("cosine", "match"))
    assert cosine.shape == match.shape == (16, 16) and 0 <= match.min() and match.max() <= 1
    assert [len(said["log"][stage]) for stage in ("stage1", "stage2")] == [photographs.POINTS] * 2
    assert said["checksum"][:12] in photographs.source(None) and said["date"] in photographs.source(None)


def test_maps_come_back_as_they_were_packed(said):
    maps = photographs.unpacked(said["maps"])
    assert maps.shape == (16, 16, 16) and torch.equal(maps.amax(dim=(1, 2)), torch.ones(16))
    assert photographs.packed(3 * maps) == said["maps"]
    assert isinstance(photographs.maps_over(maps, ["a title"] * 16), Figure)
    assert isinstance(photographs.sheet(said["captions"], alone=said["alone"]), Figure)


def test_a_run_of_one_s_own_answers_unless_outputs_are_made_for_others(monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "RUN", tmp_path)
    monkeypatch.setattr(photographs, "load_bridge", lambda run: f"the bridge in {run}")
    monkeypatch.delenv("MINBLIP2_DRAWN_ONLY", raising=False)
    assert photographs.laptop_bridge() is None
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "model.safetensors").touch()
    assert photographs.laptop_bridge() == f"the bridge in {tmp_path}"
    monkeypatch.setenv("MINBLIP2_DRAWN_ONLY", "1")
    assert photographs.laptop_bridge() is None


def test_cutting_out_what_a_map_shows_costs_more_than_cutting_at_random():
    bridge, data, truths = load_bridge(RUN), CocoCaptions(DATA, "val"), load_scenes(DATA, "val")
    features = bridge.retriever.encode_images([load_image(path) for path in data.paths[:60]])
    texts = [phrase(truth.things[0].colour, truth.things[0].shape) for truth in truths[:60]]
    falls = photographs.cut_out(bridge, features, texts)
    assert falls.shape == (60, 2) and falls[:, 0].mean() > falls[:, 1].mean()


def test_curves_are_thinned_to_means():
    log = [{"step": step, "loss": float(step), "lr": 0.1} for step in range(1, 101)]
    thin = photographs.thinned(log, ("loss",))
    assert len(thin) == photographs.POINTS and thin[0] == {"step": 1.5, "loss": 1.5} and thin[-1]["loss"] == 99.5


def test_the_weight_of_matching_is_chosen_among_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(ranking, "RESULTS", tmp_path)
    monkeypatch.setattr(ranking, "CocoCaptions", lambda root, split: CocoCaptions(root, split, limit=24))
    monkeypatch.setattr("sys.argv", ["ranking", str(RUN), "--split", "val"])
    assert ranking.main() == 0
    measured = read_json(tmp_path / "ranking.json")
    assert measured["pictures"] == 24 and [row["weight"] for row in measured["rows"]] == list(ranking.WEIGHTS)
    bridge, data = load_bridge(RUN), CocoCaptions(DATA, "val", limit=24)
    pairs = [(row, text) for row, record in enumerate(data.images) for text in record.captions[:ranking.EACH]]
    alone = evaluate_retrieval(bridge.retriever, [load_image(path) for path in data.paths],
                               [text for _, text in pairs], [row for row, _ in pairs])
    for way in ("i2t_r1", "t2i_r1"):
        lavis, none = measured["rows"][0], measured["rows"][1]
        assert lavis["weight"] is None and lavis[way] == pytest.approx(alone[f"itm_{way}"], abs=5)
        assert none["weight"] == 0 and none[way] == pytest.approx(alone[f"itc_{way}"], abs=5)


def test_the_recipe_s_weight_is_the_best_of_those_that_were_kept():
    rows = read_json(ranking.RESULTS / "ranking.json")["rows"]
    best = max(rows, key=lambda row: sum(value for key, value in row.items() if key != "weight"))
    assert best["weight"] == LAPTOP.match_weight


def test_one_call_shows_the_photographs_with_what_was_said_and_whose_they_are(monkeypatch, said):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda what, raw=False: shown.append(what))
    photographs.show_said()
    figure, credits = shown
    right = sum(photographs.named(said["captions"]))
    assert f"{right} captions name the subject" in figure["text/plain"] and "image/jpeg" in figure["text/html"]
    assert credits.data.count("CC BY 2.0 (resized)") == 16 and credits.data.count("flickr") == 16
