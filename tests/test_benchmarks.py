"""What the benchmarks time is the same computation on both sides, and what they write can be read.

No time is judged.
"""

import copy
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import (
    bars,
    beginning,
    binding,
    cache,
    generate,
    gpu,
    growth,
    memory,
    provenance,
    retrieve,
    seeds,
    stage1,
    stage2,
    table,
    timing,
)
from benchmarks.ablations import known
from benchmarks.provenance import RESULTS
from benchmarks.seeds import OTHER_RECIPES, TRAINED_BY, trained_by
from benchmarks.timing import OURS
from minblip2 import UserError
from minblip2.attention import attend
from minblip2.data.files import read_json, write_json
from minblip2.data.scene_questions import KINDS
from minblip2.data.scenes import draw_scenes
from minblip2.data.transforms import Transform
from minblip2.lm.packed import PackedLinears
from minblip2.qformer import QFormerConfig
from minblip2.training import budget, recipes
from minblip2.training.binding import LOOK_BACK
from minblip2.training.recipes import LAPTOP, SCENES, Recipe
from minblip2.training.texts import lm_tokenizer
from minblip2.vit import ViT, ViTConfig

from .parity import randomise

TINY, VISUAL = stage1.SIZES["tiny"]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Results go to a folder of the test's own."""
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "benchmarks")
    return tmp_path / "benchmarks"


def well_formed(case, sides):
    """Medians, ratios and rounds of each side, and finite numbers only."""
    assert set(case["median"]) == set(case["work"]) == {OURS, *sides}
    assert set(case["ratio"]) == set(case["same"]) == set(sides)
    for each in (*case["median"].values(), *case["ratio"].values()):
        assert set(each) == {"wall", "cpu"} and all(math.isfinite(value) and value >= 0 for value in each.values())
    return json.loads(json.dumps(case))


# --- both sides compute the same --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return randomise(stage1.PlainStage1(TINY, savings=tuple(stage1.SAVINGS)), seed=1)


@pytest.mark.parametrize("form", ["plain", stage1.OFFICIAL, stage1.THEIRS, stage1.TRIMMED])
def test_stage1_has_equal_losses_and_gradients(model, form):
    """In float64, where rounding cannot be mistaken for another computation; logits are float32 before each loss."""
    image, *rest = stage1.example(TINY, VISUAL, 5, seed=3)
    model = copy.deepcopy(model).double()
    (agrees,) = stage1.agreement({OURS: model} | stage1.sides(model, [form]), (image.double(), *rest)).values()
    assert agrees["loss"] < 1e-6 and agrees["gradient"] < 1e-12


def test_another_computation_is_not_timed(model):
    other = copy.deepcopy(model)
    shared = stage1.sharing(model, ())
    other.label_smoothing = shared.label_smoothing = 0.2  # a small slip: only ITC and ITG change
    with pytest.raises(ValueError, match="loss: the two sides differ by"):
        stage1.agreement({OURS: model, "slip": shared}, stage1.example(TINY, VISUAL, 5))


def test_transformers_side_really_is_transformers(model, monkeypatch):
    """Each of the five calls of a step projects the image anew, and none reuses what another has computed."""
    seen = []
    theirs = stage1.composed(model)
    theirs.qformer.model.register_forward_pre_hook(
        lambda _, args, given: seen.append((tuple(args[0].shape[:2]), given["encoder_hidden_states"] is not None)),
        with_kwargs=True)
    image, ids, mask, negatives = stage1.example(TINY, VISUAL, 5)
    theirs(image, ids, mask, negatives=negatives)
    q = TINY.num_queries
    assert seen == [((5, q), True), ((5, 32), False), ((5, q + 32), True), ((15, q + 32), True)]


@pytest.mark.parametrize("lm", stage2.LMS)
def test_stage2_has_equal_losses_and_gradients(lm):
    models = stage2.pair("tiny", lm)
    agrees = stage2.agreement(models, stage2.batch_of(models, "tiny", 4, seed=2))
    assert agrees["loss"] < 1e-5 and agrees["gradient"] < 1e-5


