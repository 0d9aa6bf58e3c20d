"""The ablations change what they say, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ablations, rates, warm_start
from minblip2.attention import MultiHeadAttention
from minblip2.data.scene_dataset import write_scenes
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1
from minblip2.training.bridge import train_bridge
from minblip2.training.recipes import SCENES, Recipe
from tests import spread_batch

TINY = QFormerConfig(width=16, layers=2, heads=2, mlp_width=32, num_queries=4, image_width=12, vocab_size=30,
                     dropout=0.0)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A run of a moment, as the folder whose experts the ablations take."""
    folder = tmp_path_factory.mktemp("runs")
    write_scenes(folder / "data", train=80, val=24, test=2, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        brief = {name: replace(config, steps=2) for name, config in SCENES.experts.items()}
        short = replace(SCENES, experts=brief, stage1=replace(SCENES.stage1, steps=2))
        patch.setattr(ablations, "SCENES", short)
        patch.setattr(ablations, "STEPS", 2)
        # Of a seed that no ablation is of: experts are those of their own run.
        train_bridge(short.with_seed(7), folder / "data", None, folder / "scenes", stages=1)
        yield folder / "scenes"


def lines_of(experts, results, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["ablations", *words, "--seeds", "0", "--experts-of", str(experts), "--results",
                                     str(results)])
    ablations.main()
    return [json.loads(line) for line in Path(results).read_text(encoding="utf-8").splitlines()]


def test_each_run_is_a_line_and_is_not_run_again(experts, tmp_path, monkeypatch):
    results = tmp_path / "lines.jsonl"
    for dropped in ("evaluate_questions", "captions_from_text", "flip_relation"):  # what no line keeps is not computed
        monkeypatch.delattr(f"minblip2.evaluation.scene_scores.{dropped}")
    lines = lines_of(experts, results, monkeypatch, "bridge")
    assert [line["name"] for line in lines] == list(ablations.GROUPS["bridge"])
    by_name = {line["name"]: line for line in lines}
    assert by_name["no stage 1"]["steps"] == [0, 2] and by_name[ablations.BASE]["steps"] == [2, 2]
    assert by_name["linear layer"]["parameters"] < by_name["MLP"]["parameters"] / 10
    assert by_name["MLP"]["parameters"] == pytest.approx(by_name[ablations.BASE]["parameters"], rel=0.02)
    tokens = by_name[ablations.BASE]["soft_tokens"]
    assert by_name["linear layer"]["soft_tokens"] > tokens == SCENES.qformer["num_queries"]
    assert {"stage2_things_seen", "itc_t2i_r1", "binding", "pointing"} <= set(lines[0]["results"])
    assert lines_of(experts, results, monkeypatch, "bridge") == lines
    again = lines_of(experts, results, monkeypatch, "bridge", "rates")
    assert again[:-1] == lines and again[-1]["name"] == "projection 10 times as fast"


def test_a_frozen_bridge_trains_its_projection_only(experts):
    recipe = replace(ablations.base(2, experts), frozen=True)
    backbones = recipe.build(recipe, None, None, experts)
    stage2 = recipe.new_stage2(backbones, recipe.new_stage1(backbones))
    assert {name.split(".")[0] for name, value in stage2.named_parameters() if value.requires_grad} == {"projection"}


def test_an_ablation_starts_stage_2_as_warm_as_its_recipe_says(experts):
    recipe = ablations.base(2, experts)
    backbones = recipe.build(recipe, None, None, experts)
    stage1, started = recipe.new_stage1(backbones), {}
    for share in (1.0, 0.5):
        warm = replace(recipe, warm_start=share)
        ours, recipes = (cls.new_stage2(warm, backbones, stage1).qformer.state_dict()
                         for cls in (ablations.Ablation, Recipe))
        assert all(torch.equal(value, recipes[name]) for name, value in ours.items())
        started[share] = ours["query_tokens"]
    assert torch.equal(started[1.0], stage1.qformer.query_tokens) and not torch.allclose(started[0.5], started[1.0])


def test_random_negatives_do_not_ask_how_similar(experts):
    torch.manual_seed(0)
    model, own = ablations.RandomNegatives(TINY, 8), torch.eye(8, dtype=torch.bool)
    itc_logits = 100 * torch.arange(8.0).expand(8, 8)  # hard negatives would be the last image nearly always
    drawn = torch.stack([model.sample_negatives(itc_logits, own)[1] for _ in range(300)])
    counts = torch.stack([(drawn == i).float().mean(dim=0) for i in range(8)])
    assert not counts.diagonal().any() and ((counts + torch.eye(8) / 7 - 1 / 7).abs() < 0.12).all()


def test_separate_self_attention_with_equal_weights_is_the_shared_one():
    torch.manual_seed(0)
    apart, shared = ablations.SeparateSelfAttention(TINY, 8).eval(), Stage1(TINY, 8).eval()
    twice = {}
    for name, value in shared.state_dict().items():
        for side in ("of_queries.", "of_text.") if ".self_attention." in name else ("",):
            twice[name.replace("self_attention.", f"self_attention.{side}")] = value
    apart.load_state_dict(twice)
    ids, mask = torch.randint(1, 29, (6, 7)), torch.arange(7) < torch.tensor([[7], [5], [6], [3], [7], [4]])
    batch = torch.randn(6, 5, 12), ids, mask, None, (torch.arange(6).roll(1), torch.arange(6).roll(2))
    for one, other in zip(apart(*batch)[:4], shared(*batch)[:4], strict=True):
        assert abs(one - other) < 1e-5
    layers = sum(isinstance(part, MultiHeadAttention) for part in apart.modules())
    assert layers == TINY.layers + sum(isinstance(part, MultiHeadAttention) for part in shared.modules())


def test_each_change_changes_one_thing():
    base = ablations.base(600, Path("runs/scenes"))
    for group, changes in ablations.GROUPS.items():
        assert ablations.BASE in changes, group
        for name, change in changes.items():
            changed = {key for key, value in vars(change(base)).items() if value != vars(base)[key]}
            assert (changed == set()) == (name == ablations.BASE), name
            assert len(changed - {"stage1", "stage2"}) <= 1, name


def test_a_warm_start_is_compared_with_the_whole_one_on_the_same_stage_1(tmp_path, monkeypatch):
    run, trained = tmp_path / "scenes", []
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"recipe": "scenes", "seed": 3, "data": "D", "parts": None}),
                                  encoding="utf-8")
    for part in ("vit", "lm", "stage1", "cache"):
        (run / part).mkdir()
    monkeypatch.setattr(warm_start, "train_bridge", lambda recipe, data, parts, out: trained.append(
        (recipe.warm_start, recipe.stage2.seed, out.name, (out / "stage1").resolve(), (out / "stage2").exists())))
    monkeypatch.setattr(warm_start, "evaluate_run", lambda out, bridge, split: {"stage2_things": 1.234, "images": 5})
    monkeypatch.setattr("sys.argv", ["warm_start", str(run), "--results", str(tmp_path / "lines.jsonl")])
    for _ in range(2):  # the second time nothing is missing
        warm_start.main()
    stage1 = (run / "stage1").resolve()
    assert trained == [(0.5, 3, "scenes", stage1, False), (1.0, 3, "scenes-1.0", stage1, False)]
    lines = ablations.known(tmp_path / "lines.jsonl")
    assert [(line["warm_start"], line["seed"], line["results"]) for line in lines] == [
        (0.5, 3, {"stage2_things": 1.23}), (1.0, 3, {"stage2_things": 1.23})]


