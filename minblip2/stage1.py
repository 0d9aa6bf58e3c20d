"""Stage 1: the Q-Former learns to read images from image-text pairs by three losses (paper §3.2).

Source: LAVIS `lavis/models/blip2_models/blip2_qformer.py`. Nothing is detached, on one process or on many: both sides
of the contrastive loss learn from both of its terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from . import UserError, masks
from .attention import KVCache
from .generation import generate
from .qformer import ImageKV, LMHead, QFormer, QFormerConfig


class Stage1Output(NamedTuple):
    """The three losses, their sum, and the logits that made them.

    similarity (b b): image i against text j, divided by the `temperature`. match_logits (3b 2) for the pairs
    [true, wrong image, wrong text]; match_labels (3b). word_logits (n vocabulary): one row per supervised word.
    Of a batch spread over processes, losses and similarity are the whole batch's, the other logits this process's.
    """

    loss: Tensor
    itc: Tensor
    itm: Tensor
    itg: Tensor
    similarity: Tensor
    match_logits: Tensor
    match_labels: Tensor
    word_logits: Tensor
    temperature: Tensor


class OneProcess:
    """The whole batch is here, so there is nobody to ask; `distributed.ManyProcesses` asks the others."""

    own = slice(None)  # where the rows that are here stand in the whole batch

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch's rows (n ...) of those that are here (b ...)."""
        return rows

    def mean(self, value: Tensor, count: int) -> Tensor:
        """The mean over the whole batch of a scalar that is the mean over `count` things here."""
        return value

    def bring(self, model: Stage1, image: Tensor, image_kv: ImageKV, texts: tuple[Tensor, Tensor],
              negatives: tuple[Tensor, Tensor]) -> tuple[ImageKV, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What `match_pairs` needs: the pairs that are here and, wherever they come from, their negatives."""
        return image_kv, *texts, negatives


class Stage1(nn.Module):
    """The Q-Former with its three heads. `image` is what a frozen encoder gave: (b v image_width)."""

    TEMPERATURE = 0.07  # at the start of training

    def __init__(self, config: QFormerConfig = QFormerConfig(), shared_width: int = 256, label_smoothing: float = 0.1):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.vision_norm = nn.LayerNorm(config.image_width)
        self.qformer = QFormer(config)
        self.vision_projection = nn.Linear(config.width, shared_width)
        self.text_projection = nn.Linear(config.width, shared_width)
        self.match_head = nn.Linear(config.width, 2)
        self.temperature = nn.Parameter(torch.tensor(self.TEMPERATURE))

    def start_heads(self) -> None:
        """Give the parts that files for retrieval leave out, LM head and temperature, their values before training."""
        self.qformer.lm_head = LMHead(self.qformer.config).apply(self.qformer.initialise)
        self.temperature = nn.Parameter(torch.tensor(self.TEMPERATURE))

    # --- what a retrieval system uses ---------------------------------------------------------------------------------

    def image_kv(self, image: Tensor) -> ImageKV:
        """Normalise frozen features (b v image_width) and project them once for all passes."""
        return self.qformer.project_image(image, self.vision_norm)

    def embed_image(self, image: ImageKV, cache: KVCache | None = None) -> Tensor:
        """One unit vector for each query: (b q shared_width). A cache keeps the queries for the text to read."""
        return F.normalize(self.vision_projection(self.qformer(image, cache=cache).queries), dim=-1)

    def embed_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """One unit vector for each text, from [CLS]: (b shared_width)."""
        states = self.qformer(text_ids=text_ids, mask=masks.unimodal(0, text_mask)).text
        return F.normalize(self.text_projection(states[:, 0]), dim=-1)

    @staticmethod
    def similarity(image: Tensor, text: Tensor) -> Tensor:
        """Cosine (b n) of images (b q e) and texts (n e): that of the query which fits the text best."""
        return reduce(einsum(image, text, "b q e, n e -> b n q"), "b n q -> b n", "max")

    def match(self, image: ImageKV, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits (b 2) of no match / match: read by each query from the fused pass, then averaged."""
        mask = masks.bidirectional(self.qformer.config.queries, text_mask)
        states = self.qformer(image, text_ids, mask).queries
        return reduce(self.match_head(states), "b q n -> b n", "mean")

    def score(self, image: ImageKV, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """How well each text fits its image (b), as LAVIS ranks them: the logit of a match + the cosine."""
        cosine = self.similarity(self.embed_image(image), self.embed_text(text_ids, text_mask)).diagonal()
        return self.match(image, text_ids, text_mask)[:, 1] + cosine

    # --- the three losses ---------------------------------------------------------------------------------------------

    def contrastive_loss(self, similarity: Tensor, same_image: Tensor) -> Tensor:
        """ITC: each image picks its text among the batch's and each text its image; logits (b b), same_image (b b)."""
        targets = same_image / reduce(same_image.float(), "b n -> b 1", "sum")
        return sum(F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
                   for logits in (similarity, similarity.T)) / 2

    @torch.no_grad()
    def sample_negatives(self, similarity: Tensor, same_image: Tensor) -> tuple[Tensor, Tensor]:
        """Hard negatives: (image for each text (b), text for each image (b)), likelier the more similar they are.

        Raises UserError where a pair finds no other image in the batch.
        """
        if same_image.all(dim=1).any():
            raise UserError("a batch holds captions of one image only: matching has no negatives, use a larger batch")
        # Where a logit is not a number the loss is none either, and whoever trains says so: here any draw will do.
        return tuple(torch.multinomial(
            logits.float().masked_fill(same_image, -torch.inf).softmax(dim=1).nan_to_num(1.0), 1)[:, 0]
            for logits in (similarity.T, similarity))

    def match_pairs(self, image: ImageKV, text_ids: Tensor, text_mask: Tensor,
                    negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """ITM's triple: true pairs, wrong images, wrong texts. Returns logits (3b 2) and labels (3b)."""
        wrong_image, wrong_text = negatives
        own = torch.arange(len(wrong_image), device=text_ids.device)
        # An image is read by two texts, its own and a wrong one: only the wrong images must be copied.
        texts = rearrange(torch.stack([own, wrong_text]), "n b -> (b n)")
        read_twice = self.match(image.first(len(own)), text_ids[texts], text_mask[texts])
        true, wrong = rearrange(read_twice, "(b n) k -> n b k", n=2)
        logits = torch.cat([true, self.match(image.select(wrong_image), text_ids[own], text_mask[own]), wrong])
        return logits, torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])

    def decode_states(self, image: ImageKV, decoder_ids: Tensor, text_mask: Tensor, cache: KVCache) -> Tensor:
        """Text states (b t e) under the multimodal causal mask, on the queries that the contrastive pass has cached."""
        queries = self.qformer.config.queries
        text_rows = masks.multimodal_causal(queries, text_mask)[:, :, queries:]
        return self.qformer(text_ids=decoder_ids, mask=text_rows, cache=cache).text

    def generation_loss(self, states: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """ITG: each state predicts the next word; states (b t e). Only supervised positions meet the vocabulary.

        Returns the loss and the logits (n vocabulary).
        """
        supervised = text_mask[:, 1:]
        logits = self.qformer.predict(states[:, :-1][supervised]).float()
        return F.cross_entropy(logits, text_ids[:, 1:][supervised], label_smoothing=self.label_smoothing), logits

    @staticmethod
    def trim(text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cut padding that the whole batch shares: nobody may look at it anyway.

        Not on a GPU: the host would have to wait for the answer, and `PairBatches` gives no such padding.
        """
        longest = int(reduce(text_mask.long(), "b t -> b", "sum").max()) if text_mask.is_cpu else text_mask.shape[1]
        return text_ids[:, :longest], text_mask[:, :longest]

    def forward(self, image: Tensor, text_ids: Tensor, text_mask: Tensor, image_ids: Tensor | None = None,
                negatives: tuple[Tensor, Tensor] | None = None, ranks: OneProcess = OneProcess()) -> Stage1Output:
        """ITC + ITM + ITG of image features (b v image_width) with texts [CLS] ... [SEP]: ids (b t), mask (b t).

        Captions with equal `image_ids` (b) are positives of each other. `negatives` replaces the sampled ones. `ranks`
        says who holds the rest of the batch.
        """
        texts = self.trim(ranks.gather(text_ids), ranks.gather(text_mask))
        text_ids, text_mask = (part[ranks.own] for part in texts)
        image_ids = torch.arange(len(texts[0]), device=image.device) if image_ids is None else ranks.gather(image_ids)
        same_image = rearrange(image_ids, "b -> b 1") == rearrange(image_ids, "n -> 1 n")
        image_kv, cache = self.image_kv(image), KVCache()

        seen, said = self.embed_image(image_kv, cache), self.embed_text(text_ids, text_mask)
        similarity = self.similarity(ranks.gather(seen), ranks.gather(said)).float() / self.temperature
        itc = self.contrastive_loss(similarity, same_image)

        decoder_ids = torch.cat([torch.full_like(text_ids[:, :1], self.qformer.dec), text_ids[:, 1:]], dim=1)
        states = self.decode_states(image_kv, decoder_ids, text_mask, cache)
        itg, word_logits = self.generation_loss(states, text_ids, text_mask)
        itg = ranks.mean(itg, len(word_logits))

        # The last, because the largest: what it keeps is what the backward pass needs first and lets go.
        negatives = self.sample_negatives(similarity, same_image) if negatives is None else negatives
        match_logits, match_labels = self.match_pairs(*ranks.bring(self, image, image_kv, texts, negatives))
        itm = ranks.mean(F.cross_entropy(match_logits.float(), match_labels), len(image))
        return Stage1Output(itc + itm + itg, itc, itm, itg, similarity, match_logits, match_labels, word_logits,
                            self.temperature)

    # --- captions without a language model ----------------------------------------------------------------------------

    @torch.no_grad()
    def caption(self, image: Tensor, end: int, **decoding) -> Tensor:
        """Captions from the Q-Former alone: ids (b t) that start after [DEC], filled with `end`. See `generate`."""
        cache = KVCache()
        self.qformer(self.image_kv(image), cache=cache)
        visible = image.new_ones(len(image), cache.length + 1, dtype=torch.bool)

        def step(ids: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
            return self.qformer.predict(self.qformer(text_ids=ids, mask=mask, cache=cache).text[:, -1])

        dec = torch.full((len(image), 1), self.qformer.dec, device=image.device)
        logits = step(dec, rearrange(visible, "b k -> b 1 1 k"), cache)
        return generate(step, logits, visible, cache, end=end, **decoding)