@pytest.mark.parametrize("lm", stage2.LMS)
@pytest.mark.parametrize("beams", [1, 5])
def test_both_write_the_same_ids(lm, beams):
    models = stage2.pair("tiny", lm)
    image, *_ = stage1.example(TINY, VISUAL, 3)
    sides = generate.ways(models, image, beams, tokens=9)
    assert generate.agreement(sides) == "identical"
    assert all(count > 0 for count in timing.work(sides).values())
    assert sides[OURS](0).shape == (3, 9) and len(sides[OURS](0).unique()) > 1


def test_other_ids_are_noticed():
    written = {name: (lambda turn, ids=ids: torch.tensor([ids])) for name, ids in ((OURS, [3, 5]), ("other", [3, 4]))}
    with pytest.raises(ValueError, match="1 of 2 ids differ"):
        generate.agreement(written)


def test_reranking_scores_are_equal():
    case = retrieve.measure("tiny", candidates=40, visual=9, repeats=1)
    well_formed(case, [stage1.OFFICIAL, stage1.THEIRS])
    assert all(same["scores"] < 1e-5 for same in case["same"].values())


def test_reranking_projects_an_image_once(model, monkeypatch):
    layer, projected = model.qformer.cross_attentions[0], []
    original = layer.project
    monkeypatch.setattr(layer, "project", lambda context: projected.append(len(context)) or original(context))
    ids, mask = stage1.example(TINY, 1, 40)[1:3]
    image = torch.randn(1, 9, TINY.image_width)
    retrieve.ranked(model, image, ids, mask)
    assert projected == [1]
    retrieve.repeated(stage1.sharing(model, ()), image, ids, mask)
    assert projected == [1, 40]


def test_cached_features_give_the_loss_of_the_encoder(tmp_path):
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.png")
        Image.effect_noise((32, 28), 60 + 20 * i).convert("RGB").save(paths[-1])
    encoder = randomise(ViT(ViTConfig(image_size=28, width=24, layers=1, heads=2, mlp_width=32)))
    config = QFormerConfig(width=24, layers=2, heads=3, mlp_width=40, num_queries=4, image_width=24, vocab_size=60,
                           dropout=0.0)
    case = cache.measure(encoder, Transform(size=28), paths, config, batch=3, visual=4, repeats=1)
    well_formed(case, [cache.LOOP])


# --- what the tools do ------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_rounds_have_their_own_ratios():
    calls = []
    seconds = timing.interleave({OURS: lambda turn: calls.append((OURS, turn)),
                                 "other": lambda turn: calls.append(("other", turn))}, 3)
    assert calls == [(name, turn) for turn in (1, 2, 3) for name in (OURS, "other")]
    assert {len(rounds) for each in seconds.values() for rounds in each.values()} == {3}
    rounds = {OURS: [1.0, 2.0, 4.0], "other": [2.0, 6.0, 4.0]}
    case = timing.case({"wall": rounds, "cpu": rounds}, same={"other": {}})
    assert case["ratio"]["other"] == {"wall": 2.0, "cpu": 2.0} and case["median"][OURS]["cpu"] == 2.0


@pytest.mark.parametrize("copied", [False, True])
def test_arithmetic_is_counted_forwards_backwards_in_attention_and_in_packed_matrices(copied):
    layer = torch.nn.Linear(5, 7).requires_grad_(not copied)
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)

    def linear(turn):
        with PackedLinears(), torch.set_grad_enabled(not copied):
            out = layer(torch.ones(3, 5))
        if not copied:
            out.sum().backward()

    counted = timing.work({"linear": linear, "attention": lambda turn: attend(query, key, key)})
    assert counted["linear"] == 2 * 3 * 5 * 7 * (1 if copied else 2)
    assert counted["attention"] == 2 * (2 * 2 * 3 * 4 * 6 * 8)


def test_gradients_are_compared_by_name_and_on_their_own_scale():
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.1]), "x.key.bias": torch.tensor([1e-6])}
    theirs = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.11]), "x.key.bias": torch.tensor([2e-6])}
    assert timing.gradient_difference(ours, theirs) == pytest.approx(0.01 / 0.11, rel=1e-3)
    with pytest.raises(ValueError, match="only one side has a gradient for"):
        timing.gradient_difference(ours, {"a": ours["a"]})


