"""The whole road on a handful of scenes, the command line, and what it says to input that cannot be used."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minblip2 import UserError, __main__
from minblip2.commands.evaluate import print_figures
from minblip2.course.lesson import ROOT
from minblip2.data import scene_questions
from minblip2.data.batches import Batch
from minblip2.data.coco import CocoCaptions
from minblip2.data.features import weights_checksum
from minblip2.data.pictures import load_image
from minblip2.data.scene_dataset import load_scenes, write_scenes
from minblip2.data.scenes import BACKGROUNDS, COLOURS, HELD_OUT, SEEN, SHAPES, SIZES, draw_scenes
from minblip2.data.tokenizer import normalize_caption
from minblip2.device import autocast
from minblip2.evaluation import asking, grounding, measure
from minblip2.training import experts
from minblip2.training.bridge import load_bridge, train_bridge
from minblip2.training.checks import check_run
from minblip2.training.loop import train
from minblip2.training.recipes import RECIPES, find_recipe, shrink_and_perturb
from minblip2.training.records import recorded_data, write_record
from minblip2.training.stages import prompt_and_target
from minblip2.vit import to_grid

from .short_recipe import SHORT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A bridge that was trained for a moment, as (folder of the run, bridge)."""
    folder = tmp_path_factory.mktemp("runs")
    write_scenes(folder / "data", train=80, val=24, test=24, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "scenes", SHORT)
        # under another seed than the recipe's own: whoever loads it must know
        yield folder / "scenes", train_bridge(SHORT.with_seed(3), folder / "data", None, folder / "scenes")


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process: returns (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["minblip2", *map(str, words)])
        code = __main__.main()
        return code, *capsys.readouterr()

    return call


class Words:
    """A tokenizer whose words are digits, for a decoder or, with `prompt_end`, for an encoder."""

    def __init__(self, start, prompt_end):
        self.bos_ids, self.prompt_end, self.eos_id = start, prompt_end, 9

    def encode_prompt(self, prompt):
        return [*self.bos_ids, *map(int, prompt), *self.prompt_end]


@pytest.mark.parametrize("start, prompt_end, prompt, given", [
    ([1], [], "", [1]), ([1], [], "23", [1, 2, 3]), ([], [], "", []), ([], [9], "23", [2, 3, 9])], ids=str)
def test_a_text_is_divided_into_what_is_given_and_what_is_learned(start, prompt_end, prompt, given):
    row = [*start, *map(int, prompt), 5, 6, 7, 9]
    ids = torch.tensor([row, [*row[:-2], 9, 0]])
    batch = Batch(torch.zeros(2, 1, 1), ids, torch.tensor([[True] * len(row), [True] * (len(row) - 1) + [False]]),
                  torch.arange(2))
    prompt_ids, prompt_mask, text_ids, text_mask = prompt_and_target(batch, Words(start, prompt_end), prompt)
    assert prompt_ids.tolist() == [given, given] and prompt_ids.dtype == torch.long and prompt_mask.all()
    assert [i[m].tolist() for i, m in zip(text_ids, text_mask, strict=True)] == [[5, 6, 7, 9], [5, 6, 9]]


def test_an_encoder_without_a_prompt_is_given_the_beginning_of_the_text():
    ids = torch.tensor([[4, 5, 6, 7, 9]] * 50)
    batch = Batch(torch.zeros(50, 1, 1), ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(50))
    prompt_ids, prompt_mask, text_ids, text_mask = prompt_and_target(batch, Words([], [9]), "")
    seen = {(*prompt_ids[i, prompt_mask[i]].tolist(), 0, *text_ids[i, text_mask[i]].tolist()) for i in range(50)}
    assert seen == {(4, 9, 0, 5, 6, 7, 9), (4, 5, 9, 0, 6, 7, 9)}


def test_the_frozen_stay_frozen(run):
    folder, bridge = run
    fresh = experts.train_vit(folder / "vit", bridge.recipe.experts["vit"])
    assert weights_checksum(bridge.backbones.encoder) == weights_checksum(fresh)
    assert not any(parameter.requires_grad for part in (bridge.backbones.encoder, bridge.backbones.lm)
                   for parameter in part.parameters())
    assert not bridge.stage2.train().lm.training


