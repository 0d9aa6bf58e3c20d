"""Stage 2: what the queries read becomes a soft prompt for a frozen language model (paper §3.3).

Source: LAVIS `lavis/models/blip2_models/blip2_opt.py` and `blip2_t5.py`; transformers `Blip2ForConditionalGeneration`.
Unlike LAVIS, the language model stays in evaluation mode while the bridge trains: frozen means frozen.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from . import UserError, masks
from .attention import KVCache
from .generation import generate
from .qformer import QFormer
from .stage1 import OneProcess, Stage1


class Stage2Output(NamedTuple):
    """Mean negative log-likelihood of the supervised words, and their logits (n vocabulary)."""

    loss: Tensor
    word_logits: Tensor


class Stage2(nn.Module):
    """Vision norm, query branch, projection (trained) and a language model (frozen) of either kind; see `lm`.

    Raises UserError when the language model's vocabulary is smaller than `vocabulary_needed`, its tokenizer's.
    """

    def __init__(self, vision_norm: nn.LayerNorm, qformer: QFormer, lm: nn.Module, vocabulary_needed: int = 0):
        super().__init__()
        if vocabulary_needed > lm.vocabulary:
            raise UserError(f"the tokenizer has {vocabulary_needed} ids but the language model only {lm.vocabulary}: "
                            "take both from the same model folder")
        self.vision_norm, self.qformer = copy.deepcopy(vision_norm), qformer.query_branch()
        self.projection = nn.Linear(qformer.config.width, lm.width)
        self.lm = lm.requires_grad_(False).eval()

    @classmethod
    def from_stage1(cls, stage1: Stage1, lm: nn.Module, vocabulary_needed: int = 0) -> Stage2:
        """Start from what stage 1 has learned (copied; the text branch is left behind)."""
        return cls(stage1.vision_norm, stage1.qformer, lm, vocabulary_needed)

    def train(self, mode: bool = True) -> Stage2:
        """Switch the bridge to training; the language model stays in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def soft_prompt(self, image: Tensor) -> Tensor:
        """Image features (b v image_width) as tokens (b q e) of the language model's width."""
        image = image.to(self.vision_norm.weight.dtype)
        return self.projection(self.qformer(self.qformer.project_image(image, self.vision_norm)).queries)

    @torch.no_grad()
    def calibrate(self, image: Tensor) -> None:
        """Set the projection's scale and bias so that soft prompts spread like words; image (b v image_width).

        What differs from image to image gets the spread of the word embeddings, around their mean. As PyTorch
        initialises it, the prompt is several times louder than words and says nearly the same of every image.
        """
        words = self.lm.embed(torch.arange(self.lm.vocabulary, device=image.device)).float()
        soft = self.soft_prompt(image).float()
        gain = words.std() / (soft - soft.mean(dim=0)).std()
        shift = words.mean(dim=0) - gain * (soft.mean(dim=(0, 1)) - self.projection.bias)
        self.projection.weight.mul_(gain)
        self.projection.bias.copy_(shift)

    def read(self, image: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Let the language model take in [image ; prompt]; see `lm` for what comes back."""
        words = self.lm.embed(prompt_ids)
        soft = self.soft_prompt(image).to(words.dtype)
        visible = F.pad(prompt_mask, (soft.shape[1], 0), value=True)
        return self.lm.read(torch.cat([soft, words], dim=1), visible, cache)

    def forward(self, image: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, text_ids: Tensor,
                text_mask: Tensor, ranks: OneProcess = OneProcess()) -> Stage2Output:
        """Loss of texts (b t), padded on the right, given image features (b v image_width) and prompts (b t).

        Prompts may be empty, and padded on any side. Every word of a text is learned: the first is predicted from what
        was read, each other one from the words before it as well. Only those positions meet the vocabulary. `ranks`
        says who holds the rest of the batch, of which the loss is the mean.
        """
        cache = KVCache()
        first, visible = self.read(image, prompt_ids, prompt_mask, cache)
        seen = torch.cat([visible, text_mask[:, :-1]], dim=1)
        later = self.lm(self.lm.embed(text_ids[:, :-1]), masks.causal(seen)[:, :, visible.shape[1]:], cache)
        hidden = torch.cat([rearrange(first, "b e -> b 1 e"), later], dim=1)
        logits = self.lm.head(hidden[text_mask]).float()
        return Stage2Output(ranks.mean(F.cross_entropy(logits, text_ids[text_mask]), len(logits)), logits)

    @torch.no_grad()
    def generate(self, image: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, end: int, **decoding) -> Tensor:
        """Ids (b t) written after [image ; prompt], filled with `end`; prompt ids and mask (b t), padded on any side.

        A prompt may be empty. See `generation.generate` for the ways of decoding, `packed` for speed on a CPU.
        """
        cache = KVCache()
        first, visible = self.read(image, prompt_ids, prompt_mask, cache)

        def step(ids: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
            return self.lm.head(self.lm(self.lm.embed(ids), mask, cache)[:, -1])

        return generate(step, self.lm.head(first), visible, cache, end=end, begun=self.lm.begun, **decoding)


def split_prefix(text_ids: Tensor, text_mask: Tensor, end: int,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut texts [words end] (b t) in two for an encoder-decoder: the first part is given, the rest is to be written.

    The cut falls anywhere from after the first word to the middle (paper §3.3; the authors in LAVIS issue 139); a text
    of one word is written whole. Returns prompt ids and mask, closed by `end`, then text ids and mask: all (b t).
    """
    words = reduce(text_mask.long(), "b t -> b 1", "sum") - 1
    place = repeat(torch.arange(text_ids.shape[1], device=text_ids.device), "t -> b t", b=len(text_ids))
    draw = torch.rand(len(text_ids), 1, generator=generator).to(text_ids.device)
    cut = (1 + (draw * (words // 2)).long()).clamp(max=words // 2)
    after = (place + cut).clamp(max=text_ids.shape[1] - 1)
    return (text_ids.masked_fill(place >= cut, end), place <= cut,
            text_ids.gather(1, after), place <= words - cut)
