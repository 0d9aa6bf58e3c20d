"""The whole: two frozen experts and the bridge between them. Train it by a recipe, load it, and give it pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import UserError
from ..data.batches import Batch, PairBatches
from ..data.coco import CocoCaptions
from ..data.features import feature_cache, weights_checksum
from ..data.files import read_json, write_json
from ..data.tokenizer import Tokenizer
from ..device import autocast, best_device
from ..lm.packed import Packed
from ..stage1 import Stage1
from ..stage2 import Stage2, split_prefix
from .distributed import batch_ranks, launched, prepare_once, process_group, rank_and_size, take_device
from .loop import load_weights, train
from .recipes import RECIPES, Parts, Recipe, clean, default_data, find_recipe


def stage1_losses(model: Stage1, batch: Batch, weights: tuple[float, float, float] = (1, 1, 1)) -> dict[str, Tensor]:
    """The three losses of a batch, their weighted sum, and how often matching is right (a constant gives 2/3)."""
    ranks = batch_ranks(batch.image)
    out = model(batch.image, batch.text_ids, batch.text_mask, batch.image_ids, ranks=ranks)
    loss = sum(weight * part for weight, part in zip(weights, (out.itc, out.itm, out.itg), strict=True))
    right = ranks.mean((out.match_logits.argmax(dim=1) == out.match_labels).float().mean(), len(batch.image))
    return dict(loss=loss, itc=out.itc, itm=out.itm, itg=out.itg, itm_accuracy=right, temperature=out.temperature)


def divide(batch: Batch, tokenizer: Tokenizer, prompt: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the language model is given of a batch's texts, and what it learns to write: ids and mask (b t) of each.

    All are given the prompt, with which the batch's ids begin. Without one, an encoder-decoder is given the beginning
    of the text itself: see `split_prefix`.
    """
    if tokenizer.prompt_end and not prompt:
        return split_prefix(batch.text_ids, batch.text_mask, tokenizer.end)
    ids = tokenizer.encode_prompt(prompt)
    given = torch.tensor(ids, device=batch.text_ids.device).long().expand(len(batch.text_ids), -1)
    first = len(ids) - len(tokenizer.prompt_end)
    return given, torch.ones_like(given, dtype=torch.bool), batch.text_ids[:, first:], batch.text_mask[:, first:]


def stage2_losses(model: Stage2, batch: Batch, tokenizer: Tokenizer, prompt: str) -> dict[str, Tensor]:
    """The loss of a batch whose texts are the language model's and begin with the prompt: nats a piece of a word."""
    return {"loss": model(batch.image, *divide(batch, tokenizer, prompt), ranks=batch_ranks(batch.image)).loss}


@dataclass
class Bridge:
    """A recipe's parts with a trained stage 1 and, where it has come so far, stage 2."""

    recipe: Recipe
    parts: Parts
    stage1: Stage1
    stage2: Stage2 | None = None
    device: torch.device = best_device()

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Frozen features (b v e) of normalised images (b c h w)."""
        encoder = self.parts.encoder.to(self.device)
        with autocast(self.device):
            return encoder(image.to(self.device)).float()

    def features(self, data: CocoCaptions, cache: Path, **view) -> np.memmap:
        """Frozen features (n v e) float16 of a split's pictures, computed once and kept in `cache`.

        `view` changes the transform: flip=True for mirrored pictures, crop=3 for the third random crop of each.
        """
        transform = replace(self.parts.transform, **view)
        return feature_cache(self.encode, transform, [record.path for record in data.images], cache,
                             weights_checksum(self.parts.encoder))

    def look(self, pictures: Iterable[Image.Image]) -> Tensor:
        """Frozen features (b v e) of pictures of any size."""
        return self.encode(torch.stack([self.parts.transform(picture) for picture in pictures]))

    def text_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts as the Q-Former reads them: ids and mask (b t)."""
        tokenizer = self.parts.tokenizer
        ids, mask = tokenizer.pad([tokenizer.encode(clean(text), max_length=self.recipe.max_length) for text in texts])
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def caption(self, features: Tensor, prompt: str | None = None, batch_size: int = 50, **decoding) -> list[str]:
        """What the language model says of images, given frozen features (b v e); see `generation.generate`."""
        if self.stage2 is None:
            raise UserError("stage 2 is not trained yet: run the recipe to its end, or use caption_stage1")
        tokenizer, stage2 = self.parts.lm_tokenizer, self.stage2.to(self.device).eval()
        prompt_ids = torch.tensor([tokenizer.encode_prompt(self.recipe.prompt if prompt is None else prompt)])
        texts = []
        for chunk in features.split(batch_size):
            ids = prompt_ids.expand(len(chunk), -1).to(self.device)
            with autocast(self.device), Packed():
                written = stage2.generate(chunk.float().to(self.device), ids, torch.ones_like(ids, dtype=torch.bool),
                                          end=tokenizer.end, **{"beams": self.recipe.beams} | decoding)
            texts += [tokenizer.decode(row) for row in written]
        return texts

    @torch.no_grad()
    def caption_stage1(self, features: Tensor, batch_size: int = 50, **decoding) -> list[str]:
        """What the Q-Former alone says of images after stage 1, given frozen features (b v e)."""
        tokenizer, stage1 = self.parts.tokenizer, self.stage1.to(self.device).eval()
        texts = []
        for chunk in features.split(batch_size):
            with autocast(self.device):
                written = stage1.caption(chunk.float().to(self.device), end=tokenizer.end,
                                         **{"beams": self.recipe.beams} | decoding)
            texts += [tokenizer.decode(row) for row in written]
        return texts

    def begin_stage2(self, view: np.ndarray) -> None:
        """Start stage 2 from stage 1, with soft prompts that spread like words; view: features (n v e) of pictures."""
        self.stage2 = self.recipe.new_stage2(self.parts, self.stage1).to(self.device)
        self.stage2.calibrate(torch.from_numpy(np.array(view[:256], dtype=np.float32)).to(self.device))

    def pairs(self, data: CocoCaptions, views: Sequence[np.ndarray], for_lm: bool) -> PairBatches:
        """Batches of a split for stage 1; with `for_lm` for stage 2: prompt and caption in the language model's ids."""
        tokenizer = self.parts.lm_tokenizer if for_lm else self.parts.tokenizer
        config = self.recipe.stage2 if for_lm else self.recipe.stage1
        ids = [tokenizer.encode(clean(caption), self.recipe.prompt if for_lm else "", self.recipe.max_length)
               for _, caption in data.pairs]
        return PairBatches(views, [index for index, _ in data.pairs], ids, [record.id for record in data.images],
                           config.batch_size, config.seed, tokenizer.pad_id, self.recipe.keep, *rank_and_size())