def test_a_loaded_bridge_is_the_trained_one(run):
    folder, bridge = run
    loaded = load_bridge(folder)
    for one, other in ((bridge.stage1, loaded.stage1), (bridge.stage2, loaded.stage2)):
        assert weights_checksum(one) == weights_checksum(other)


def test_captions_and_maps_of_a_picture_of_any_size(run, tmp_path, cli):
    folder, _ = run
    image = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 333, 3), dtype=np.uint8)).save(image)
    for extra in ([], ["--stage1"], ["--top-p", "0.9"], ["--prompt", "a picture of"]):
        code, out, _ = cli("caption", "--run", folder, *extra, image)
        assert code == 0 and out.startswith(f"{image}: ")
    code, _, err = cli("attend", "--run", folder, "--to", tmp_path / "map.png", image, "a red circle", "a blue star")
    assert code == 0 and "unknown" not in err and Image.open(tmp_path / "map.png").width > 300
    code, out, _ = cli("retrieve", "--run", folder, "--show", 3, "a red circle")
    assert code == 0 and out.count("images") == 3 and out.startswith("  match  cosine")
    code, out, _ = cli("retrieve", "--run", folder, "--show", 3, "--top", 2, "a red circle")
    assert code == 0 and out.count("images") == 2, "only what matching has ranked has a match"


@pytest.mark.parametrize("words", [("retrieve", "a red dog on a blue Car"),
                                   ("attend", "--to", "{to}.png", "{to}", "a red dog", "a blue Car")])
def test_words_that_nothing_is_known_of_are_told(run, tmp_path, cli, words):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    command, *rest = (word.format(to=tmp_path / "red.png") for word in words)
    code, _, err = cli(command, "--run", run[0], *rest)
    assert code == 0 and err.strip().endswith("unknown words, read as one and the same: Car, dog")


