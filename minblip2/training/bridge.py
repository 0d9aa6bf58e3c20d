"""The whole: two frozen experts and the bridge between them. Train it by a recipe, load it, and give it images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import UserError
from ..data.batches import PairBatches
from ..data.coco import CocoCaptions
from ..data.features import weights_checksum
from ..data.tokenizer import Tokenizer, normalize_caption
from ..device import best_device
from ..stage1 import Stage1
from ..stage2 import Stage2
from ..weights.blip2 import Blip2
from ..weights.retriever import Retriever
from .checks import check_own_gpu, check_precision, open_split
from .distributed import env_rank_and_size, prepare_once, process_group, rank_and_size, set_local_device
from .loop import TrainConfig, load_weights, train
from .recipes import Backbones, Recipe, default_data, find_parts, find_recipe
from .records import is_begun, read_record, recorded_parts, write_record
from .stages import stage1_losses, stage2_losses


@dataclass
class Bridge:
    """A recipe's backbones with a trained stage 1 and, where it has come so far, stage 2.

    It trains; what is trained is used through `retriever` and `blip2`.
    """

    recipe: Recipe
    backbones: Backbones
    stage1: Stage1
    stage2: Stage2 | None = None
    device: torch.device | None = None  # without one, `best_device` of the recipe

    def __post_init__(self):
        self.device = self.device or best_device(self.recipe.device)

    @property
    def retriever(self) -> Retriever:
        """The image encoder and stage 1: similarity, retrieval, attention maps, captions by the Q-Former alone.

        Like `blip2`, it moves these models to the bridge's device and switches them to evaluation mode, in place.
        """
        backbones = self.backbones
        return Retriever(vit=backbones.encoder.to(self.device), transform=backbones.transform, precision="auto",
                         stage1=self.stage1.to(self.device).eval(), tokenizer=backbones.tokenizer,
                         max_length=self.recipe.max_length, beams=self.recipe.beams,
                         match_weight=self.recipe.match_weight)

    @property
    def blip2(self) -> Blip2:
        """The image encoder, stage 2 and the language model: captions and answers. Raises UserError before stage 2."""
        if self.stage2 is None:
            raise UserError("stage 2 is not trained yet: run the recipe to its end, or let `retriever` caption")
        backbones = self.backbones
        return Blip2(vit=backbones.encoder.to(self.device), transform=backbones.transform, precision="auto",
                     stage2=self.stage2.to(self.device).eval(), tokenizer=backbones.lm_tokenizer, packed=True,
                     prompt=self.recipe.prompt, question=self.recipe.question, beams=self.recipe.beams)

    def features(self, data: CocoCaptions, cache: Path, **view) -> np.memmap:
        """Frozen features (n v e) float16 of a split's images, computed once and kept in `cache`.

        `view` changes the transform: flip=True for mirrored images, crop=3 for the third random crop of each.
        """
        return self.retriever.cached_features(data.paths, cache, **view)

    def init_stage2(self, view: np.ndarray) -> None:
        """Start stage 2 from stage 1, with soft prompts that spread like words; view: features (n v e) of images."""
        self.stage2 = self.recipe.new_stage2(self.backbones, self.stage1).to(self.device)
        some = torch.from_numpy(np.array(view[:256], dtype=np.float32))
        self.stage2.match_embedding_scale(some.to(self.device))

    def stage1_pairs(self, data: CocoCaptions, views: Sequence[np.ndarray]) -> PairBatches:
        """Batches of a split for stage 1, in the Q-Former's ids."""
        return self._pairs(data, views, self.backbones.tokenizer, "", self.recipe.stage1)

    def stage2_pairs(self, data: CocoCaptions, views: Sequence[np.ndarray]) -> PairBatches:
        """Batches of a split for stage 2: prompt and caption in the language model's ids."""
        return self._pairs(data, views, self.backbones.lm_tokenizer, self.recipe.prompt, self.recipe.stage2)

    def stage1_settings(self, data: CocoCaptions) -> dict[str, Any]:
        """What a trained stage 1 depends on beside its `TrainConfig`; a run with others is another run."""
        texts = hashlib.sha256(repr(data.pairs).encode()).hexdigest()
        return dict(recipe=self.recipe.name, qformer=self.backbones.qformer, pairs=texts,
                    embed_dim=self.recipe.embed_dim, encoder=weights_checksum(self.backbones.encoder),
                    loss_weights=self.recipe.loss_weights)

    def stage2_settings(self, data: CocoCaptions) -> dict[str, Any]:
        """What a trained stage 2 depends on beside its `TrainConfig`."""
        return self.stage1_settings(data) | dict(
            stage1=weights_checksum(self.stage1), lm=weights_checksum(self.backbones.lm), prompt=self.recipe.prompt,
            warm_start=self.recipe.warm_start)

    def _pairs(self, data: CocoCaptions, views: Sequence[np.ndarray], tokenizer: Tokenizer, prompt: str,
               config: TrainConfig) -> PairBatches:
        ids = [tokenizer.encode(normalize_caption(text), prompt, self.recipe.max_length) for text in data.texts]
        return PairBatches(views, data.rows, ids, data.ids, config.batch_size, config.seed, tokenizer.pad_id,
                           self.recipe.keep_tokens, *rank_and_size())


