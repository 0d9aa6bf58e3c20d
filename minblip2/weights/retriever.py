"""Images and texts compared by stage 1: similarity (ITC), retrieval re-ranked by matching (ITM), and attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import UserError
from ..data.coco import has_word
from ..data.tokenizer import Tokenizer, normalize_caption, require_known
from ..data.transforms import Transform
from ..device import autocast, best_device, compute_dtype
from ..stage1 import Stage1
from ..vit import to_grid
from .checkpoint import require_folder
from .official import load_stage1
from .pretrained import load_vit
from .reader import CAPTION, ImageReader, Images, completed, is_single

Texts = str | Sequence[str]


@torch.no_grad()
def pair_logits(stage1: Stage1, image_features: Tensor, text_ids: Tensor, text_mask: Tensor, image_rows: Tensor,
                text_rows: Tensor, batch_size: int = 32) -> Tensor:
    """ITM's logits (n 2) of no match / match for pairs of image `image_rows` (n) and text `text_rows` (n), on the CPU.

    image_features (b v image_width), texts (b t). An image's keys and values are projected once, however many texts it
    meets, `batch_size` of them at a time; the short ones come first, so that there is little padding.
    """
    logits, lengths, device = torch.empty(len(image_rows), 2), text_mask.sum(dim=1).cpu(), text_ids.device
    order = lengths[text_rows].argsort()
    for image in image_rows.unique().tolist():
        image_kv = stage1.image_kv(image_features[image:image + 1].to(device).float())
        for some in order[image_rows[order] == image].split(batch_size):
            rows, longest = text_rows[some].to(device), int(lengths[text_rows[some]].max())
            ids, mask = text_ids[rows, :longest], text_mask[rows, :longest]
            logits[some] = stage1.itm_logits(image_kv.select(torch.zeros_like(rows)), ids, mask).float().cpu()
    return logits


def listed(texts: Texts) -> list[str]:
    """Texts as a list, which one alone may stand for. Raises UserError where there are none."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UserError("there is no text to compare with images: give at least one")
    return texts


