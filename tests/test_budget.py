"""What a recipe will take: counts against the originals' modules, memory against what autograd keeps, the text."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from minblip2 import UserError
from minblip2.data.coco import CocoCaptions
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2
from minblip2.training import budget
from minblip2.training.budget import (
    StageCost,
    dry_run,
    estimate,
    free_memory,
    parameters,
    settings_of,
    trained_parameters,
)
from minblip2.training.recipes import GPU, LAPTOP, SCENES
from minblip2.weights.checkpoint import HubConfig
from minblip2.weights.hub import MODELS
from minblip2.weights.pretrained import empty_encoder, empty_lm, load_lm, load_vit


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_parameters(output) -> int:
    return parameters(empty_encoder("a config", HubConfig(output), torch.float32)[0])


def lm_parameters(output) -> int:
    return parameters(empty_lm("a config", HubConfig(output), False, torch.float32)[0])


def test_clip_is_counted_as_blip2_takes_it():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = MODELS["clip-vit-large-patch14"].config
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**config["vision_config"]))
    vision = getattr(model, "vision_model", model)
    left_out = count(vision.encoder.layers[-1]) + count(vision.post_layernorm)
    assert encoder_parameters(config) == count(model) - left_out


def test_opt_is_counted_as_it_is():
    from transformers import OPTConfig as Theirs
    from transformers import OPTForCausalLM

    for name in ("opt-125m", "opt-1.3b"):
        with torch.device("meta"):
            model = OPTForCausalLM(Theirs(**{k: v for k, v in MODELS[name].config.items() if k != "model_type"}))
        model.tie_weights()
        assert lm_parameters(MODELS[name].config) == count(model), name


def test_real_parts_are_counted_as_they_load(parts):
    for name, load, counted in (("dinov2-small", load_vit, encoder_parameters),
                                ("SmolLM2-135M-Instruct", load_lm, lm_parameters)):
        model = load(parts / name)
        assert counted(settings_of(name, parts)) == count(model)
        assert counted(MODELS[name].config) == count(model), "the pinned sizes are not the model's"


def test_the_bridge_has_the_papers_parameters():
    """Table 2 of the paper: 103 million beside ViT-L and a model of width 2048, 107 beside ViT-g and OPT-2.7B."""
    assert trained_parameters(QFormerConfig(image_width=1024), 256, 2048) == (183_165_758, 103_200_256)
    assert trained_parameters(QFormerConfig(), 256, 2560) == (186_705_470, 107_133_696)


def saved_bytes(run, model) -> int:
    """What autograd keeps of a forward pass, without the weights."""
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


def test_memory_is_estimated_within_a_quarter(tmp_path, monkeypatch):
    torch.manual_seed(0)
    batch, width = 8, 192
    bert = dict(MODELS["bert-base-uncased"].config, hidden_size=width, num_hidden_layers=6, num_attention_heads=3,
                intermediate_size=4 * width, vocab_size=2999)
    lm = dict(MODELS["opt-125m"].config, hidden_size=width, num_hidden_layers=6, num_attention_heads=3,
              ffn_dim=4 * width, vocab_size=3000, word_embed_proj_dim=width)
    clip = json.loads(json.dumps(MODELS["clip-vit-large-patch14"].config))
    clip["vision_config"].update(hidden_size=256, num_hidden_layers=2, intermediate_size=512)
    for role, config in (("encoder", clip), ("bert", bert), ("lm", lm)):
        (tmp_path / GPU.models[role]).mkdir()
        (tmp_path / GPU.models[role] / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(budget, "best_device", lambda default=None: torch.device("cpu"))
    monkeypatch.setattr(budget, "compute_dtype", lambda device: torch.float32)
    recipe = replace(GPU, stage1=replace(GPU.stage1, batch_size=batch), stage2=replace(GPU.stage2, batch_size=batch))
    output = [float(line.rpartition("about ")[2].removesuffix(" GB of memory"))
              for line in dry_run(recipe, tmp_path, tmp_path).splitlines() if "GB of memory" in line]
    config = QFormerConfig(width=width, layers=6, heads=3, mlp_width=4 * width, image_width=256, vocab_size=3000)
    stage1 = Stage1(config, 256)
    stage2 = Stage2.from_stage1(stage1, OPT(OPTConfig(3000, width, 6, 3, 4 * width)))
    image, ids = torch.randn(batch, 257, 256), torch.randint(5, 2000, (batch, budget.CAPTION))
    mask, frozen = torch.ones_like(ids, dtype=torch.bool), 4 * (encoder_parameters(clip) + lm_parameters(lm))
    trained = [count(stage1), count(stage2) - count(stage2.lm)]
    kept = [saved_bytes(lambda: stage1(image, ids, mask, torch.arange(batch)), stage1),
            saved_bytes(lambda: stage2(image, ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:]), stage2)]
    for told_gb, numbers, activations in zip(output, trained, kept, strict=True):
        assert told_gb == pytest.approx((16 * numbers + frozen + activations) / 1e9, rel=0.25, abs=0.05)


def test_the_gpu_recipe_is_told_on_an_empty_disk(tmp_path):
    text = dry_run(GPU, tmp_path / "coco", tmp_path / "parts")
    for said in ("clip-vit-large-patch14       290,581,504 frozen   missing",
                 "opt-1.3b                   1,315,758,080 frozen   missing",
                 "bert-base-uncased            183,165,758 trained  missing", "103,200,256 trained",
                 "3 views of 10,000 pictures to be fetched: 257 x 1024 in float16, 15.8 GB on disk",
                 "8,000 steps of 64 pairs, 10.2 passes over 50,000", "GB of memory",
                 f"python data/download.py coco --images 10000 --out {tmp_path}/coco",
                 "python data/download.py weights clip-vit-large-patch14 opt-1.3b bert-base-uncased --out "
                 f"{tmp_path}/parts"):
        assert said in text, said
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_missing(tmp_path, parts, photos):
    assert "nothing is missing" in dry_run(LAPTOP, photos, parts)
    assert f"1 view of {len(CocoCaptions(photos, 'train')):,} pictures in" in dry_run(LAPTOP, photos, parts)
    folder = tmp_path / "opt-1.3b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(MODELS["opt-125m"].config)), encoding="utf-8")
    text = dry_run(GPU, tmp_path, tmp_path)
    assert f"{lm_parameters(MODELS['opt-125m'].config):,} frozen   missing" in text, "the config.json there counts"
    (folder / "pytorch_model.bin").touch()
    text = dry_run(GPU, tmp_path, tmp_path)
    assert "opt-1.3b" not in text.rpartition("missing: models")[2]


def tables(folder, train):
    """A folder with this table of what is trained on, and one picture more, which is measured."""
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (30, 20)).save(folder / name)
    (folder / "train.csv").write_text(train, encoding="utf-8")
    (folder / "val.csv").write_text("a.jpg,a photo\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("recipe", [LAPTOP, SCENES], ids=["laptop", "scenes"])
def test_data_that_are_there_are_wrong_and_not_missing(tmp_path, recipe):
    (tmp_path / "empty").mkdir()
    damaged = tables(tmp_path / "data", "b.jpg,a photo,with commas, of a dog\nb.jpg\n")
    for data, said in ((tmp_path / "empty", "no split 'train'"), (damaged, "train.csv, line 2")):
        lines = dry_run(recipe, data, tmp_path).splitlines()
        assert [line for line in lines if line.startswith("cannot be used: ") and said in line]
        assert not any("missing: pictures" in line or "to be" in line for line in lines)
        with pytest.raises(UserError, match=said):
            CocoCaptions(data, "train")
    text = dry_run(recipe, tmp_path / "none", tmp_path)
    assert ("missing: pictures" if recipe is LAPTOP else "cannot be used: no split 'train'") in text


def test_a_dry_run_skips_what_the_run_will_skip(tmp_path):
    data = tables(tmp_path / "data", "a.jpg,a photo\nb.jpg,another\nc.jpg,a third\n")
    (data / "c.jpg").write_bytes(b"no picture")
    recipe = replace(LAPTOP, stage1=replace(LAPTOP.stage1, batch_size=2), stage2=replace(LAPTOP.stage2, batch_size=2))
    text = dry_run(recipe, data, tmp_path)
    assert "1 pictures of the split 'train' are no pictures" in text and "add --skip-broken" in text
    text = dry_run(recipe, data, tmp_path, skip_broken=True)
    assert "cannot be used" not in text and "1 view of 2 pictures in" in text
    many = replace(recipe, stage1=replace(recipe.stage1, batch_size=3))
    assert "batch size is 3 for 2 pairs" in dry_run(many, data, tmp_path, skip_broken=True)
    (data / "a.jpg").write_bytes(b"no picture")
    assert "cannot be used: " in dry_run(recipe, data, tmp_path, skip_broken=True), "nothing is left to measure"


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(UserError, match="a 'gpt2' model; the language model must be one of opt, llama, t5"):
        lm_parameters({"model_type": "gpt2"})


def test_the_largest_batch_is_the_last_that_fits():
    cost = StageCost(trained=10, fixed=1000.0, each=30.0)
    assert cost.largest_batch(cost.memory(7)) == 7 and cost.largest_batch(cost.memory(7) - 1) == 6
    assert cost.largest_batch(999) == cost.largest_batch(1001) == 0


def test_an_estimate_is_what_the_dry_run_tells(tmp_path):
    costs, value = estimate(LAPTOP, tmp_path, 2), budget.compute_dtype(budget.best_device()).itemsize
    here = estimate(LAPTOP, tmp_path, value)
    text = dry_run(LAPTOP, tmp_path, tmp_path)
    for stage, settings in ((here.stage1, LAPTOP.stage1), (here.stage2, LAPTOP.stage2)):
        assert f"about {stage.memory(settings.batch_size) / 1e9:.1f} GB of memory" in text
    assert f"{costs.encoder:,} frozen" in text and f"{costs.stage1.trained:,} trained" in text
    assert costs.cached == 2 * 257 * 384 and costs.stage1.each < estimate(LAPTOP, tmp_path, 4).stage1.each
    scenes = estimate(SCENES, tmp_path, 4)
    assert (scenes.tokens, scenes.width) == (64, 128) and scenes.stage1.trained == count(
        Stage1(SCENES.build(SCENES, None, None, budget.SHIPPED).qformer, SCENES.embed_dim))


def test_free_memory_is_told_or_unknown(monkeypatch):
    free = free_memory(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e14
    monkeypatch.setattr(budget, "Path", lambda path: (_ for _ in ()).throw(OSError(path)))
    assert free_memory(torch.device("cpu")) is None
