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
from .lm.protocol import LanguageModel
from .qformer import QFormer
from .stage1 import Stage1


class Stage2Output(NamedTuple):
    """Mean negative log-likelihood of the supervised words, and their logits (n vocab_size)."""

    loss: Tensor
    word_logits: Tensor


class Stage2(nn.Module):
    """Vision norm, query branch, projection (trained) and a frozen language model of either kind; see `lm.protocol`.

    Raises UserError when the language model has fewer ids than `vocab_needed`, its tokenizer's.
    """

    def __init__(self, vision_norm: nn.LayerNorm, qformer: QFormer, lm: LanguageModel, vocab_needed: int = 0):
        super().__init__()
        if vocab_needed > lm.vocab_size:
            raise UserError(f"the tokenizer has {vocab_needed} ids but the language model only {lm.vocab_size}: "
                            "take both from the same model folder")
        self.vision_norm, self.qformer = copy.deepcopy(vision_norm), qformer.query_branch()
        self.projection = nn.Linear(qformer.config.width, lm.width)
        self.lm = lm.requires_grad_(False).eval()

    @classmethod
    def from_stage1(cls, stage1: Stage1, lm: LanguageModel, vocab_needed: int = 0) -> Stage2:
        """Start from what stage 1 has learned (copied; the text branch is left behind)."""
        return cls(stage1.vision_norm, stage1.qformer, lm, vocab_needed)

    def train(self, mode: bool = True) -> Stage2:
        """Switch the bridge to training; the language model stays in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        return self

    def soft_prompt(self, image_features: Tensor) -> Tensor:
        """Image features (b v image_width) as tokens (b q e) of the language model's width."""
        normalised = self.vision_norm(image_features.to(self.vision_norm.weight))
        return self.projection(self.qformer(self.qformer.project_image(normalised)).queries)

    @torch.no_grad()
    def match_embedding_scale(self, image_features: Tensor) -> None:
        """Set the projection's scale and bias so that soft prompts spread like words.

        image_features (b v image_width). What differs from image to image gets the spread of the word
        embeddings, around their mean. As PyTorch initialises it, the prompt is several times as long
        as words. Measured and left in evaluation mode: dropout would be taken for what differs.
        Raises UserError where the images' soft prompts are all alike.
        """
        self.eval()
        words = self.lm.embed(torch.arange(self.lm.vocab_size, device=image_features.device)).float()
        soft = self.soft_prompt(image_features).float()
        scale = words.std() / (soft - soft.mean(dim=0)).std()
        if not scale < 1e5 * words.std() / soft.std():
            raise UserError("all these images have the same soft prompt: give several that differ")
        shift = words.mean(dim=0) - scale * (soft.mean(dim=(0, 1)) - self.projection.bias)
        self.projection.weight.mul_(scale)
        self.projection.bias.copy_(shift)

    def given(self, image_features: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the language model is given: [soft prompt ; prompt] (b s e) and its mask (b s)."""
        prompt = self.lm.embed(prompt_ids)
        soft = self.soft_prompt(image_features).to(prompt.dtype)
        return torch.cat([soft, prompt], dim=1), F.pad(prompt_mask.bool(), (soft.shape[1], 0), value=True)

    def forward(self, image_features: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, text_ids: Tensor,
                text_mask: Tensor) -> Stage2Output:
        """Loss of texts (b t), padded on the right, given image features and prompts (b t).

        image_features (b v image_width). Prompts may be empty, and padded on any side. Every word of a
        text is learned: each is predicted from what was given and the words before it, and only these
        states meet the vocabulary.
        """
        text_mask = text_mask.bool()
        given, given_mask = self.given(image_features, prompt_ids, prompt_mask)
        hidden = self.lm.teacher_forcing(given, given_mask, self.lm.embed(text_ids), text_mask)
        logits = self.lm.lm_logits(hidden[text_mask]).float()
        return Stage2Output(F.cross_entropy(logits, text_ids[text_mask]), logits)

    @torch.no_grad()
    def generate(self, image_features: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, eos_id: int,
                 **decoding) -> Tensor:
        """Ids (b t) written after [image ; prompt], filled with `eos_id`.

        Prompts (b t) may be empty, or padded on any side. See `generation.generate` for the ways of
        decoding, `lm.packed` for speed on a CPU.
        """
        cache = self.lm.new_cache()
        first, attention_mask = self.lm.prefill(*self.given(image_features, prompt_ids, prompt_mask), cache)

        def step(ids: Tensor, attention_mask: Tensor, cache: KVCache) -> Tensor:
            mask, position = rearrange(attention_mask, "b k -> b 1 1 k"), masks.token_positions(attention_mask)[:, -1:]
            return self.lm.lm_logits(self.lm(self.lm.embed(ids), mask, position, cache)[:, -1])

        return generate(step, self.lm.lm_logits(first), attention_mask, cache, eos_id=eos_id,
                        decoder_start_ids=self.lm.decoder_start_ids, **decoding)


def split_prefix(text_ids: Tensor, text_mask: Tensor, eos_id: int,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut texts [words eos] (b t) in two for an encoder-decoder: the first part is given, the rest is to be written.

    The cut falls anywhere from after the first word to the middle (paper §3.3; the authors in LAVIS issue 139); a text
    of one word is written whole. Returns prompt ids and mask, closed by `eos_id`, then text ids and mask: all (b t).
    """
    words = reduce(text_mask.long(), "b t -> b 1", "sum") - 1
    place = repeat(torch.arange(text_ids.shape[1], device=text_ids.device), "t -> b t", b=len(text_ids))
    draw = torch.rand(len(text_ids), 1, generator=generator).to(text_ids.device)
    cut = (1 + (draw * (words // 2)).long()).clamp(max=words // 2)
    after = (place + cut).clamp(max=text_ids.shape[1] - 1)
    return (text_ids.masked_fill(place >= cut, eos_id), place <= cut,
            text_ids.gather(1, after), place <= words - cut)
