"""What a recipe will take, before anything is loaded: parameters, memory, disk, steps, and what must be fetched."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import UserError, pretrained
from .data import CocoCaptions
from .files import read_json
from .hub import MODELS
from .qformer import QFormerConfig
from .recipes import FETCHED_DATA, FETCHED_PARTS, Recipe
from .stage1 import Stage1
from .train import TrainConfig, best_device, computes_in_bfloat16

CAPTION = 15  # tokens of an average COCO caption, with its start and end
CAPTIONS = 5  # of each picture
SAVED = 34  # values that a transformer layer keeps for its gradient, per token and channel (arXiv 2205.05198 §4)


def encoder_parameters(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of an image encoder by its config.json, as BLIP-2 uses it: parameters, visual tokens at 224 pixels, width."""
    clip = config["model_type"] == "clip"
    vision = config["vision_config"] if clip else config
    e, layers, patch = vision["hidden_size"], vision["num_hidden_layers"], vision["patch_size"]
    mlp = vision["intermediate_size"] if clip else int(e * vision["mlp_ratio"])
    block = 4 * (e * e + e) + 2 * e * mlp + mlp + e + 4 * e
    around = 3 * patch**2 * e + e + ((vision["image_size"] // patch) ** 2 + 1) * e + 2 * e
    if clip:  # no bias of the patches, one norm before the blocks, and the last block is left out
        return around + (layers - 1) * block, (224 // patch) ** 2 + 1, e
    return around + e + layers * (block + 2 * e), (224 // patch) ** 2 + 1, e


def lm_parameters(config: Mapping[str, Any]) -> int:
    """Of an OPT or Llama by its config.json; the head is counted once where it is tied to the words."""
    e, layers, words = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    if config["model_type"] == "opt":
        mlp = config["ffn_dim"]
        return (words + config["max_position_embeddings"] + 2) * e + 2 * e + layers * (
            4 * (e * e + e) + 2 * e * mlp + mlp + e + 4 * e)
    if config["model_type"] == "llama":
        keys = e * config["num_key_value_heads"] // config["num_attention_heads"]
        block = 2 * e * e + 2 * e * keys + 3 * e * config["intermediate_size"] + 2 * e
        return words * e * (1 if config["tie_word_embeddings"] else 2) + e + layers * block
    raise UserError(f"the size of a {config['model_type']!r} model is not known: choose an opt or a llama")


def settings_of(name: str, parts: Path) -> dict[str, Any]:
    """A model's config.json if it was fetched, else what is known of the pinned model."""
    path = parts / name / "config.json"
    return read_json(path) if path.exists() else dict(MODELS[name].config)


def trained_parameters(config: QFormerConfig, shared_width: int, lm_width: int) -> tuple[int, int]:
    """Of stage 1 and of stage 2: the bridge itself is built, but without memory."""
    with torch.device("meta"):
        stage1 = Stage1(config, shared_width)
        branch = stage1.qformer.query_branch()
    bridge = sum(p.numel() for part in (branch, stage1.vision_norm) for p in part.parameters())
    return sum(p.numel() for p in stage1.parameters()), bridge + (config.width + 1) * lm_width


def activations(tokens: int, layers: int, width: int, value: int) -> float:
    """Bytes that a transformer keeps for its gradient, when a number takes `value` bytes."""
    return SAVED / 2 * value * tokens * layers * width


def dry_run(recipe: Recipe, data: Path | None = None, parts: Path | None = None) -> str:
    """A recipe's parts, costs and what is missing, as text. Raises UserError when the scenes' own recipe is asked for.

    Memory is an estimate: weights, gradients and Adam's two moments in float32, what the layers keep, and the logits.
    """
    if not recipe.models:
        raise UserError(f"the recipe {recipe.name} makes all that it needs in minutes: run it without --dry-run")
    data, parts, missing, absent = data or FETCHED_DATA, parts or FETCHED_PARTS, [], []
    encoder, bert, lm = (settings_of(recipe.models[role], parts) for role in ("encoder", "bert", "lm"))
    vit_count, tokens, vit_width = encoder_parameters(encoder)
    lm_count, lm_width, lm_layers = lm_parameters(lm), lm["hidden_size"], lm["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:  # BERT's sizes are read from a file
        (Path(folder) / "config.json").write_text(json.dumps(bert), encoding="utf-8")
        config = pretrained.bert_sizes(folder, image_width=vit_width, **recipe.qformer)
    first, second = trained_parameters(config, recipe.shared_width, lm_width)
    try:
        split = CocoCaptions(data, "train")
        pictures, pairs, of = len(split), len(split.pairs), f"in {data}"
    except UserError:
        pictures, pairs, of = recipe.pictures, CAPTIONS * recipe.pictures, "to be fetched"
        missing = [f"missing: pictures in {data}: python data/download.py coco --images {recipe.pictures} --out {data}"]

    device = best_device()
    value = 2 if computes_in_bfloat16(device) else 4
    kept, seen, queries = 4 * vit_count + value * lm_count, recipe.keep or tokens, config.queries

    def row(what: str, role: str, count: int, use: str) -> str:
        folder = parts / recipe.models[role]
        there = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        if not there:
            absent.append(recipe.models[role])
        return f"  {what:16} {recipe.models[role]:24} {count:>15,} {use:8} {'' if there else 'missing'}".rstrip()

    def stage(name: str, settings: TrainConfig, trained: int, saved: float) -> str:
        passes = settings.steps * settings.accumulate * settings.batch_size / pairs
        return (f"  {name:16} {settings.steps:,} steps of {settings.accumulate * settings.batch_size} pairs, "
                f"{passes:.1f} passes over {pairs:,}; about {(16 * trained + kept + saved) / 1e9:.1f} GB of memory")

    batch, cross = recipe.stage1.batch_size, -(-config.layers // config.cross_every)
    each = 2 * queries + 5 * CAPTION + 3 * (queries + CAPTION)  # queries for ITC, text for ITC and ITG, three ITM pairs
    saved1 = (activations(batch * each, config.layers, config.width, value) + 4 * value * batch * seen * vit_width
              + 4 * value * batch * seen * cross * config.width + 12 * batch * CAPTION * config.vocabulary)
    batch = recipe.stage2.batch_size
    saved2 = (activations(batch * (queries + CAPTION), lm_layers, lm_width, value)
              + activations(batch * queries, config.layers, config.width, value)
              + 4 * value * batch * seen * cross * config.width + 12 * batch * CAPTION * lm["vocab_size"])
    views = len(recipe.views)
    lines = [
        f"recipe {recipe.name}, on {device} in {'bfloat16' if value == 2 else 'float32'}", "",
        row("image encoder", "encoder", vit_count, "frozen"), row("language model", "lm", lm_count, "frozen"),
        row("bridge, stage 1", "bert", first, "trained"),
        f"  {'bridge, stage 2':16} {'':24} {second:>15,} trained", "",
        f"  {'features':16} {views} views of {pictures:,} pictures {of}: {tokens} x {vit_width} in float16, "
        f"{2e-9 * views * pictures * tokens * vit_width:.1f} GB on disk",
        stage("stage 1", recipe.stage1, first, saved1), stage("stage 2", recipe.stage2, second, saved2), ""]
    if absent:
        missing.append(f"missing: models in {parts}: python data/download.py weights {' '.join(absent)} --out {parts}")
    return "\n".join([*lines, *(missing or ["nothing is missing"])])
