"""What could end a run late is said before it begins, all at once, and leaves nothing behind."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, OPTConfig, OPTForCausalLM

from minblip2 import UserError, __main__
from minblip2.data.coco import CocoCaptions
from minblip2.data.scene_dataset import write_scenes
from minblip2.training import checks
from minblip2.training.budget import dry_run
from minblip2.training.checks import broken_pictures, check_batches, check_folder, check_part, long_captions, open_split
from minblip2.training.recipes import GPU, LAPTOP, RECIPES, SCENES
from minblip2.training.records import write_record
from minblip2.training.shipping import SHIPPED
from minblip2.weights.pretrained import load_lm, load_vit

from .short_recipe import SHORT


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(folder, train=40, val=12, test=4, progress=False)
    return folder


@pytest.fixture
def data(scenes, tmp_path):
    """A copy of the scenes that a test may spoil."""
    return shutil.copytree(scenes, tmp_path / "data")


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Run `train` on the short recipe in this process; nothing may be trained: (exit code, stdout, stderr)."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["minblip2", "train", *map(str, words)])
        code = __main__.main()
        return code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "scenes", SHORT)
    monkeypatch.setattr("minblip2.training.experts.train_vit", lambda *rest: pytest.fail("it has begun"))
    return call


def photographs(folder, count=6):
    """A folder of photographs with a table of captions."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (30, 20), (40 * i, 9, 9)).save(folder / f"{i}.jpg")
    (folder / "captions.csv").write_text("".join(f"{i}.jpg,a photo of number {i}\n" for i in range(count)))
    return folder


def test_splits_that_are_not_there_are_told_first(train, data):
    for words in (("--split", "vla"), ()):
        code, _, err = train("--data", data, "--out", "run", *words)
        assert code == 2 and "no split" in err and not any("model" in p.name for p in data.parent.glob("run/**/*"))
        (data / "annotations" / "captions_val.json").unlink(missing_ok=True)
    assert not (data.parent / "run").exists()


def test_photographs_are_not_for_the_scenes(train, tmp_path):
    folder = photographs(tmp_path / "photos")
    shutil.copy(folder / "captions.csv", folder / "val.csv")
    code, _, err = train("--data", folder, "--out", "run")
    assert code == 2 and "holds no drawn scenes" in err and "--recipe laptop or gpu" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_pictures_are_told_all_at_once_and_skipped_if_asked(train, data, split):
    broken = sorted((data / "images").glob(f"{split}_*.png"))[3:10]
    for path in broken:
        path.write_bytes(path.read_bytes()[:90])
    code, _, err = train("--data", data, "--out", "run")
    of = {"train": 40, "val": 12}[split]
    assert code == 2 and f"minblip2: 7 of {of} pictures of the split '{split}' cannot be read" in err
    assert all(path.name in err for path in broken[:5]) and "(and 2 more)" in err and "--skip-broken" in err
    with pytest.raises(pytest.fail.Exception, match="it has begun"):
        train("--data", data, "--out", "run", "--skip-broken")
    assert len(open_split(data, split, data.parent / "run", True)) == of - 7
    assert open_split(data, split, None, True).skipped["unreadable picture"] == 7


def test_a_run_that_skips_goes_on_without_them(tmp_path, data, monkeypatch, capsys):
    """From the command to the figures: training, measuring and loading leave out the same pictures."""
    monkeypatch.setitem(RECIPES, "scenes", replace(SHORT, experts=SCENES.experts))
    for part in SCENES.experts:  # trained already
        shutil.copytree(SHIPPED / part, tmp_path / "run" / part)
    for path in sorted((data / "images").glob("train_*.png"))[:2]:
        path.write_bytes(b"no picture")
    monkeypatch.setattr(sys, "argv", ["minblip2", "train", "--data", str(data), "--out", str(tmp_path / "run"),
                                      "--skip-broken", "--batch-size", "10"])
    assert __main__.main() == 0 and "skipped 2 x unreadable picture" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["skip_broken"] is True and record["batch_size"] == 10
    assert json.loads((tmp_path / "run" / "results-val.json").read_text())["images"] == 12


def test_what_was_read_once_is_not_read_again_unless_it_has_changed(data, tmp_path, monkeypatch):
    paths = CocoCaptions(data, "train").paths
    asked = []
    read = checks.why_broken
    monkeypatch.setattr(checks, "why_broken", lambda path: asked.append(path) or read(path))
    assert broken_pictures(paths, tmp_path / "notes") == {} and len(asked) == 40
    assert broken_pictures(paths, tmp_path / "notes") == {} and len(asked) == 40
    paths[7].write_bytes(b"no picture")
    (broken,) = broken_pictures(paths, tmp_path / "notes")
    assert broken == paths[7] and len(asked) == 80
    assert list(broken_pictures(paths, tmp_path / "notes")) == [broken] and len(asked) == 81, "what was broken is"
    (note,) = [path for path in (tmp_path / "notes").iterdir() if json.loads(path.read_text())]
    note.write_text("{")  # a damaged note is no note
    assert list(broken_pictures(paths, tmp_path / "notes")) == [broken] and len(asked) == 121


