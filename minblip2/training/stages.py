"""What one step of each stage computes on a batch; and both, trained on frozen features of your own."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from ..data.batches import Batch, PairBatches
from ..data.coco import has_word
from ..data.features import weights_checksum
from ..data.tokenizer import Tokenizer, normalize_caption, require_known
from ..stage1 import Stage1
from ..stage2 import Stage2, split_prefix
from ..weights.blip2 import require_positions
from .distributed import batch_mean, rank_and_size
from .loop import TrainConfig, train


def stage1_losses(model: Stage1, batch: Batch, loss_weights: tuple[float, float, float] = (1, 1, 1)
                  ) -> dict[str, Tensor]:
    """The three losses of a batch, their weighted sum, and how often matching is right (a constant
    gives 2/3).
    """
    out = model(batch.image_features, batch.text_ids, batch.text_mask, batch.image_ids)
    loss = out.loss + sum((weight - 1) * part  # what a subclass has added to the sum stays in it
                          for weight, part in zip(loss_weights, (out.itc, out.itm, out.itg), strict=True))
    right = (out.itm_logits.argmax(dim=1) == out.itm_labels).float().mean()
    return dict(loss=loss, itc=out.itc, itm=out.itm, itg=out.itg, temperature=out.temperature,
                itm_accuracy=batch_mean(right, len(batch.image_ids)))


def prompt_and_target(batch: Batch, tokenizer: Tokenizer, prompt: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the language model is given of a batch's texts, and what it learns to write.

    Returns ids and mask (b t) of each. All are given the prompt, with which the batch's ids begin.
    Without one, an encoder-decoder is given the beginning of the text itself: see `split_prefix`.
    """
    if tokenizer.prompt_end and not prompt:
        return split_prefix(batch.text_ids, batch.text_mask, tokenizer.eos_id)
    return cut_prompt(batch, *prompt_of(tokenizer, prompt))


def prompt_of(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], int]:
    """A prompt's ids as the model is given them, and with how many of them each text begins."""
    ids = tokenizer.encode_prompt(prompt)
    return ids, len(ids) - len(tokenizer.prompt_end)


def cut_prompt(batch: Batch, ids: list[int], first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `prompt_and_target`, for a prompt as `prompt_of` gives it."""
    given = torch.tensor(ids, device=batch.text_ids.device).long().expand(len(batch.text_ids), -1)
    return given, torch.ones_like(given, dtype=torch.bool), batch.text_ids[:, first:], batch.text_mask[:, first:]


def stage2_losses(model: Stage2, batch: Batch, tokenizer: Tokenizer, prompt: str) -> dict[str, Tensor]:
    """The loss of a batch whose texts are the language model's and begin with the prompt: nats a token."""
    return {"loss": model(batch.image_features, *prompt_and_target(batch, tokenizer, prompt)).loss}


def train_stage1(stage1: Stage1, features: np.ndarray | Tensor, captions: Sequence[str | Sequence[str]],
                 config: TrainConfig, folder: str | Path | None = None, tokenizer: Tokenizer | None = None,
                 max_length: int = 32) -> list[dict]:
    """Train stage 1 in place on frozen features (n v e) with one caption, or several, for each image; returns the log.

    `folder` keeps the log, checkpoints and weights, and a stopped run goes on from it; without one nothing is kept.
    Trained, it is in evaluation mode. The tokenizer is the one that `Stage1.for_features` was given; of a caption
    `max_length` ids are read, if the Q-Former has so many positions. Raises UserError when features and captions are
    not equally many, for features of another shape or width, for a caption without a word, and as
    `training.loop.train`.
    """
    tokenizer = tokenizer or getattr(stage1, "tokenizer", None)
    if tokenizer is None:
        raise UserError("this stage 1 knows no tokenizer: make it with Stage1.for_features, or give tokenizer=")
    longest = min(max_length, stage1.qformer.config.max_positions)
    return _train_on(stage1, stage1_losses, features, captions, tokenizer, "", longest, config, folder, "stage 1")


def train_stage2(stage2: Stage2, features: np.ndarray | Tensor, captions: Sequence[str | Sequence[str]],
                 config: TrainConfig, tokenizer: Tokenizer, prompt: str = "", folder: str | Path | None = None,
                 max_length: int = 32) -> list[dict]:
    """Train stage 2 in place on features and captions as `train_stage1` takes them; returns the log.

    The tokenizer is the language model's. Each caption stands behind the prompt, and `max_length` counts the ids of
    both. Training starts from the projection as it is; recipes call `stage2.match_embedding_scale` on some features
    first. Raises UserError as `train_stage1`.
    """
    losses = partial(stage2_losses, tokenizer=tokenizer, prompt=prompt)
    return _train_on(stage2, losses, features, captions, tokenizer, prompt, max_length, config, folder, "stage 2")


def room_for_words(tokenizer: Tokenizer, prompt: str, max_length: int) -> int:
    """How many of the `max_length` ids of a text are left for words. Raises UserError where there are none."""
    room = max_length - 1 - len(tokenizer.bos_ids) - len(tokenizer.token_ids(prompt))
    if room < 1:
        raise UserError(f"a text may have {max_length} ids, and start, end and the prompt {prompt[:40]!r} take "
                        f"{max_length - room} of them, so no word of a caption is left: shorten the prompt")
    return room


def _train_on(model: Stage1 | Stage2, losses: Callable[..., dict[str, Tensor]], features: np.ndarray | Tensor,
              captions: Sequence[str | Sequence[str]], tokenizer: Tokenizer, prompt: str, max_length: int,
              config: TrainConfig, folder: str | Path | None, name: str) -> list[dict]:
    sizes = model.qformer.config
    features = features.detach().float().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if features.ndim != 3 or features.shape[2] != sizes.image_width:
        raise UserError(f"features are {features.shape}, and this {name} reads (n v {sizes.image_width}): give all "
                        "visual tokens of each image, from the encoder that it was made for")
    if len(features) != len(captions):
        raise UserError(f"there are features of {len(features)} images and captions of {len(captions)}: give as many")
    texts = [(row, text) for row, some in enumerate(captions) for text in ([some] if isinstance(some, str) else some)]
    for row, text in texts:
        if not has_word(text):
            raise UserError(f"captions[{row}] has {text!r}, which holds no word: leave it out, or write one")
    for row, one in enumerate(features):  # one by one: a file of features may be larger than the memory
        if not np.isfinite(one).all():
            raise UserError(f"features[{row}] are not finite: look at what the encoder was given")
    room_for_words(tokenizer, prompt, max_length)
    ids = [tokenizer.encode(normalize_caption(text), prompt, max_length) for _, text in texts]
    if isinstance(model, Stage2):
        require_positions(model, 0, max(map(len, ids), default=0))
    require_known([*ids, [tokenizer.pad_id]], model.lm.vocab_size if isinstance(model, Stage2) else sizes.vocab_size)
    batches = PairBatches([features], [row for row, _ in texts], ids, range(len(features)), config.batch_size,
                          config.seed, tokenizer.pad_id, None, *rank_and_size())
    settings = {} if folder is None else dict(  # what a run in the folder must have been trained on, to go on
        qformer=sizes, pairs=hashlib.sha256(repr((texts, ids)).encode()).hexdigest(),
        features=hashlib.sha256(np.ascontiguousarray(features)).hexdigest(),
        frozen=weights_checksum(model.lm) if isinstance(model, Stage2) else "",
        label_smoothing=getattr(model, "label_smoothing", 0.0))
    with tempfile.TemporaryDirectory() as nowhere:
        log = train(model, losses, batches, config, folder or nowhere, settings, name=name)
    model.eval()
    return log