@dataclass(kw_only=True)
class Retriever(ImageReader):
    """A frozen image encoder and stage 1. Images are given as `ImageReader` says; `max_length` counts a text's ids.

    Wherever texts are asked for, one alone is a list of one. Raises UserError for no text, or one without a word.
    `match_weight` says how `rerank` adds up ITC and ITM; None: as LAVIS does. `writes`: whether its LM head is trained.
    """

    stage1: Stage1
    tokenizer: Tokenizer
    max_length: int = 32
    beams: int = 1
    match_weight: float | None = None
    writes: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_length = min(self.max_length, self.stage1.qformer.config.max_positions)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None,
                    device: torch.device | None = None) -> Retriever:
        """Load a `Blip2ForImageTextRetrieval` with its tokenizer and preprocessing files, in evaluation mode.

        Without `dtype`, the frozen encoder is in bfloat16 where the device computes in it, else in float32.
        Raises UserError when a file is missing or belongs to something else.
        """
        require_folder(folder)
        device = device or best_device()
        stage1 = load_stage1(folder)  # which says what another kind of model is for
        tokenizer, transform = Tokenizer.from_folder(folder), Transform.from_folder(folder)  # fail before the long part
        if tokenizer.dec_id is None:
            raise UserError(f"{folder} has a tokenizer that is no BERT's: copy tokenizer.json from the model's own "
                            "folder")
        vit = load_vit(folder, dtype or compute_dtype(device))
        return cls(vit=vit.to(device).eval(), transform=transform, stage1=stage1.to(device).eval(), tokenizer=tokenizer,
                   max_length=35, writes=False)  # 35 as LAVIS measures retrieval, `compute_sim_matrix`

    def text_ids(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """Texts as the Q-Former reads them: ids and mask (b t). Raises UserError for no text, or one without a word."""
        texts = listed(texts)
        for text in texts:
            if not has_word(text):
                raise UserError(f"{text!r} holds no word that can be compared with an image: write a phrase")
        rows = [self.tokenizer.encode(normalize_caption(text), max_length=self.max_length) for text in texts]
        require_known(rows, self.stage1.qformer.config.vocab_size)
        ids, mask = self.tokenizer.pad(rows)
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def embed_images(self, images: Images) -> Tensor:
        """Unit vectors (n q e), one for each query, in float32."""
        self.stage1.eval()
        embeds = []
        for features in self.chunks(images, 100):
            with autocast(self.device, self.precision):
                embeds.append(self.stage1.embed_image(self.stage1.image_kv(features)).float())
        return torch.cat(embeds)

    @torch.no_grad()
    def embed_texts(self, texts: Texts) -> Tensor:
        """Unit vectors (m e), in float32."""
        self.stage1.eval()
        texts = listed(texts)
        with autocast(self.device, self.precision):
            embeds = [self.stage1.embed_text(*self.text_ids(texts[i:i + 100])).float()
                      for i in range(0, len(texts), 100)]
        return torch.cat(embeds)

    def similarity(self, images: Images, texts: Texts) -> Tensor:
        """ITC's cosines (n m), on the CPU."""
        text_embeds = self.embed_texts(texts)
        image_embeds = self.embed_images(images)
        return torch.cat([self.stage1.similarity(some, text_embeds) for some in image_embeds.split(50)]).cpu()

    def match_logits(self, images: Images, texts: Texts, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """ITM's logits of "match" (n) for the pairs of image `image_rows` (n) and text `text_rows` (n), on the CPU."""
        return self.pair_logits(images, texts, image_rows, text_rows)[:, 1]

    def pair_logits(self, images: Images, texts: Texts, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """ITM's logits (n 2) of no match / match for the same pairs, on the CPU."""
        with autocast(self.device, self.precision):
            return pair_logits(self.stage1.eval(), self.encode_images(images), *self.text_ids(texts), image_rows,
                               text_rows)

    def match(self, images: Images, texts: Texts) -> Tensor:
        """ITM's probability (n m) that each text fits each image, on the CPU."""
        texts, features = listed(texts), self.encode_images(images)
        rows = torch.cartesian_prod(torch.arange(len(features)), torch.arange(len(texts)))
        match = self.pair_logits(features, texts, *rows.T).softmax(dim=1)[:, 1]
        return match.reshape(len(features), len(texts))

    def rerank(self, images: Images, texts: Texts, cosine: Tensor, top: int, dim: int) -> Tensor:
        """Scores (n m) after matching has seen the `top` best; the others stand below all of them, in ITC's order.

        cosine (n m) of images and texts; dim=1 re-ranks each image's texts, dim=0 each text's images.
        """
        rows = self.candidates(cosine, top, dim)
        return self.reranked(cosine, rows, self.pair_logits(images, texts, *rows))

    def reranked(self, cosine: Tensor, rows: tuple[Tensor, Tensor], logits: Tensor) -> Tensor:
        """The scores (n m) of `rerank`, where ITM's logits (k 2) of the candidates (k each) are known."""
        best = self.combined(cosine[rows], logits)
        scores = cosine + best.min() - 3  # cosines reach from -1 to 1: all stay below
        scores[rows] = best
        return scores

    @staticmethod
    def candidates(cosine: Tensor, top: int, dim: int) -> tuple[Tensor, Tensor]:
        """Rows of images and texts (n each) of the pairs that ITM looks at: the `top` best by ITC, at least one."""
        if top < 1:
            raise UserError(f"top is {top}: let ITM rank 1 or more again")
        best = cosine.topk(min(top, cosine.shape[dim]), dim=dim).indices
        return torch.zeros_like(cosine, dtype=torch.bool).scatter(dim, best, True).nonzero(as_tuple=True)

    def combined(self, cosine: Tensor, logits: Tensor) -> Tensor:
        """One score (n) of pairs, from ITC's cosine (n) and ITM's logits (n 2) of no match / match.

        Without a `match_weight` it is the logit of a match + the cosine, as LAVIS ranks. With one, both speak in the
        units of their own loss: cosine / temperature + match_weight · (match − no match).
        """
        no_match, match = logits.T
        if self.match_weight is None:
            return cosine + match
        return cosine / self.stage1.temperature.item() + self.match_weight * (match - no_match)

    def retrieve(self, text: str, images: Images, k: int = 5, top: int = 32) -> Tensor:
        """Rows (k) of the images that fit the text best: the `top` best by ITC, re-ranked by ITM, then the others."""
        features = self.encode_images(images)
        scores = self.rerank(features, [text], self.similarity(features, [text]), top, dim=0)
        return scores[:, 0].topk(min(k, len(features))).indices

    def attention_maps(self, image: Images, texts: Texts) -> Tensor:
        """Which parts of one image make each text match it: maps (n gh gw), on the CPU; see `Stage1.match_map`."""
        self.stage1.eval()
        ids, mask = self.text_ids(texts)
        features = self.encode_images(image).to(self.device).float()
        if len(features) > 1:
            raise UserError(f"maps are drawn over one image, not {len(features)}: give one at a time")
        maps = self.stage1.match_map(features.expand(len(ids), -1, -1), ids, mask)
        tokens = maps.shape[-1]  # of a square grid, and perhaps a class token
        return to_grid(maps, math.isqrt(tokens) ** 2 != tokens).cpu()

    @torch.no_grad()
    def caption(self, images: Images, batch_size: int = 50, **decoding) -> str | list[str]:
        """What the Q-Former alone, without a language model, says of each image, or of the one; see `generate`.

        Raises UserError for one from a hub folder, whose files leave the LM head out.
        """
        if not self.writes:
            raise UserError("a hub folder for retrieval holds no LM head to write captions with: load the stage 1 of a "
                            "LAVIS file (`load_stage1`), or a BLIP-2 with a language model (`Blip2.from_folder`)")
        self.stage1.eval()
        most = self.stage1.qformer.config.max_positions
        decoding = completed(decoding, beams=self.beams, max_length=min(CAPTION["max_length"], most))
        if decoding["max_length"] > most:
            raise UserError(f"the Q-Former has positions for {most} ids, not for {decoding['max_length']}: ask for a "
                            "smaller max_length")
        captions = []
        for features in self.chunks(images, batch_size):
            with autocast(self.device, self.precision):
                written = self.stage1.caption(features, self.tokenizer.eos_id, **decoding)
            captions += [self.tokenizer.decode(row) for row in written]
        return captions[0] if is_single(images) else captions