def test_a_picture_that_can_be_read_after_all_is_broken_no_longer(data, tmp_path, monkeypatch):
    """A decoder may be installed, or a right be given, while the file stays as it is."""
    paths, read = CocoCaptions(data, "train").paths, checks.why_broken
    monkeypatch.setattr(checks, "why_broken", lambda path: "no decoder" if path == paths[3] else read(path))
    assert list(broken_pictures(paths, tmp_path / "notes")) == [paths[3]]
    monkeypatch.setattr(checks, "why_broken", read)
    assert broken_pictures(paths, tmp_path / "notes") == {}


def test_pictures_that_are_measured_and_trained_on_are_told(tmp_path):
    """The usual mistake: five captions of each picture, and the lines, not the pictures, are split."""
    folder = tmp_path / "flickr"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (30, 20), (40 * i, 9, 9)).save(folder / f"{i}.jpg")
    lines = [f"{i}.jpg,caption {k},{split}" for i, splits in enumerate((("train", "val"), ("train", "train"),
             ("val", "train"), ("val", "val"))) for k, split in enumerate(splits)]
    (folder / "captions.csv").write_text("\n".join(["file_name,caption,split", *lines]) + "\n")
    train, val = (CocoCaptions(folder / "captions.csv", split) for split in ("train", "val"))
    assert "2 of 3 pictures of the split 'val' are trained on as well" in checks.seen_before(train, val)
    assert checks.seen_before(train, train) is None, "who asks for that knows"


def test_a_batch_larger_than_the_data_names_its_option(train, data, tmp_path):
    code, _, err = train("--data", data, "--out", "run", "--batch-size", "201")
    assert code == 2 and "batch size is 201 for 200 pairs" in err and "--batch-size" in err
    folder = photographs(tmp_path / "three", 3)
    with pytest.raises(UserError, match=r"batch size is 64 for 3 pairs: .*--batch-size"):
        check_batches(LAPTOP, CocoCaptions(folder, "train"))
    check_batches(replace(LAPTOP, stage1=replace(LAPTOP.stage1, batch_size=3),
                          stage2=replace(LAPTOP.stage2, batch_size=2)), CocoCaptions(folder, "train"))


def test_a_file_is_no_place_for_a_run(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        code, _, err = train("--out", out)
        assert code == 2 and "file is a file: name another folder" in err and (tmp_path / "file").read_text() == "mine"
    check_folder(tmp_path / "new" / "run")


def test_long_captions_are_counted_and_a_prompt_needs_room(tmp_path, parts):
    from minblip2.data.tokenizer import Tokenizer

    folder = photographs(tmp_path / "photos")
    with open(folder / "captions.csv", "a", encoding="utf-8") as file:
        file.write(f"0.jpg,{'a very long caption ' * 9}\n")
    data = CocoCaptions(folder, "train")
    for name in ("all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"):
        tokenizer = Tokenizer.from_folder(parts / name)
        assert long_captions(data, tokenizer, "", 32) == 1 and long_captions(data, tokenizer, "", 64) == 0
        exact = [tokenizer.encode(caption, max_length=10**6) for caption in data.texts]
        for most in (8, 9, 10, 11):
            assert long_captions(data, tokenizer, "", most) == sum(len(ids) > most for ids in exact)
        with pytest.raises(UserError, match="so no word of a caption is left: shorten the prompt"):
            long_captions(data, tokenizer, "a long prompt " * 12, 32)


# --- frozen models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny CLIP and a tiny OPT as hub folders, where the gpu recipe looks for them."""
    from .test_hub_folders import folder_of

    parts = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    clip = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                            image_size=224, patch_size=32)
    CLIPVisionModel(clip).save_pretrained(parts / GPU.models["encoder"])
    (parts / GPU.models["encoder"] / "preprocessor_config.json").write_text(json.dumps(dict(
        size=224, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)))
    opt = OPTConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
                    max_position_embeddings=64, word_embed_proj_dim=32)
    OPTForCausalLM(opt).save_pretrained(parts / GPU.models["lm"])
    donor = folder_of("opt", tmp_path_factory.mktemp("donor"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (donor / name).exists():
            shutil.copy(donor / name, parts / GPU.models["lm"])
    return parts


LOADERS = {"encoder": load_vit, "lm": load_lm}


def spoil_short(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])


def spoil_missing(folder):
    state = load_file(folder / "model.safetensors")
    state.pop(sorted(state)[3])
    save_file(state, folder / "model.safetensors")


def spoil_shape(folder):
    state = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(state) if name.endswith("fc1.weight"))
    save_file(state | {name: state[name][:-1].contiguous()}, folder / "model.safetensors")