def train_bridge(recipe: Recipe, data: Path | None, parts_folder: Path | None, out: Path,
                 resume: bool = True, stages: int = 2) -> Bridge:
    """Run a recipe from its frozen parts to the end of stage 2; all is kept under `out`, and a stopped run goes on.

    With `stages` = 1 it ends after stage 1; called again, it goes on from there. Started by torchrun, all processes
    train together; `out`, data and parts must be folders that all of them see.
    """
    take_device()
    with prepare_once():
        data = default_data(recipe, out, data)
        parts = recipe.build(recipe, data, parts_folder, out)
        bridge = Bridge(recipe, parts, recipe.new_stage1(parts))
        out.mkdir(parents=True, exist_ok=True)
        if launched()[0] == 0:
            told = dict(recipe=recipe.name, seed=recipe.stage1.seed, data=str(data.resolve()),
                        parts=str(parts_folder.resolve()) if parts_folder else None)
            write_json(out / "run.json", told)
        split = CocoCaptions(data, "train")
        views = [bridge.features(split, out / "cache", **view) for view in recipe.views]
    texts = hashlib.sha256(repr(split.pairs).encode()).hexdigest()
    settings = dict(recipe=recipe.name, qformer=parts.qformer, pairs=texts,
                    encoder=weights_checksum(parts.encoder), shared_width=recipe.shared_width, weights=recipe.weights)
    losses = partial(stage1_losses, weights=recipe.weights)
    with process_group():
        train(bridge.stage1, losses, bridge.pairs(split, views, for_lm=False), recipe.stage1, out / "stage1",
              settings, name="stage 1", resume=resume, device=bridge.device)
    bridge.stage1.eval()
    if stages == 1:
        return bridge

    bridge.begin_stage2(views[0])

    losses = partial(stage2_losses, tokenizer=parts.lm_tokenizer, prompt=recipe.prompt)
    settings |= dict(stage1=weights_checksum(bridge.stage1), lm=weights_checksum(parts.lm), prompt=recipe.prompt,
                     warm_start=recipe.warm_start)
    with process_group():
        train(bridge.stage2, losses, bridge.pairs(split, views, for_lm=True), recipe.stage2, out / "stage2",
              settings, name="stage 2", resume=resume, device=bridge.device)
    bridge.stage2.eval()
    return bridge


def load_bridge(out: Path) -> Bridge:
    """The bridge that `train_bridge` left in `out`. Raises UserError when there is none."""
    if not (out / "run.json").exists():
        recipe = f"--recipe {out.name} " if out.name in RECIPES else ""
        raise UserError(f"{out.resolve()} holds no trained bridge: run `python -m minblip2 train {recipe}--out {out}` "
                        "first")
    told = read_json(out / "run.json")
    recipe = find_recipe(told["recipe"]).with_seed(told["seed"])
    parts = recipe.build(recipe, Path(told["data"]), Path(told["parts"]) if told["parts"] else None, out)
    bridge = Bridge(recipe, parts, recipe.new_stage1(parts))
    if not (out / "stage1" / "model.safetensors").exists():
        raise UserError(f"{out} stopped before the end of stage 1: run `python -m minblip2 train "
                        f"--recipe {recipe.name} --out {out}` again")
    load_weights(bridge.stage1, out / "stage1" / "model.safetensors")
    bridge.stage1.to(bridge.device).eval()
    if (out / "stage2" / "model.safetensors").exists():
        bridge.stage2 = recipe.new_stage2(parts, bridge.stage1)
        load_weights(bridge.stage2, out / "stage2" / "model.safetensors")
        bridge.stage2.to(bridge.device).eval()
    return bridge