def test_a_map_takes_nothing_else_s_place(run, tmp_path, cli):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "red.png")
    (tmp_path / "folder.png").mkdir()
    before = (tmp_path / "red.png").read_bytes()
    for to in ("red.png", "link.png", "folder.png", "map.jpg", "/dev/null"):
        code, _, err = cli("attend", "--run", run[0], "--to", tmp_path / to, tmp_path / "red.png", "a red circle")
        assert code == 2 and "--to" in err and err.count("\n") == 1, to
    assert (tmp_path / "red.png").read_bytes() == before and Path("/dev/null").is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_where_nothing_can_be_written_it_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "minblip2", "caption", str(tmp_path / "red.png")]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "minblip2: the output: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=ROOT)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""
    attend = ["attend", str(tmp_path / "red.png"), "a circle", "--to", str(tmp_path / "red.png" / "a.png")]
    done = subprocess.run([*command[:3], *attend], capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "red.png" in done.stderr
    assert not list(tmp_path.rglob("*.part"))


def test_a_draw_follows_its_seed(run, tmp_path, cli):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    said = [cli("caption", "--run", run[0], "--top-p", 1, "--seed", seed, tmp_path / "red.png")[1]
            for seed in (0, 1, 2, 0)]
    assert said[0] == said[3] and len(set(said)) == 3


def test_a_warm_start_keeps_a_share_and_fills_up_with_fresh_values():
    torch.manual_seed(0)
    model = torch.nn.Linear(400, 300)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    shrink_and_perturb(model, 0.75, init_std=0.4)
    added = model.weight.detach() - 0.75 * before["weight"]
    assert torch.equal(model.bias, before["bias"]), "no matrix"
    assert abs(added.mean()) < 0.001 and abs(added.std() - 0.25 * 0.4) < 0.001
    assert abs(torch.corrcoef(torch.stack([added.flatten(), before["weight"].flatten()]))[0, 1]) < 0.02


def test_stage_2_starts_as_warm_as_the_recipe_says(run):
    _, bridge = run
    for share, same in ((1.0, True), (0.5, False)):
        recipe = replace(bridge.recipe, warm_start=share)
        begun = recipe.new_stage2(bridge.backbones, bridge.stage1).qformer.blocks[0].self_attention
        trained = bridge.stage1.qformer.blocks[0].self_attention
        assert torch.equal(begun.query.weight, trained.query.weight) == same
        assert torch.equal(begun.query.bias, trained.query.bias)


@pytest.mark.parametrize("part", ["vit", "lm", "stage1"])
def test_a_run_that_lacks_a_part_is_refused_and_not_trained(run, tmp_path, part):
    shutil.copytree(run[0], tmp_path / "half")
    (tmp_path / "half" / part / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"half holds no finished {part}: run `python -m minblip2 train --recipe scen"):
        load_bridge(tmp_path / "half")
    assert not (tmp_path / "half" / part / "model.safetensors").exists()


def test_evaluate_keeps_what_it_prints(run, cli):
    folder, _ = run
    code, out, _ = cli("evaluate", "--run", folder, "--split", "test")
    results = json.loads((folder / "results-test.json").read_text(encoding="utf-8"))
    assert code == 0 and results["images"] == 24 and f"{folder / 'results-test.json'}" in out
    for key in ("images", "pointing_chance", "stage2_things_unseen"):
        value = results[key] if isinstance(results[key], int) else f"{results[key]:.1f}"
        assert re.search(rf"^{re.escape(measure.LABELS[key])} +{value}$", out, re.MULTILINE), key
    assert 0 < results["pointing_chance"] < 50 and results["seconds_stage1"] > 0
    assert {"itc_t2i_r1", "itm_i2t_r1", "stage2_things_seen", "shuffled_things", "binding"} <= set(results)
    for kind in scene_questions.KINDS:
        figures = " +".join(f"{results[f'ask_{kind}_{column}']:.1f}" for column in asking.COLUMNS)
        assert re.search(rf"^{kind} +{figures}$", out, re.MULTILINE), kind


def test_a_question_is_put_as_the_language_model_learned_it_and_unknown_words_are_named(run, cli, tmp_path):
    _, bridge = run
    image = load_image(CocoCaptions(run[0].parent / "data", "val").images[0].path)
    plain = bridge.blip2.generate(image, "question what colour is the star answer", max_length=10, min_length=1)
    assert bridge.blip2.ask(image, "What colour is the star?") == plain[0]
    image.save(tmp_path / "drawing.png")
    questions = ["what colour is the dog?", "where is the star?"]
    code, out, err = cli("ask", "--run", run[0], tmp_path / "drawing.png", *questions)
    assert code == 0 and len(out.splitlines()) == 2 and out.startswith("what colour is the dog? ")
    assert err == "minblip2: unknown words, read as one and the same: dog\n"


def test_without_a_picture_the_language_model_reads_text_alone(run):
    """Its first word is the one that the language model itself finds likeliest; the bridge stays as it was."""
    blip2, prompt = run[1].blip2, "question how many things are there answer"
    images = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0))
    before = blip2.stage2.soft_prompt(images)
    written = asking.without_picture(blip2).generate(images, prompt, max_length=1, min_length=1)
    lm, tokenizer = run[1].backbones.lm, run[1].backbones.lm_tokenizer
    ids, mask = tokenizer.pad([tokenizer.encode_prompt(prompt)])
    with torch.no_grad(), autocast(blip2.device, blip2.precision):
        logits = lm.lm_logits(lm.prefill(lm.embed(ids), mask, lm.new_cache())[0])
    logits[:, tokenizer.eos_id] = -torch.inf
    assert written == [tokenizer.decode(logits.argmax(dim=1))] * 3
    assert before.shape == (3, 16, 128) and torch.equal(blip2.stage2.soft_prompt(images), before)


