"""The three losses of stage 1 in plain loops: what `stage1` computes, said as slowly and as clearly as it can be.

One image and one text at a time, each in a joint pass of its own: no padding, no cache, no batch, no shared
computation. Far too slow to train with; tests hold `Stage1.forward` against it. Source: paper §3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import masks
from .qformer import QFormerOutput
from .stage1 import Stage1


def cross_entropy(logits: Sequence[float], targets: Sequence[float], label_smoothing: float) -> float:
    """Cross-entropy of one row of logits (n) with target probabilities (n), in nats."""
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    return -sum(((1 - label_smoothing) * target + label_smoothing / len(logits)) * (logit - log_sum)
                for logit, target in zip(logits, targets, strict=True))


@torch.no_grad()
def stage1_losses(model: Stage1, image_features: Tensor, texts: Sequence[Sequence[int]], image_ids: Sequence[int],
                  negatives: tuple[Sequence[int], Sequence[int]]) -> tuple[float, float, float]:
    """ITC, ITM and ITG of b image features (b v image_width) with b texts, lists of ids [CLS] ... [SEP].

    Captions with equal `image_ids` (b) are positives of each other; negatives name the wrong image for each text (b)
    and the wrong text for each image (b).
    """
    pairs, num_queries = range(len(texts)), model.qformer.config.num_queries

    def joint_pass(image: int, text: Sequence[int], mask) -> QFormerOutput:
        """Queries reading one image, and one text, together in the Q-Former under one of the three masks."""
        image_kv = model.image_kv(image_features[image:image + 1])
        text_ids = torch.tensor([text], device=image_features.device)
        return model.qformer(image_kv, text_ids, mask(num_queries, torch.ones_like(text_ids, dtype=torch.bool)))

    # ITC, uni-modal mask: each image finds its text among all texts, each text its image among all images
    image_embeds = [F.normalize(model.vision_projection(joint_pass(i, texts[i], masks.unimodal).queries[0]), dim=-1)
                    for i in pairs]
    text_embeds = [F.normalize(model.text_projection(joint_pass(i, texts[i], masks.unimodal).text[0, 0]), dim=-1)
                   for i in pairs]
    itc_logits = [[max(float(query @ text) for query in queries) / float(model.temperature) for text in text_embeds]
                  for queries in image_embeds]  # the query that fits the text best
    itc = 0.0
    for i in pairs:
        positives = [float(image_ids[i] == other) for other in image_ids]
        targets = [positive / sum(positives) for positive in positives]
        image_to_text, text_to_image = itc_logits[i], [row[i] for row in itc_logits]
        itc += cross_entropy(image_to_text, targets, model.label_smoothing) / (2 * len(texts))
        itc += cross_entropy(text_to_image, targets, model.label_smoothing) / (2 * len(texts))

    # ITM, bi-directional mask: is this a pair? Asked of every true pair, and of a wrong image and a wrong text for each
    wrong_image, wrong_text = negatives
    triples = [(i, i, True) for i in pairs] + [(wrong_image[i], i, False) for i in pairs]
    triples += [(i, wrong_text[i], False) for i in pairs]
    itm = 0.0
    for image, text, is_match in triples:
        queries = joint_pass(image, texts[text], masks.bidirectional).queries[0]
        no, yes = model.itm_head(queries).mean(dim=0).tolist()  # every query votes
        itm += cross_entropy([no, yes], [float(not is_match), float(is_match)], 0.0) / len(triples)

    # ITG, multimodal causal mask: each word from the queries and the words before it; [DEC] stands in for [CLS]
    costs = []
    for i in pairs:
        states = joint_pass(i, [model.qformer.dec_id, *texts[i][1:]], masks.multimodal_causal).text[0]
        for state, next_word in zip(states[:-1], texts[i][1:], strict=True):
            logits = model.qformer.lm_logits(rearrange(state, "e -> 1 e"))[0].tolist()
            targets = [float(word == next_word) for word in range(len(logits))]
            costs.append(cross_entropy(logits, targets, model.label_smoothing))
    return itc, itm, sum(costs) / len(costs)
