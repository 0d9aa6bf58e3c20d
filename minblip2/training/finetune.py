"""Your own pictures and captions on official weights: stage 2 goes on from a BLIP-2 as the model hub has it.

Trained is what stage 2 trains: the query branch, the norm of the image features and the projection. Image encoder and
language model stay as they are, in bfloat16 or, if asked for, float32, and pictures are encoded once. The result is a
hub folder again.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..data.batches import Batch, PairBatches
from ..data.coco import CocoCaptions
from ..data.features import weights_checksum
from ..data.tokenizer import Tokenizer, normalize_caption
from ..device import DTYPE, best_device, compute_dtype
from ..stage2 import Stage2
from ..weights.blip2 import Blip2
from ..weights.checkpoint import export_tensors, open_hub, read_config, shards
from ..weights.export import save_trained
from ..weights.keymap import KeyMap, within
from ..weights.names import QFORMER
from ..weights.official import empty_blip2
from .budget import free_memory, kept_by_stage2, parameters
from .checks import check_trainable, long_captions
from .distributed import env_rank_and_size
from .loop import TrainConfig, train
from .stages import cut_prompt, prompt_of

MAX_LENGTH = 32  # ids of a caption, as in LAVIS

# What is trained, as the hub calls it.
TRAINED = KeyMap({}, {
    "vision_model.post_layernorm": "vision_norm",
    "query_tokens": "qformer.query_tokens",
    **within("qformer.", "qformer.", QFORMER.tensors),
    "language_projection": "projection"})


@dataclass(frozen=True)
class Cost:
    """What going on from a hub folder takes: parameters, and bytes of memory and of disk."""

    trained: int
    frozen: int
    dtype: torch.dtype
    memory: float
    features: int
    result: int

    def __str__(self) -> str:
        return (f"{self.trained:,} parameters are trained in float32, {self.frozen:,} are frozen in "
                f"{str(self.dtype).removeprefix('torch.')}: about {self.memory / 1e9:.1f} GB of memory; on disk "
                f"{self.features / 1e9:.2f} GB of features and {self.result / 1e9:.1f} GB of weights")


def settings_for(pairs: int, batch_size: int | None = None, steps: int | None = None, learning_rate: float = 1e-5,
                 seed: int = 0) -> TrainConfig:
    """LAVIS's settings for captions (caption_coco_ft.yaml), for as many (picture, caption) pairs as there are.

    Five passes or 200 steps, whichever is more, in batches of 32 or of all pairs, unless something else is asked for.
    Raises UserError for a batch that is larger than all of them.
    """
    batch_size = batch_size or min(32, pairs)
    if not 2 <= batch_size <= pairs:
        raise UserError(f"batch size is {batch_size} for {pairs} pairs of picture and caption: give 2 pairs or more, "
                        "and a --batch-size from 2 to their number")
    steps = steps or max(200, math.ceil(5 * pairs / batch_size))
    return TrainConfig(steps=steps, batch_size=batch_size, learning_rate=learning_rate, warmup=min(1000, steps // 10),
                       min_lr_ratio=0.0, betas=(0.9, 0.999), seed=seed)


def frozen_dtype() -> torch.dtype:
    """The dtype of the frozen parts: bfloat16, or what MINBLIP2_DTYPE names. Raises UserError for float16."""
    dtype = compute_dtype(best_device()) if os.environ.get(DTYPE) else torch.bfloat16
    check_trainable(dtype)
    return dtype


def cost(folder: str | Path, pictures: int, batch_size: int) -> Cost:
    """What it takes to go on from a hub folder with so many pictures, from its settings and the sizes of its files.

    Nothing is loaded; memory is an estimate, see `budget.estimate`.
    """
    read_config(folder)  # what this is no folder of is said first
    checkpoint, dtype = open_hub(folder), frozen_dtype()
    vit, stage2, _ = empty_blip2(folder, checkpoint, dtype)
    lm, config = stage2.lm, stage2.qformer.config
    frozen, trained = parameters(vit) + parameters(lm), parameters(stage2) - parameters(lm)
    tokens, value = vit.position_embedding.shape[-2], dtype.itemsize
    memory = 16 * trained + value * frozen + kept_by_stage2(batch_size, config, lm, tokens, value)
    return Cost(trained, frozen, dtype, memory, 2 * pictures * tokens * vit.width,
                sum(path.stat().st_size for path in shards(Path(folder))))


def caption_ids(blip2: Blip2, captions: Sequence[str], prompt: str) -> list[list[int]]:
    """Captions as the language model learns to write them, each behind the prompt, as BLIP-2's are cleaned."""
    return [blip2.tokenizer.encode(normalize_caption(caption), prompt, MAX_LENGTH) for caption in captions]