def test_reranking_scores_are_logit_plus_cosine_and_order_matters_only_on_top(run, monkeypatch):
    _, bridge = run
    data = CocoCaptions(run[0].parent / "data", "val")
    features = torch.from_numpy(np.array(bridge.features(data, run[0] / "cache")))[:6]
    captions = [record.captions[0] for record in data.images[:5]]
    retriever = bridge.retriever
    cosine = retriever.similarity(features, captions)
    i2t, t2i = (retriever.rerank(features, captions, cosine, top=2, dim=dim) for dim in (1, 0))
    seen = [torch.zeros_like(cosine, dtype=torch.bool).scatter(dim, cosine.topk(2, dim=dim).indices, True)
            for dim in (1, 0)]
    for scores, best in zip((i2t, t2i), seen, strict=True):
        assert scores[~best].max() < scores[best].min() and torch.equal(
            scores[~best].argsort(), cosine[~best].argsort()), "the others below, as ITC has them"
    image, text = (int(i) for i in seen[0].nonzero()[0])
    ids, mask = retriever.text_ids([captions[text]])
    with torch.no_grad(), autocast(bridge.device):
        logit = bridge.stage1.itm_logits(bridge.stage1.image_kv(features[image : image + 1].float()), ids, mask)[0, 1]
    assert i2t[image, text] == pytest.approx(float(logit + cosine[image, text]), abs=2e-2)
    retriever.match_weight = 0.0  # the order of ITC alone, among the best
    alone, none = retriever.rerank(features, captions, cosine, 2, 1), ~seen[0]
    assert torch.allclose(alone[~none] * float(bridge.stage1.temperature.detach()), cosine[~none], atol=1e-4)
    retriever.match_weight = 0.5
    margin = (retriever.rerank(features, captions, cosine, 2, 1) - alone)[~none]
    chance = retriever.match(features, captions)[~none]
    assert torch.allclose(torch.sigmoid(2 * margin), chance, atol=2e-2), "twice half of match - no match"
    monkeypatch.setattr(bridge.stage1.temperature, "data", torch.tensor(0.001))  # scores of hundreds, of both signs
    cold = retriever.rerank(features, captions, cosine - 1, 2, 1)
    assert cold[~none].max() < -100 and cold[none].max() < cold[~none].min()


def test_maps_are_positive_and_each_texts_own(run):
    """A text alone has the map that it has in a batch, beside padding; the queries' own maps each sum to one."""
    _, bridge = run
    stage1 = bridge.stage1.eval()
    image = torch.randn(2, 64, 128)
    ids, mask = bridge.retriever.text_ids(["a red circle", "a blue star and a pink ring"])
    heat = stage1.match_map(image, ids, mask)
    assert heat.shape == (2, 64) and (heat >= 0).all() and heat.sum() > 0
    alone = stage1.match_map(image[:1], ids[:1, : int(mask[0].sum())], mask[:1, : int(mask[0].sum())])
    assert torch.allclose(heat[:1], alone, atol=1e-6, rtol=1e-3)
    maps = grounding.query_maps(stage1, image)
    assert maps.shape == (2, 2, 16, 64) and torch.allclose(maps.sum(dim=-1), torch.ones(2, 2, 16), atol=1e-5)
    assert to_grid(torch.arange(10.0), class_token=True).tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_patch_labels_name_what_covers_each_patch(run):
    for scene in load_scenes(run[0].parent / "data", "val"):
        labels = experts.patch_labels(scene, grid=8, side=64)
        assert (labels[..., 5] == list(BACKGROUNDS).index(scene.background)).all()
        for thing in scene.things:
            x, y, w, h = thing.box
            here = labels[int((y + h / 2) / 8), int((x + w / 2) / 8)]
            assert here[0] == list(COLOURS).index(thing.colour) and here[1] == SHAPES.index(thing.shape)
            assert here[2] == list(SIZES).index(thing.size)
            assert here[3:5].tolist() == [int((y + h / 2) * 3 / 64), int((x + w / 2) * 3 / 64)]
        covered = sum(w * h for _, _, w, h in (thing.box for thing in scene.things)) / 64**2
        assert (labels[..., 0] >= 0).mean() == pytest.approx(covered, abs=0.12)


