"""Stage 1: the Q-Former learns to read images from image-text pairs by three losses (paper §3.2).

The same losses in plain loops, one image and one text at a time, are in `reference`. Training on several processes is
`training.distributed.DistributedStage1`. Source: LAVIS `lavis/models/blip2_models/blip2_qformer.py`. Nothing is
detached: both sides of the contrastive loss learn from both of its terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from . import UserError, masks
from .attention import KVCache, capture_attention
from .generation import generate
from .qformer import ImageKV, QFormer, QFormerConfig


class Stage1Output(NamedTuple):
    """The three losses, their sum, and the logits that made them.

    itc_logits (b b): cosine of image i and text j, divided by the `temperature`. itm_logits (3b 2) for the pairs
    [true, wrong image, wrong text]; itm_labels (3b). word_logits (n vocab_size): one row per supervised word.
    """

    loss: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor
    itc_logits: Tensor
    itm_logits: Tensor
    itm_labels: Tensor
    word_logits: Tensor
    temperature: Tensor


class Stage1(nn.Module):
    """The Q-Former with its three heads. `image_features` are what a frozen encoder gave: (b v image_width)."""

    TEMPERATURE = 0.07  # at the start of training

    def __init__(self, config: QFormerConfig = QFormerConfig(), embed_dim: int = 256, label_smoothing: float = 0.1):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.vision_norm = nn.LayerNorm(config.image_width)
        self.qformer = QFormer(config)
        self.vision_projection = nn.Linear(config.width, embed_dim)
        self.text_projection = nn.Linear(config.width, embed_dim)
        self.itm_head = nn.Linear(config.width, 2)
        self.temperature = nn.Parameter(torch.tensor(self.TEMPERATURE))

    # --- what a retrieval system uses ---------------------------------------------------------------------------------

    def image_kv(self, image_features: Tensor) -> ImageKV:
        """Normalise frozen features (b v image_width) and project them once for all passes."""
        return self.qformer.project_image(self.vision_norm(image_features.to(self.vision_norm.weight)))

    def embed_image(self, image_kv: ImageKV, cache: KVCache | None = None) -> Tensor:
        """One unit vector for each query: (b q embed_dim). A cache keeps the queries for the text to read."""
        return F.normalize(self.vision_projection(self.qformer(image_kv, cache=cache).queries), dim=-1)

    def embed_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """One unit vector for each text, from [CLS]: (b embed_dim)."""
        states = self.qformer(text_ids=text_ids, mask=masks.unimodal(0, text_mask)).text
        return F.normalize(self.text_projection(states[:, 0]), dim=-1)

    @staticmethod
    def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Cosine (b n) of images (b q e) and texts (n e): that of the query which fits the text best."""
        return reduce(einsum(image_embeds, text_embeds, "b q e, n e -> b n q"), "b n q -> b n", "max")

    def itm_logits(self, image_kv: ImageKV, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits (b 2) of no match / match: read by each query from the fused pass, then averaged."""
        mask = masks.bidirectional(self.qformer.config.num_queries, text_mask)
        states = self.qformer(image_kv, text_ids, mask).queries
        return reduce(self.itm_head(states), "b q n -> b n", "mean")

    @torch.enable_grad()
    def match_map(self, image_features: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Which visual tokens make these texts match their images: (b v).

        Cross-attention times the positive part of the gradient of the logit "match", summed over layers, heads and
        queries: Grad-CAM as in ALBEF (arXiv 2107.07651, §5). LAVIS's `compute_gradcam` takes one layer, of the text.
        """
        image_features = image_features.detach().requires_grad_()  # so that weights have a gradient, frozen or not
        with capture_attention(*self.qformer.cross_attentions) as weights:
            match = self.itm_logits(self.image_kv(image_features), text_ids, text_mask)[:, 1].sum()
        gradients = torch.autograd.grad(match, weights)
        return sum(reduce(layer * gradient.relu(), "b h q v -> b v", "sum").detach()
                   for layer, gradient in zip(weights, gradients, strict=True))

    # --- the three losses ---------------------------------------------------------------------------------------------

    def itc_loss(self, itc_logits: Tensor, same_image: Tensor) -> Tensor:
        """ITC: each image picks its text among the batch's and each text its image; both inputs (b b)."""
        targets = same_image / reduce(same_image.float(), "b n -> b 1", "sum")
        return sum(F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
                   for logits in (itc_logits, itc_logits.T)) / 2

    @torch.no_grad()
    def sample_negatives(self, itc_logits: Tensor, same_image: Tensor) -> tuple[Tensor, Tensor]:
        """Hard negatives: (image for each text (b), text for each image (b)), likelier the more similar they are.

        Raises UserError where a pair finds no other image in the batch.
        """
        if same_image.all(dim=1).any():
            raise UserError("a batch holds captions of one image only: matching has no negatives, use a larger batch")
        # Where a logit is not a number the loss is none either, and the training loop says so: any draw will do here.
        return tuple(torch.multinomial(
            logits.float().masked_fill(same_image, -torch.inf).softmax(dim=1).nan_to_num(1.0), 1)[:, 0]
            for logits in (itc_logits.T, itc_logits))

    def itm_triples(self, image_kv: ImageKV, text_ids: Tensor, text_mask: Tensor,
                    negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """ITM's triples, b true pairs, b wrong images, b wrong texts: logits (3b 2) and labels (3b)."""
        wrong_image, wrong_text = negatives
        true = torch.arange(len(wrong_image), device=text_ids.device)
        images, texts = torch.cat([true, wrong_image, true]), torch.cat([true, true, wrong_text])
        logits = self.itm_logits(image_kv.select(images), text_ids[texts], text_mask[texts])
        return logits, torch.cat([torch.ones_like(true), torch.zeros_like(true), torch.zeros_like(true)])

    def itg_loss(self, text_ids: Tensor, text_mask: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """ITG: write each caption word by word, reading the queries that ITC's pass has left in `cache`.

        [DEC] stands in for [CLS] at the input, and only there. Returns the loss and the logits (n vocab_size) of the
        n supervised words, the only ones that are computed.
        """
        dec_id = torch.full_like(text_ids[:, :1], self.qformer.dec_id)
        num_queries = self.qformer.config.num_queries
        mask = masks.multimodal_causal(num_queries, text_mask)[:, :, num_queries:]  # the rows of the text
        states = self.qformer(text_ids=torch.cat([dec_id, text_ids[:, 1:]], dim=1), mask=mask, cache=cache).text
        supervised = text_mask[:, 1:].bool()  # each state predicts the next word
        logits = self.qformer.lm_logits(states[:, :-1][supervised]).float()
        return F.cross_entropy(logits, text_ids[:, 1:][supervised], label_smoothing=self.label_smoothing), logits

    def forward(self, image_features: Tensor, text_ids: Tensor, text_mask: Tensor, image_ids: Tensor | None = None,
                negatives: tuple[Tensor, Tensor] | None = None) -> Stage1Output:
        """ITC + ITM + ITG of image features (b v image_width) with texts (b t), [CLS] ... [SEP], padded on the right.

        Captions with equal `image_ids` (b) are positives of each other. `negatives` replaces the sampled ones.
        Raises UserError when the batch has no negatives.
        """
        image_ids = torch.arange(len(text_ids)).to(text_ids) if image_ids is None else image_ids
        same_image = rearrange(image_ids, "b -> b 1") == rearrange(image_ids, "n -> 1 n")
        image_kv, cache = self.image_kv(image_features), self.qformer.new_cache()

        cosine = self.similarity(self.embed_image(image_kv, cache), self.embed_text(text_ids, text_mask))
        itc_logits = cosine.float() / self.temperature
        itg, word_logits = self.itg_loss(text_ids, text_mask, cache)

        negatives = self.sample_negatives(itc_logits, same_image) if negatives is None else negatives
        itm_logits, itm_labels = self.itm_triples(image_kv, text_ids, text_mask, negatives)
        itc, itm = self.itc_loss(itc_logits, same_image), F.cross_entropy(itm_logits.float(), itm_labels)
        return Stage1Output(itc + itm + itg, itc, itm, itg, itc_logits, itm_logits, itm_labels, word_logits,
                            self.temperature)

    # --- captions without a language model ----------------------------------------------------------------------------

    @torch.no_grad()
    def caption(self, image_features: Tensor, eos_id: int, **decoding) -> Tensor:
        """Captions from the Q-Former alone: ids (b t) that start after [DEC], filled with `eos_id`. See `generate`."""
        cache, num_queries = self.qformer.new_cache(), self.qformer.config.num_queries
        self.qformer(self.image_kv(image_features), cache=cache)
        attention_mask = image_features.new_ones(len(image_features), num_queries + 1, dtype=torch.bool)

        def step(ids: Tensor, attention_mask: Tensor, cache: KVCache) -> Tensor:
            mask, written = rearrange(attention_mask, "b k -> b 1 1 k"), cache.length - num_queries
            return self.qformer.lm_logits(
                self.qformer(text_ids=ids, mask=mask, cache=cache, first_position=written).text[:, -1])

        dec_ids = torch.full((len(image_features), 1), self.qformer.dec_id, device=image_features.device)
        return generate(step, step(dec_ids, attention_mask, cache), attention_mask, cache, eos_id=eos_id, **decoding)