def caption_losses(model: Stage2, batch: Batch, prompt_ids: list[int], first: int) -> dict[str, Tensor]:
    """Nats for each piece of a word that follows the prompt, which all texts begin with, for `first` ids."""
    return {"loss": model(batch.image_features, *cut_prompt(batch, prompt_ids, first)).loss}


@torch.no_grad()
def measured_loss(blip2: Blip2, data: CocoCaptions, features: np.ndarray, prompt: str, batch_size: int = 16) -> float:
    """Nats for each piece of a word of a split's captions."""
    device, (prompt_ids, first) = blip2.device, prompt_of(blip2.tokenizer, prompt)
    rows, ids = data.rows, caption_ids(blip2, data.texts, prompt)
    blip2.stage2.eval()
    total = count = 0.0
    for i in range(0, len(ids), batch_size):
        text_ids, mask = blip2.tokenizer.pad(ids[i : i + batch_size])
        image = torch.from_numpy(np.stack([features[row] for row in rows[i : i + batch_size]]).astype(np.float32))
        batch = Batch(image, text_ids, mask, torch.tensor(rows[i : i + batch_size])).to(device)
        pieces = int(mask[:, first:].sum())
        total += pieces * float(caption_losses(blip2.stage2, batch, prompt_ids, first)["loss"])
        count += pieces
    return total / count


def check_texts(folder: str | Path, data: CocoCaptions, prompt: str) -> list[str]:
    """What is to be said of captions that are longer than a text may be. Raises UserError for such a prompt."""
    count = long_captions(data, Tokenizer.from_folder(folder), prompt, MAX_LENGTH)
    return [f"{count:,} of {len(data.pairs):,} captions are longer than {MAX_LENGTH} ids, with the prompt, and lose "
            "their last words"] if count else []


def load_for_training(folder: str | Path, pictures: int, batch_size: int, needed: Cost | None = None) -> Blip2:
    """The BLIP-2 of a hub folder, its frozen parts as `frozen_dtype` says.

    `needed` is its `cost`, where that is known already. Raises UserError where training it on batches of that size
    takes more memory than is free.
    """
    device = best_device()
    needed, free = needed or cost(folder, pictures, batch_size), free_memory(device)
    if free is not None and needed.memory > free:
        raise UserError(f"{folder} takes about {needed.memory / 1e9:.1f} GB of memory to train on batches of "
                        f"{batch_size}, but {free / 1e9:.1f} GB are free: choose a smaller --batch-size")
    return Blip2.from_folder(folder, frozen_dtype(), device)


def check_one_process() -> None:
    """Raises UserError where torchrun has started several."""
    if env_rank_and_size()[1] > 1:
        raise UserError("going on from a hub folder runs in one process: start it without torchrun")


def finetune(blip2: Blip2, folder: str | Path, data: CocoCaptions, features: np.ndarray, out: Path,
             config: TrainConfig, prompt: str = "", resume: bool = True) -> list[dict]:
    """Train stage 2 of a BLIP-2 from `folder` in place and write it to `out`, a hub folder again. Returns the log.

    features (n v e) are those of the data's pictures. A stopped run goes on where it was. Raises UserError as `train`.
    """
    check_one_process()
    prompt_ids, first = prompt_of(blip2.tokenizer, prompt)
    batches = PairBatches([features], data.rows, caption_ids(blip2, data.texts, prompt), data.ids,
                          config.batch_size, config.seed, blip2.tokenizer.pad_id)
    settings = dict(model=weights_checksum(blip2.stage2), prompt=prompt,
                    pairs=hashlib.sha256(repr(data.pairs).encode()).hexdigest())
    losses = partial(caption_losses, prompt_ids=prompt_ids, first=first)
    log = train(blip2.stage2, losses, batches, config, out / "stage2", settings, name="stage 2", resume=resume,
                device=blip2.device)
    blip2.stage2.eval()
    save_trained(out, folder, collect_trained(blip2.stage2))
    return log


def collect_trained(stage2: Stage2) -> dict[str, Tensor]:
    """What stage 2 trains, under the names that the hub has for it."""
    parts = torch.nn.ModuleDict(dict(vision_norm=stage2.vision_norm, qformer=stage2.qformer,
                                     projection=stage2.projection))
    return export_tensors(parts, TRAINED)