def test_captions_have_cocos_lengths_and_batches_similar_ones():
    lengths = torch.stack(stage1.similar_lengths(8))
    assert 13 < lengths.float().mean() < 14.5
    within, overall = lengths.float().std(dim=1).mean(), lengths.float().std()
    assert within < 0.5 * overall


@pytest.mark.skipif(not hasattr(memory.ctypes, "CDLL") or not memory.sys.platform == "linux",
                    reason="memory is read from /proc")
def test_a_side_is_measured_in_its_own_process(monkeypatch):
    what = "stage 1, batch 4"
    found = memory.measure(what, "tiny", threads=1)
    assert set(found["bytes"]) == {OURS, stage1.THEIRS, stage1.OFFICIAL}
    assert all(value > 1e6 for value in found["bytes"].values())


@pytest.mark.parametrize("what", memory.WHAT)
@pytest.mark.parametrize("side", [OURS, memory.THEIRS])
def test_each_side_runs_alone(what, side):
    assert memory.build(what.replace("16", "3").replace("8", "3"), side, "tiny")(0) is None or "beams" in what


def test_growth_fits_exponents(tmp_path):
    assert growth.exponent([dict(value=x, seconds=3 * x**1.5) for x in (1, 2, 4)]) == pytest.approx(1.5)
    found = growth.measure("tiny", dict(batch=2, text=5, queries=4, visual=9),
                           dict(batch=[2, 3], text=[5, 6], queries=[3, 4], visual=[8, 9]), repeats=1)
    assert set(found["exponents"]) == {"batch", "text", "queries", "visual"}
    assert [point["value"] for point in found["queries"]] == [3, 4]
    json.dumps(found)


# --- the table --------------------------------------------------------------------------------------------------------


def test_results_of_several_calls_come_together_in_the_table(results):
    rounds = {clock: {OURS: [1.0, 2.0], "transformers": [3.0, 4.0]} for clock in timing.CLOCKS}
    agrees = {"transformers": {"loss": 1e-7, "gradient": 3e-6}}
    work = {OURS: 2000, "transformers": 2400}
    timing.keep("stage1", {"base, batch 8": timing.case(rounds, same=agrees, work=work)})
    timing.keep("stage1", {"base, batch 16": timing.case(rounds, same={"transformers": {"loss": 1e-7}}, work=work)})
    timing.keep("generate", {"greedy": timing.case(rounds, same={"transformers": {"ids": "identical"}}, work=work)})
    timing.store("memory", {"stage 1": {"bytes": {OURS: 10**9, "transformers": 2 * 10**9},
                                        "share": {"transformers": 0.5}}}, timing.machine())
    made = table.text(table.loaded(results))
    lines = [" ".join(line.split()) for line in made.splitlines()]
    assert "| stage-1 step: base, batch 8 (2) | transformers | 1.50 | 3.50 | 2.50 | 2.50 | 1.20 | 3e-6 |" in lines
    assert any("base, batch 16" in line and line.endswith("| 1e-7 |") for line in lines)
    assert any(line.endswith("| identical |") for line in lines)
    assert "| stage 1 | transformers | 1.00 | 2.00 | 0.50 |" in lines
    assert "float32" in lines[0] and "thread" in lines[0]


def test_without_results_the_table_says_what_to_run(results, capsys, monkeypatch):
    monkeypatch.setattr(table, "loaded", lambda: {})
    monkeypatch.setattr("sys.argv", ["table"])
    assert table.main() == 2 and "run python -m benchmarks.stage1" in capsys.readouterr().err


def test_noise_has_the_form_of_a_recipes_batches():
    batch = gpu.pairs(LAPTOP, 140, 8, 50, replace(LAPTOP.stage1, batch_size=6)).batch(0)
    assert batch.image_features.shape == (6, LAPTOP.keep_tokens,
                                          8) and batch.text_ids.max() < 49 and batch.text_mask.any(dim=1).all()


def test_the_papers_models_are_measured_at_their_sizes(tmp_path, monkeypatch):
    output = budget.estimate(gpu.MEASURED[gpu.PAPER], gpu.write_extra(tmp_path / "configs"))
    assert (output.tokens, output.width) == (257, 1408) and output.lm > 2.6e9 and output.encoder > 9.8e8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(UserError, match="no CUDA GPU"):
        gpu.main()


