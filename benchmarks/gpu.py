"""What a recipe takes on this machine's GPU, beside what was estimated: python -m benchmarks.gpu [--recipes laptop gpu]

The recipe's modules at their true sizes, with fresh weights and noise for pictures: how long a step takes and what it
keeps does not depend on what the weights are. Steps are those of `train`, with the real loader, optimiser and log.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.provenance import RESULTS, commit, machine
from minblip2 import UserError
from minblip2.data.batches import Batch, PairBatches
from minblip2.data.entry import run_command
from minblip2.data.files import read_json, write_json
from minblip2.data.transforms import Transform
from minblip2.device import autocast, best_device, compute_dtype
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2
from minblip2.training import budget
from minblip2.training.loop import TrainConfig, train
from minblip2.training.recipes import GPU, LAPTOP, Recipe
from minblip2.training.stages import stage1_losses
from minblip2.weights.hub import MODELS

PAPER = "EVA ViT-g and OPT-2.7b"
EXTRA = {"eva": dict(model_type="blip-2"),
         "opt-2.7b": MODELS["opt-1.3b"].config | dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32,
                                                      ffn_dim=10240, word_embed_proj_dim=2560)}
# The paper's batches are of 1,680 and 1,920 pairs on 16 GPUs.
MEASURED = {"laptop": LAPTOP, "gpu": GPU, PAPER: replace(
    GPU, models=GPU.models | dict(encoder="eva", lm="opt-2.7b"), stage1=replace(GPU.stage1, batch_size=105),
    stage2=replace(GPU.stage2, batch_size=120))}
PICTURES, PAIRS_EACH, WARM = 200, 5, 3


def write_extra(folder: Path) -> Path:
    """The configurations of models that no recipe names, as hub folders without weights."""
    for name, config in EXTRA.items():
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", config)
    return folder


def fresh(recipe: Recipe, configs: Path) -> tuple[nn.Module, nn.Module, Stage1]:
    """A recipe's image encoder, language model and stage 1 on the best device, the first two filled with noise.

    `configs` may hold hub folders, each with a config.json; models that are not there have their known sizes.
    """
    device = best_device()
    encoder, lm, config = budget.outlines(recipe, configs, compute_dtype(device))
    for module in (encoder, lm):
        module.to_empty(device=device).requires_grad_(False).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
    with device:
        return encoder, lm, Stage1(config, recipe.embed_dim)


def pairs(recipe: Recipe, tokens: int, width: int, vocabulary: int, config: TrainConfig) -> PairBatches:
    """Batches of noise (b v e) in a picture's place, and of random words (b t), about as many as in a caption."""
    random = np.random.default_rng(0)
    features = random.standard_normal((PICTURES, tokens, width), dtype=np.float32).astype(np.float16)
    texts = [random.integers(3, vocabulary - 1, length).tolist()
             for length in random.integers(budget.CAPTION - 4, budget.CAPTION + 5, PICTURES * PAIRS_EACH)]
    return PairBatches([features], np.arange(len(texts)) // PAIRS_EACH, texts, range(PICTURES), config.batch_size, 0, 0,
                       recipe.keep_tokens)


def steps(model: nn.Module, losses: Callable, batches: PairBatches, config: TrainConfig, number: int) -> dict:
    """Pairs in a batch, seconds of a step of the loop that trains, and the most memory in use (bytes)."""
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("warm", WARM), ("timed", number)):
            train(model, losses, batches, replace(config, steps=count), Path(folder) / name, name=name)
        seconds = read_json(Path(folder) / "timed" / "seconds.json")["seconds"]
    return {"batch": config.batch_size, "seconds": seconds / number, "bytes": torch.cuda.max_memory_allocated()}


@torch.no_grad()
def rate(run: Callable[[], object], items: int, repeats: int = 3) -> float:
    """How many of its items a call finishes in a second, at the best of its repeats."""
    best = 0.0
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with autocast(best_device()):
            run()
        torch.cuda.synchronize()
        best = max(best, items / (time.perf_counter() - started))
    return best


def after_one_token(model: Stage2, batch: Batch) -> dict[str, torch.Tensor]:
    """The loss of a batch after a prompt of one token."""
    ids, mask = batch.text_ids, batch.text_mask
    return {"loss": model(batch.image_features, ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:]).loss}


def measure(recipe: Recipe, number: int) -> dict:
    """Pictures encoded and captioned in a second ("encode", "caption"), and what `steps` tells of each stage, with the
    estimate of its memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        configs = write_extra(Path(folder))
        encoder, lm, stage1 = fresh(recipe, configs)
        output = budget.estimate(recipe, configs, value=compute_dtype(best_device()).itemsize)
    tokens, width, device = output.tokens, encoder.width, best_device()
    found = {"encode": rate(partial(encoder, torch.randn(64, 3, *[Transform().size] * 2, device=device)), 64)}
    found["stage1"] = steps(stage1, partial(stage1_losses, loss_weights=recipe.loss_weights), pairs(
        recipe, tokens, width, stage1.qformer.config.vocab_size, recipe.stage1), recipe.stage1, number)
    stage2 = Stage2.from_stage1(stage1, lm).to(device)
    del stage1
    found["stage2"] = steps(stage2, after_one_token, pairs(recipe, tokens, width, lm.vocab_size, recipe.stage2),
                            recipe.stage2, number)
    image, ids = torch.randn(50, tokens, width, device=device), torch.ones(50, 1, dtype=torch.long, device=device)
    found["caption"] = rate(lambda: stage2.eval().generate(image, ids, ids.bool(), eos_id=2, beams=recipe.beams,
                                                           max_length=20, min_length=20), len(image))
    for stage in ("stage1", "stage2"):
        cost = getattr(output, stage)
        found[stage]["estimate"] = cost.memory(found[stage]["batch"])
    return found


def main() -> None:
    """Measure and keep benchmarks/results/steps.json. Raises UserError where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS / "steps.json")
    parser.add_argument("--commit", help="the commit that is measured (default: what is checked out)")
    parser.add_argument("--beside", default="nothing", help="what else the machine does meanwhile, in words")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here: this measures what a recipe takes on one")
    found = read_json(options.results) if options.results.exists() else {}
    for name in options.recipes:
        found[name] = measure(MEASURED[name], options.steps) | {
            "machine": machine(), "commit": options.commit or commit(), "beside": options.beside}
        write_json(options.results, found)
    print(f"wrote {options.results}")


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.gpu", main))