def spoil_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


def spoil_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\3\4 no pickle")


@pytest.mark.parametrize("role", LOADERS)
@pytest.mark.parametrize("spoil", [spoil_short, spoil_missing, spoil_shape, spoil_config, spoil_pickle])
def test_a_check_and_a_dry_run_say_what_the_loader_says(models, tmp_path, role, spoil):
    parts = shutil.copytree(models, tmp_path / "parts")
    check_part(GPU, parts, role)
    folder = parts / GPU.models[role]
    LOADERS[role](folder)
    assert "cannot be used" not in dry_run(GPU, tmp_path / "none", parts)
    spoil(folder)
    with pytest.raises(UserError) as loading:
        LOADERS[role](folder)
    with pytest.raises(UserError) as checking:
        check_part(GPU, parts, role)
    assert str(checking.value) == str(loading.value)
    assert f"cannot be used: {loading.value}" in dry_run(GPU, tmp_path / "none", parts)


def test_weights_as_a_pickle_pass_the_check_as_they_load(models, tmp_path):
    parts = shutil.copytree(models, tmp_path / "parts")
    for role, load in LOADERS.items():
        folder = parts / GPU.models[role]
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        check_part(GPU, parts, role)
        load(folder)


def test_real_parts_pass(parts):
    for role in LAPTOP.models:
        check_part(LAPTOP, parts, role)


# --- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_scenes_tells_what_they_take_and_writes_nothing(tmp_path):
    text = dry_run(SCENES, out=tmp_path / "run")
    shipped = SCENES.build(SCENES, None, None, SHIPPED)
    for model in (shipped.encoder, shipped.lm):
        assert f"{sum(p.numel() for p in model.parameters()):,} frozen" in text
    for config in (*SCENES.experts.values(), SCENES.stage1, SCENES.stage2):
        assert f"{config.steps:,} steps of" in text
    assert "6,000 pictures to be drawn" in text and text.endswith("nothing is missing") and not list(tmp_path.iterdir())


def test_a_dry_run_tells_all_troubles_at_once(data, tmp_path):
    for path in sorted((data / "images").glob("val_*.png"))[:3]:
        path.write_bytes(b"no picture")
    (tmp_path / "file").touch()
    text = dry_run(replace(SHORT, stage1=replace(SHORT.stage1, batch_size=999)), data, tmp_path, "val",
                   tmp_path / "file" / "run")
    for said in ("file is a file", "3 pictures of the split 'val' are no pictures", "batch size is 999", "--parts out"):
        assert sum(said in line and line.startswith("cannot be used: ") for line in text.splitlines()) == 1, said
    assert "nothing is missing" not in text
    assert "no drawn scenes with the split 'tset'" in dry_run(SHORT, data, None, "tset")
    assert "cannot be used" not in dry_run(SHORT, data, None, "test")


def test_a_dry_run_is_told_to_skip_as_the_run_is(data, monkeypatch, capsys):
    for path in sorted((data / "images").glob("val_*.png"))[:3]:
        path.write_bytes(b"no picture")
    for words, said in (([], "cannot be used: 3 pictures of the"), (["--skip-broken"], "nothing is missing")):
        monkeypatch.setattr(sys, "argv", ["minblip2", "train", "--data", str(data), "--dry-run", *words])
        assert __main__.main() == 0 and capsys.readouterr().out.splitlines()[-1].startswith(said)


def test_a_dry_run_tells_that_the_folder_holds_another_run(data, monkeypatch, capsys):
    begun = data.parent / "run"
    (begun / "stage1").mkdir(parents=True)
    (begun / "stage1" / "checkpoint.pt").touch()
    other = shutil.copytree(data, data.parent / "other")
    captions = other / "annotations" / "captions_train.json"
    captions.write_text(captions.read_text().replace("circle", "ring"))
    write_record(begun, SCENES, other, None)
    for words, said in (([], f"is trained on {other}, not on {data}"), (["--seed", "3"], "--seed 0, not 3"),
                        (["--recipe", "laptop"], "--recipe scenes, not laptop"), (["--restart"], None)):
        monkeypatch.setattr(sys, "argv", ["minblip2", "train", "--data", str(data), "--out", str(begun), "--dry-run",
                                          *words])
        assert __main__.main() == 0
        lines = capsys.readouterr().out.splitlines()
        assert said is None and lines[-1] == "nothing is missing" or said and any(
            line.startswith("cannot be used: ") and said in line for line in lines), words