# --- seeds beside targets ---------------------------------------------------------------------------------------------


def test_targets_count_the_seeds_that_reach_them():
    columns = ("told", "seen", "another", "none", "guess")
    figures = {f"ask_{kind}_{column}": 100.0 for kind in seeds.KINDS for column in columns}
    figures |= dict.fromkeys(("stage2_things_seen", "stage2_things_unseen", "stage2_positions_of_right", "binding",
                              "stage2_size_of_right", "stage2_relations_of_right"), 95.0)
    worse = figures | {"ask_where_seen": 89.0, "ask_where_another": 60.0, "ask_where_guess": 54.0,
                       "ask_where_none": 50.0, "binding": 89.9, "ask_relation_told": 90.0}
    table = seeds.against_targets([{"results": figures}, {"results": worse}])
    rows = dict(row.strip("| ").split(" | ", 1) for row in map(lambda line: " ".join(line.split()), table.split("\n")))
    assert rows["asked of a picture, share of the ceiling: where"] == "94.5 (89.0 to 100.0) | ≥ 90 | 1 of 2"
    assert rows["another's picture above guessing: where"] == "3.0 (0.0 to 6.0) | ≤ 5 | 1 of 2"
    assert rows["told in text: relation"] == "95.0 (90.0 to 100.0) | ≥ 90 | 2 of 2"
    assert rows["binding: caption preferred to itself with colours swapped"].endswith("1 of 2")


def test_every_seed_reaches_the_bars_and_a_bridge_that_sees_nothing_does_not(tmp_path, monkeypatch, capsys):
    kept = [run["results"] for run in read_json(RESULTS / "seeds.json")["runs"]]
    asked = bars.bars(kept)
    assert len(asked) > 15 and {"stage2_things_unseen", "itc_t2i_r1", "ask_count_own"} <= asked.keys()
    blind = {name: max((kept[0][control] for control in controls), default=0)
             for name, controls in bars.CONTROLS.items()}
    write_json(tmp_path / "run.json", {"seed": 5})
    for figures, fails in [*((run, 0) for run in kept), (kept[0] | blind, 1), (kept[0] | {"pointing": 50.0}, 1)]:
        write_json(tmp_path / "results-test.json", figures)
        monkeypatch.setattr("sys.argv", ["bars", str(tmp_path)])
        assert bars.main() == fails, figures
        assert capsys.readouterr().out.count("not reached") == (len(asked) if figures["itc_t2i_r1"] == 0 else fails)