def test_the_vit_knows_every_pair_of_colour_and_shape():
    pictured = {(thing.colour, thing.shape) for _, _, scene in draw_scenes(400, "0 picture") for thing in scene.things}
    assert pictured == {*SEEN, *HELD_OUT}
    batch = next(experts.SceneImages(16, seed=0, scenes=16).iterate())
    assert batch.pixels.shape == (16, 3, 64, 64) and batch.labels.shape == (16, 8, 8, 6)


@pytest.mark.parametrize("words, said", [
    (["train", "--recipe", "desktop"], "there is no recipe 'desktop': choose one of scenes, laptop, gpu"),
    (["train", "--recipe", "laptop"], "name a folder in COCO layout with --data"),
    (["caption", "--run", "{tmp}/nothing", "{photo}"], "holds no trained bridge: run `python -m minblip2 train --out"),
    (["caption", "--run", "{tmp}/laptop", "{photo}"], "train --recipe laptop --out"),
    (["caption", "--run", "{run}", "{tmp}/absent.jpg"], "absent.jpg cannot be read"),
    (["caption", "--run", "{run}", "{empty}"], "empty.jpg cannot be read"),
    (["caption", "--run", "{run}", "{run}/stage1"], "holds no pictures"),
    (["caption", "--run", "{run}", "{tmp}/*.tiff"], "nothing is called like"),
    (["ask", "--run", "{run}", "{tmp}", "?"], "it is a folder"),
    (["caption", "--run", "{run}", "{run}/run.json"], "none of JPEG, PNG"),
    (["caption", "--model", "{tmp}/nothing", "{photo}"], "nothing: fetch a model with"),
    (["evaluate", "--run", "{run}", "--split", "train2014"], "no split 'train2014'"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(run, cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)  # whatever runs there are in the repository
    photo, empty = tmp_path / "photo.png", tmp_path / "empty.jpg"
    Image.new("RGB", (64, 64)).save(photo)
    empty.write_bytes(b"")
    before = sorted(path for path in run[0].rglob("*"))
    code, out, error = cli(*(w.format(tmp=tmp_path, run=run[0], photo=photo, empty=empty) for w in words))
    assert code == 2 and out == "" and said in error and error.count("\n") == 1
    assert sorted(path for path in run[0].rglob("*")) == before


@pytest.mark.parametrize("option, value", [("--beams", "0"), ("--max-length", "0"), ("--top-p", "2"), ("--top-p", "x")])
def test_numbers_out_of_range_are_refused(option, value, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["minblip2", "caption", option, value, "photo.png"])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert f"argument {option}: '{value}' is no" in capsys.readouterr().err


def test_a_run_of_another_recipe_is_refused(run, tmp_path, monkeypatch, cli):
    copy = tmp_path / "scenes"
    shutil.copytree(run[0], copy)
    code, _, error = cli("train", "--out", copy, "--data", run[0].parent / "data", "--seed", 1)
    assert code == 2 and "holds a run with --seed 3, not 1" in error
    monkeypatch.setitem(RECIPES, "scenes", replace(SHORT, qformer=SHORT.qformer | {"num_queries": 4}))
    code, _, error = cli("caption", "--run", copy, next((run[0].parent / "data" / "images").iterdir()))
    assert code == 2 and "belongs to another recipe" in error


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run that a test may spoil; its data are where they were."""
    return shutil.copytree(run[0], tmp_path / "copy")


def test_a_run_that_is_refused_is_still_what_it_was(run, copied, tmp_path, cli):
    """Its record stays true, or it would be measured on data that it has not been trained on."""
    data = run[0].parent / "data"
    write_scenes(tmp_path / "other", train=30, val=4, test=4, seed=1, progress=False)
    record, before = json.loads((copied / "run.json").read_text(encoding="utf-8")), contents(copied)
    for words, said in ((("--data", data), "--seed 3, not 0"),
                        (("--data", data, "--seed", 3, "--batch-size", 8), "--batch-size 32, not 8"),
                        (("--data", tmp_path / "other", "--seed", 3), f"trained on {data}, not on {tmp_path}")):
        code, out, err = cli("train", "--out", copied, *words)
        assert code == 2 and said in err and "--out, or train anew with --restart" in err and err.count("\n") == 1
        assert out == "" and contents(copied) == before, words
    with pytest.raises(UserError, match="trained with other settings"):  # who does not ask first is refused by `train`
        train_bridge(SHORT.with_seed(3), tmp_path / "other", None, copied)
    assert (copied / "run.json").read_bytes() == before[copied / "run.json"]
    (copied / "run.json").write_text(json.dumps(record | {"recipe": "laptop"}), encoding="utf-8")
    code, _, err = cli("train", "--out", copied, "--data", data, "--seed", 3)
    assert code == 2 and "--recipe laptop, not scenes" in err
    check_run(SHORT, tmp_path / "other", None, copied, "val", False, print, resume=False)


def test_of_a_run_that_is_trained_anew_nothing_old_is_left_when_it_is_stopped(run, copied, cli, monkeypatch):
    data = run[0].parent / "data"
    (copied / "results-val.json").write_text("{}")

    def stop(*given, name="", **more):
        if name == "stage 1":
            raise KeyboardInterrupt
        return train(*given, name=name, **more)

    monkeypatch.setattr("minblip2.training.bridge.train", stop)
    code, _, err = cli("train", "--out", copied, "--data", data, "--seed", 5, "--restart")
    assert code == 130 and "stopped" in err
    assert not [path for name in ("stage?/model.safetensors", "stage?/checkpoint.pt", "results-*") for path in
                copied.glob(name)]
    monkeypatch.undo()
    assert train_bridge(SHORT.with_seed(5), data, None, copied).stage2 is not None, "and it goes on"


def test_of_several_processes_only_the_first_trains_the_experts_anew(run, copied, monkeypatch):
    asked = []

    def build(recipe, data, parts, out, resume=True):
        asked.append(resume)
        raise UserError("enough")

    for rank in (0, 1, 2):
        monkeypatch.setattr("minblip2.training.bridge.env_rank_and_size", lambda rank=rank: (rank, 1))
        with pytest.raises(UserError, match="enough"):
            train_bridge(replace(SHORT, build=build), run[0].parent / "data", None, copied, resume=False)
    assert asked == [False, True, True]


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "all of it"])
def test_a_run_goes_on_with_data_that_have_moved(run, tmp_path, cli, monkeypatch, left):
    for name in ("data", "scenes"):
        shutil.copytree(run[0].parent / name, tmp_path / "was" / name)
    shutil.copytree(tmp_path / "was" / "data", tmp_path / "moved")
    if left != "all of it":
        shutil.rmtree(tmp_path / "was" / "data")
    if left == "an empty folder":
        (tmp_path / "was" / "data").mkdir()
    monkeypatch.setattr("minblip2.commands.train.measure_run", lambda *rest, **more: {"images": 7})
    out = tmp_path / "was" / "scenes"
    write_record(out, SHORT.with_seed(3), tmp_path / "was" / "data", None)
    code, _, err = cli("train", "--out", out, "--data", tmp_path / "moved", "--seed", 3)
    assert code == 0 and recorded_data(out) == tmp_path / "moved", err


def test_a_run_that_has_learned_nothing_yet_may_begin_otherwise(run, copied, tmp_path):
    shutil.rmtree(copied / "stage1")
    check_run(SHORT.with_seed(4), run[0].parent / "data", None, copied, "val", False, print)
    with pytest.raises(UserError, match="--recipe scenes, not laptop"):
        check_run(RECIPES["laptop"], run[0].parent / "data", None, copied, "val", False, print)


@pytest.fixture
def photographs(run, copied):
    """The bridge as if it were one for photographs, with its folder, which has been trained on data that are gone."""
    record = dict(recipe="laptop", seed=3, data=str(copied / "gone"), parts=None)
    (copied / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return copied, replace(run[1], recipe=replace(SHORT, name="photographs"))


def test_what_cannot_be_measured_is_known_before_it_begins(photographs):
    with pytest.raises(UserError, match=r"gone any more: name their folder with --data"):
        measure.measure_run(*photographs, "val", begun=lambda: pytest.fail("it has begun"))


def test_other_data_are_measured_without_the_training_data(run, photographs):
    folder, _ = photographs
    data, begun = run[0].parent / "data", []
    without = measure.measure_run(*photographs, "val", begun=lambda: begun.append(1), data=data)
    assert begun and without["images"] == 24 and "stage1_cider" in without
    shutil.copytree(data, folder / "gone")
    found = measure.measure_run(*photographs, "val", data=data)
    assert found.keys() - without.keys() == {f"nearest_{what}" for what in ("cider", "bleu4", "distinct", "words")}
    print_figures(without)


def test_seconds_of_a_session_are_not_those_of_a_stage(run, photographs):
    folder, _ = photographs
    for stage, first in (("stage1", 2), ("stage2", 0)):
        (folder / stage / "seconds.json").write_text(json.dumps({"seconds": 5.0, "from_step": first}), encoding="utf-8")
    results = measure.measure_run(*photographs, "val", data=run[0].parent / "data")
    assert results["seconds_stage2"] == 5.0 and "seconds_stage1" not in results


def test_the_laptop_recipe_names_what_is_missing(tmp_path, cli):
    write_scenes(tmp_path / "data", train=4, val=2, test=2, progress=False)
    code, _, error = cli("train", "--recipe", "laptop", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert code == 2 and "--parts" in error
    code, _, error = cli("train", "--recipe", "laptop", "--data", tmp_path / "data", "--parts", tmp_path,
                         "--out", tmp_path / "out")
    assert code == 2 and "dinov2-small does not exist" in error and not (tmp_path / "out").exists()


def test_clean_is_the_originals_caption_processor():
    assert normalize_caption('A "big" dog, isn\'t it?  (Yes!) #1: ~*;.') == "a big dog, isn't it? yes 1"


def test_unknown_recipe():
    with pytest.raises(UserError, match="choose one of scenes, laptop, gpu"):
        find_recipe("cloud")


def test_help_runs_without_anything_trained():
    shown = subprocess.run([sys.executable, "-m", "minblip2", "--help"], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parents[1], encoding="utf-8")
    assert all(command in shown.stdout for command in ("train", "caption", "retrieve", "evaluate", "attend"))


def test_laptop_recipe_on_real_parts(photos, parts, tmp_path):
    """Real DINOv2, MiniLM and SmolLM2, real photographs: both stages run, losses start where arithmetic says."""
    small = tmp_path / "photos"
    (small / "annotations").mkdir(parents=True)
    (small / "images").symlink_to(photos / "images")
    for split, count in (("train", 12), ("val", 6)):
        content = json.loads((photos / "annotations" / f"captions_{split}.json").read_text(encoding="utf-8"))
        images = content["images"][:count]
        ids = {image["id"] for image in images}
        content = {"images": images, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}
        (small / "annotations" / f"captions_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    laptop = RECIPES["laptop"]
    recipe = replace(laptop, stage1=replace(laptop.stage1, steps=2, batch_size=8),
                     stage2=replace(laptop.stage2, steps=2, batch_size=4))
    bridge = train_bridge(recipe, small, parts, tmp_path / "out")
    first = json.loads((tmp_path / "out" / "stage1" / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["itc"] == pytest.approx(np.log(8), abs=0.4) and first["itm"] == pytest.approx(0.6365, abs=0.15)
    data, train = CocoCaptions(small, "val"), CocoCaptions(small, "train")
    results = measure.evaluate_photos(bridge, train, data, bridge.features(data, tmp_path / "out" / "cache"),
                                         bridge.features(train, tmp_path / "out" / "cache"))
    assert results["captions"] == 30 and results["nearest_cider"] >= 0 and "stage2_bleu4" in results