def test_each_beginning_of_stage_2_is_tried_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "load_bridge", lambda run: None)
    monkeypatch.setattr(rates, "recorded_data", lambda run: run)
    monkeypatch.setattr(rates, "line", lambda bridge, data, cache, rate, loudness, steps:
                        {"rate": rate, "loudness": loudness, "steps": steps, "own": 3.0, "other": 3.1})
    for steps in (5, 5, 6):
        monkeypatch.setattr("sys.argv", ["rates", str(tmp_path), "--steps", str(steps), "--results",
                                         str(tmp_path / "lines.jsonl")])
        rates.main()
    lines = ablations.known(tmp_path / "lines.jsonl")
    assert [(line["rate"], line["loudness"], line["steps"]) for line in lines] == [
        (*way, steps) for steps in (5, 6) for way in rates.WAYS]


def test_louder_prompts_differ_more_around_the_same_middle():
    stage2, image = spread_batch.stage2(), spread_batch.whole_batch()[0]
    before = stage2.soft_prompt(image)
    rates.louder(stage2, image, 3)
    after, middle = stage2.soft_prompt(image), before.mean(dim=(0, 1))
    assert torch.allclose(after - middle, 3 * (before - middle), atol=1e-4)


def test_a_beginning_of_stage_2_is_measured(experts):
    bridge = train_bridge(ablations.SCENES.with_seed(7), experts.parent / "data", None, experts, stages=1)  # loads it
    found = rates.line(bridge, experts.parent / "data", experts / "cache", 1e-4, 2, steps=2)
    assert found["rate"] == 1e-4 and found["steps"] == 2 and 0 < found["own"] < 10 and 0 < found["other"] < 10
    assert bridge.stage2 is None, "the run itself is left as it was"