def train_bridge(recipe: Recipe, data: Path | None, parts: Path | None, out: Path,
                 resume: bool = True, stages: int = 2, skip_broken: bool = False) -> Bridge:
    """Run a recipe from its frozen parts to the end of stage 2; all is kept under `out`, and a stopped run goes on.

    With `stages` = 1 it ends after stage 1; called again, it goes on from there. With `resume` = False everything is
    trained anew, the small experts of the scenes as well. With `skip_broken` pictures that cannot be read are left out.
    Started by torchrun, all processes train together; `out`, data and parts must be folders that all of them see.
    """
    find_recipe(recipe.name)  # under which the run will be read again
    check_precision(recipe)
    if best_device(recipe.device).type == "cuda":
        check_own_gpu()
        set_local_device()
    record, first = partial(write_record, out, recipe, skip_broken=skip_broken), env_rank_and_size()[0] == 0
    with prepare_once():
        data = default_data(recipe, out, data)
        if first and not resume:
            remove_stages(out)
        backbones = recipe.build(recipe, data, parts, out, resume or not first)  # the others find it done
        bridge = Bridge(recipe, backbones, recipe.new_stage1(backbones))
        out.mkdir(parents=True, exist_ok=True)
        split = open_split(data, "train", out, True) if skip_broken else CocoCaptions(data, "train")
        views = [bridge.features(split, out / "cache", **view) for view in recipe.views]
        if first and not (resume and is_begun(out)):
            record(data, parts)
    losses = partial(stage1_losses, loss_weights=recipe.loss_weights)
    with process_group(bridge.device):
        train(bridge.stage1, losses, bridge.stage1_pairs(split, views), recipe.stage1, out / "stage1",
              bridge.stage1_settings(split), name="stage 1", resume=resume, device=bridge.device)
    if first:  # `train` has not refused: this is the run that was begun, though its folders may have moved
        record(data, parts)
    bridge.stage1.eval()
    if stages == 1:
        return bridge

    bridge.init_stage2(views[0])
    losses = partial(stage2_losses, tokenizer=backbones.lm_tokenizer, prompt=recipe.prompt)
    with process_group(bridge.device):
        train(bridge.stage2, losses, bridge.stage2_pairs(split, views), recipe.stage2, out / "stage2",
              bridge.stage2_settings(split), name="stage 2", resume=resume, device=bridge.device)
    bridge.stage2.eval()
    return bridge


def remove_stages(out: Path) -> None:
    """Leave nothing of a run that could be taken for a part of the next one in its folder, should that be stopped."""
    for name in ("stage?/model.safetensors", "stage?/checkpoint.pt", "results-*.json"):
        for left in out.glob(name):
            left.unlink()


def check_finished(out: Path, part: str, recipe: Recipe) -> None:
    """Raises UserError where a run has not trained a part to its end."""
    if not (out / part / "model.safetensors").exists():
        raise UserError(f"{out} holds no finished {part}: run `python -m minblip2 train --recipe {recipe.name} "
                        f"--out {out}` again")


def load_bridge(out: Path, parts: Path | None = None) -> Bridge:
    """The bridge that `train_bridge` left in `out`, on its own frozen models or those in the folder `parts`.

    Raises UserError when there is none, or they are not there.
    """
    record = read_record(out)
    recipe = record.recipe
    parts = find_parts(recipe, parts or recorded_parts(record))
    for name in recipe.experts:  # `build` would train what is missing
        check_finished(out, name, recipe)
    backbones = recipe.build(recipe, record.data, parts, out)
    bridge = Bridge(recipe, backbones, recipe.new_stage1(backbones))
    check_finished(out, "stage1", recipe)
    load_weights(bridge.stage1, out / "stage1" / "model.safetensors")
    bridge.stage1.to(bridge.device).eval()
    if (out / "stage2" / "model.safetensors").exists():
        bridge.stage2 = recipe.new_stage2(backbones, bridge.stage1)
        load_weights(bridge.stage2, out / "stage2" / "model.safetensors")
        bridge.stage2.to(bridge.device).eval()
    return bridge
