"""Stage 2: what the queries read becomes a soft prompt for a frozen language model (paper §3.3).

Source: LAVIS `lavis/models/blip2_models/blip2_opt.py`; transformers `Blip2ForConditionalGeneration`. Unlike LAVIS, the
language model stays in evaluation mode while the bridge trains: frozen means frozen.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import UserError, masks
from .attention import KVCache
from .generation import generate
from .qformer import QFormer
from .stage1 import Stage1


class Stage2Output(NamedTuple):
    """Mean negative log-likelihood of the supervised words, and their logits (n vocabulary)."""

    loss: Tensor
    word_logits: Tensor


class Stage2(nn.Module):
    """Vision norm, query branch, projection (trained) and a decoder-only language model (frozen).

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
        return self.projection(self.qformer(self.qformer.project_image(self.vision_norm(image))).queries)

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

    def forward(self, image: Tensor, text_ids: Tensor, text_mask: Tensor, prompt_length: int = 0) -> Stage2Output:
        """Loss of the texts given the images: features (b v image_width), ids (b t), mask (b t), padded on the right.

        The first `prompt_length` ids are given, not learned. Every other word is predicted from the one before it, the
        first of all from the last query; only those positions meet the vocabulary.
        """
        prompt = self.soft_prompt(image)
        q = prompt.shape[1]
        embeds = torch.cat([prompt, self.lm.embed(text_ids)], dim=1)
        hidden = self.lm(embeds, masks.causal(F.pad(text_mask, (q, 0), value=True)))
        supervised = text_mask & (torch.arange(text_ids.shape[1], device=text_ids.device) >= prompt_length)
        logits = self.lm.head(hidden[:, q - 1 : -1][supervised]).float()
        return Stage2Output(F.cross_entropy(logits, text_ids[supervised]), logits)

    @torch.no_grad()
    def generate(self, image: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, end: int, **decoding) -> Tensor:
        """Ids (b t) written after [image ; prompt], filled with `end`; prompt ids and mask (b t), padded on any side.

        A prompt may be empty. See `generation.generate` for the ways of decoding.
        """
        soft, cache = self.soft_prompt(image), KVCache()
        embeds = torch.cat([soft, self.lm.embed(prompt_ids).to(soft.dtype)], dim=1)
        visible = F.pad(prompt_mask, (soft.shape[1], 0), value=True)
        hidden = self.lm(embeds, masks.causal(visible), cache)
        newest = visible.long().cumsum(dim=1).argmax(dim=1)  # not -1: an empty prompt ends in padding
        logits = self.lm.head(hidden[torch.arange(len(hidden), device=newest.device), newest])

        def step(ids: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
            return self.lm.head(self.lm(self.lm.embed(ids), mask, cache)[:, -1])

        return generate(step, logits, visible, cache, end=end, **decoding)