def test_a_bridge_is_trained_anew_once_code_or_pins_have_changed(tmp_path, monkeypatch):
    """Comments, docstrings and what has no part in it, a module or a value, do not count."""
    package = tmp_path / "bridges"
    package.mkdir()
    files = {"__init__": '"""Doc."""\n', "train": "from .parts import add\nimport torch\n\nrun = add(1)\nOTHER = 5\n",
             "parts": 'def add(x):\n    """Doc."""\n    return x + 1  # one\n', "other": "x = 1\n"}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    (tmp_path / "constraints.txt").write_text("torch==2\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)

    def changed(path, old, new):
        def sources():
            return provenance.sources("bridges.train", but=("bridges.train.OTHER", "bridges.parts.run"))

        before = sources()
        path.write_text(path.read_text().replace(old, new))
        return sources() != before

    assert not changed(package / "parts.py", "Doc", "Another") and not changed(package / "parts.py", "# one", "# two")
    assert not changed(package / "other.py", "1", "2") and not changed(package / "train.py", "5", "6")
    assert changed(package / "parts.py", "+ 1", "+ 2") and changed(package / "train.py", "add(1)", "add(2)")
    assert changed(tmp_path / "constraints.txt", "2", "3")


def test_recipes_that_the_scenes_do_not_use_are_no_reason_to_train_them_anew():
    """Every recipe but that of the scenes is left out by a name that stands for it."""
    named = {name.rpartition(".")[2] for name in OTHER_RECIPES}
    assert named == {name for name, value in vars(recipes).items() if isinstance(value, Recipe)} - {"SCENES"}
    assert provenance.sources(*TRAINED_BY) != trained_by()


def test_without_a_run_the_bars_say_whether_there_is_anything_to_try(monkeypatch, capsys):
    """Changed code is tried only where training begins otherwise with it."""
    kept = read_json(RESULTS / "seeds.json")
    other = copy.deepcopy(kept["beginning"])
    other["logs"]["lm"]["loss"][-1] *= 1.1
    for sources, begins, code, said in ((kept["sources"], None, 0, ""), ("other", kept["beginning"], 0, "as it did"),
                                        ("other", other, 1, "in lm: loss")):
        monkeypatch.setattr("sys.argv", ["bars"])
        monkeypatch.setattr(bars, "trained_by", lambda sources=sources: sources)
        monkeypatch.setattr(bars, "beginning", lambda begins=begins: begins)
        assert bars.main() == code and said in capsys.readouterr().out


def test_beginnings_differ_by_more_than_rounding():
    kept = read_json(RESULTS / "seeds.json")["beginning"]
    assert set(kept["logs"]) == set(beginning.PARTS)
    assert all(len(values) == beginning.STEPS for log in kept["logs"].values() for values in log.values())
    rounded = [1.01 * value for value in kept["logs"]["vit"]["loss"]]
    for what, change, found in (
            ("rounded", lambda one: one["logs"]["vit"].update(loss=rounded), []),
            ("another value", lambda one: one["logs"]["stage1"]["itm"].__setitem__(5, 0.9), ["stage1: itm"]),
            ("one more step", lambda one: one["logs"]["stage2"]["lr"].append(0.1), ["stage2: lr"]),
            ("a loss is gone", lambda one: one["logs"]["stage1"].pop("itg"), ["stage1: itg"]),
            ("other settings", lambda one: one.update(recipe="another"), ["recipe"])):
        changed = copy.deepcopy(kept)
        change(changed)
        assert beginning.differences(kept, changed) == found, what


# --- what a language model can do with text ---------------------------------------------------------------------------


def test_answers_about_told_scenes_are_counted_by_kind(monkeypatch):
    tokenizer, scenes = lm_tokenizer(), [scene for _, _, scene in draw_scenes(60, "told")]
    monkeypatch.setattr(binding.language, "written", lambda lm, tokenizer, contexts: ["yes"] * len(contexts))
    found = binding.told(None, tokenizer, scenes)
    assert set(found) == {*KINDS, *binding.SIDES} - {"relation"}
    assert found["count"] == found["where"] == 0 and all(20 < found[kind] < 80 for kind in ("exists", *binding.SIDES))

    def no_to_the_left(lm, tokenizer, contexts):
        return ["no" if "left of" in tokenizer.decode(context[-8:]) else "yes" for context in contexts]

    monkeypatch.setattr(binding.language, "written", no_to_the_left)
    other = binding.told(None, tokenizer, scenes)
    assert other["left, right"] != found["left, right"] and other["above, below"] == found["above, below"]


def test_a_language_model_that_has_its_line_is_not_asked_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["binding", "--look-back", "0", "1", "--seeds", "3", "--scenes", "2",
                                     "--steps", "1", "--out", str(tmp_path),
                                     "--results", str(tmp_path / "lines.jsonl")])
    binding.main()
    lines = known(tmp_path / "lines.jsonl")
    assert [(line["look_back"], line["seed"]) for line in lines] == [(0, 3), (1, 3)]
    assert capsys.readouterr().out.startswith("| readers")
    monkeypatch.setattr(binding.experts, "train_lm", None)
    binding.main()
    assert known(tmp_path / "lines.jsonl") == lines


def test_the_readers_of_the_recipe_are_among_those_compared():
    recipe = {"look_back": LOOK_BACK, "steps": SCENES.experts["lm"].steps}
    assert len([line for line in known(binding.RESULTS) if line | recipe == line]) >= 3, "a spread of seeds"


@pytest.mark.parametrize("words", [["--draw", "rand"], ["--size", "small"]], ids=str)
def test_a_mistyped_word_is_no_other_measurement(monkeypatch, words, capsys):
    monkeypatch.setattr(sys, "argv", ["stage1", *words])
    with pytest.raises(SystemExit, match="2"):
        stage1.main()
    assert f"invalid choice: '{words[1]}'" in capsys.readouterr().err
