"""Stage 1 in seconds: a small Q-Former, batches of a part of the scenes, and runs that leave nothing behind."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..attention import MultiHeadAttention
from ..data.batches import PairBatches
from ..data.coco import CocoCaptions
from ..data.pictures import load_image
from ..data.tokenizer import normalize_caption
from ..qformer import QFormerConfig
from ..stage1 import Stage1
from ..training.bridge import Bridge
from ..training.loop import Batches, TrainConfig, train

PICTURES = 2000  # so many of the training pictures


def small_stage1(bridge: Bridge, seed: int = 0, embed_dim: int = 64, **changes) -> Stage1:
    """An untrained stage 1 that trains in seconds: two blocks, of which the first reads the picture."""
    torch.manual_seed(seed)
    config = QFormerConfig(width=64, layers=2, heads=4, mlp_width=128, num_queries=8, max_positions=32, dropout=0.0,
                           image_width=bridge.backbones.encoder.width, vocab_size=len(bridge.backbones.tokenizer),
                           init_std=0.06)
    return Stage1(replace(config, **changes), embed_dim)


def small_pairs(bridge: Bridge, split: CocoCaptions, features: np.ndarray, batch_size: int, seed: int = 0,
                shift: int = 0) -> PairBatches:
    """Batches of the first `PICTURES` pictures (features: n v e); `shift` gives each picture another one's captions."""
    tokenizer = bridge.backbones.tokenizer
    some = [(row, caption) for row, caption in split.pairs if row < PICTURES]
    ids = [tokenizer.encode(normalize_caption(caption)) for _, caption in some]
    rows = [(row + shift) % PICTURES for row, _ in some]
    image_ids = [record.id for record in split.images[:PICTURES]]
    return PairBatches([features[:PICTURES]], rows, ids, image_ids, batch_size, seed, tokenizer.pad_id)


def quietly(model: nn.Module, losses: Callable, batches: Batches, config: TrainConfig,
            folder: Path | None = None) -> list[dict]:
    """Train a model in place on the CPU, in float32, without a bar; the log. Nothing is kept but in `folder`."""
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as nowhere:
        return train(model, losses, batches, replace(config, precision="float32"), folder or nowhere,
                     device=torch.device("cpu"))


def mean_of(log: list[dict], name: str, first: int, last: int | None = None) -> float:
    """The mean of a logged number over a stretch of the log."""
    return float(np.mean([line[name] for line in log[first:last]]))


def cosines(stage1: Stage1, image_features: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """ITC's similarity (b n) of images (b v image_width) and texts (n t), without gradients."""
    with torch.no_grad():
        texts = stage1.embed_text(text_ids, text_mask)
        return stage1.similarity(stage1.embed_image(stage1.image_kv(image_features)), texts)


def with_dropout(stage1: Stage1, rate: float = 0.1) -> Stage1:
    """A copy of a stage 1 that drops out at this rate wherever BERT does."""
    model = copy.deepcopy(stage1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(module, MultiHeadAttention):
            module.dropout = rate
    return model


def pixels(bridge: Bridge, paths: Sequence[Path]) -> Tensor:
    """Image files as the frozen encoder reads them: (b c h w)."""
    return torch.stack([bridge.backbones.transform(load_image(path)) for path in paths])
