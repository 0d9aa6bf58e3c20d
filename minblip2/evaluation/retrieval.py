"""Retrieval with a trained bridge: contrast scores every pair, and matching ranks the best again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import autocast
from ..stage1 import Stage1
from ..training.bridge import Bridge
from . import metrics


@torch.no_grad()
def embed(bridge: Bridge, features: Tensor, captions: Sequence[str], batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Unit vectors of images (n q e) and of captions (m e) in the shared space, in float32."""
    stage1 = bridge.stage1.to(bridge.device).eval()
    with autocast(bridge.device):
        images = [stage1.embed_image(stage1.image_kv(chunk.float().to(bridge.device)))
                  for chunk in features.split(batch_size)]
        texts = [stage1.embed_text(*bridge.text_ids(captions[i : i + batch_size]))
                 for i in range(0, len(captions), batch_size)]
    return torch.cat(images).float(), torch.cat(texts).float()


def itc_scores(bridge: Bridge, features: Tensor, captions: Sequence[str]) -> Tensor:
    """ITC's similarities (n m) of images (n v e) and captions, on the CPU."""
    images, texts = embed(bridge, features, captions)
    return torch.cat([bridge.stage1.similarity(chunk, texts) for chunk in images.split(50)]).cpu()


@torch.no_grad()
def match_all(stage1: Stage1, features: Tensor, text_ids: Tensor, text_mask: Tensor, image_rows: Tensor,
              text_rows: Tensor, batch_size: int = 32) -> Tensor:
    """ITM logits "match" (n) of chosen pairs: image `image_rows` (n) with text `text_rows` (n); features (b v e).

    Each image's keys and values are projected once, however many texts it meets; these read them together,
    `batch_size` at a time and the short ones first, so that there is little padding.
    """
    scores, device = torch.empty(len(image_rows)), text_ids.device
    lengths = text_mask.sum(dim=1).cpu()
    order = lengths[text_rows].argsort()
    for image in image_rows.unique().tolist():
        kv = stage1.image_kv(features[image : image + 1].float().to(device))
        for some in order[image_rows[order] == image].split(batch_size):
            texts, longest = text_rows[some].to(device), lengths[text_rows[some]].max()
            scores[some] = stage1.match(kv, text_ids[texts, :longest], text_mask[texts, :longest])[:, 1].float().cpu()
    return scores


def match_scores(bridge: Bridge, features: Tensor, captions: Sequence[str], image_rows: Tensor,
                 text_rows: Tensor) -> Tensor:
    """`match_all` of a bridge's stage 1 for captions, in the precision that its device prefers."""
    with autocast(bridge.device):
        return match_all(bridge.stage1.to(bridge.device).eval(), features, *bridge.text_ids(captions), image_rows,
                         text_rows)


def rerank(bridge: Bridge, features: Tensor, captions: Sequence[str], cosine: Tensor,
           top: int) -> tuple[Tensor, Tensor]:
    """Retrieval scores after matching has seen the `top` best: ITM logit + cosine, as LAVIS ranks; others far below.

    cosine (images, texts). Returns image->text and text->image scores, both (images, texts).
    """
    directions = []
    for dim in (1, 0):
        best = cosine.topk(min(top, cosine.shape[dim]), dim=dim).indices
        chosen = torch.zeros_like(cosine, dtype=torch.bool).scatter(dim, best, True)
        images, texts = chosen.nonzero(as_tuple=True)
        scores = cosine - 100.0
        scores[images, texts] = cosine[images, texts] + match_scores(bridge, features, captions, images, texts)
        directions.append(scores)
    return directions[0], directions[1]


def evaluate_retrieval(bridge: Bridge, features: Tensor, captions: Sequence[str], image_of_text: Sequence[int],
              top: int = 16) -> dict[str, float]:
    """Recall both ways in percent, by ITC and with ITM re-ranking of the `top` best."""
    cosine = itc_scores(bridge, features, captions)
    image_of_text = torch.as_tensor(image_of_text)
    results = {f"itc_{key}": value for key, value in metrics.retrieval(cosine, image_of_text).items()}
    i2t, t2i = rerank(bridge, features, captions, cosine, top)
    both = {"i2t": metrics.retrieval(i2t, image_of_text), "t2i": metrics.retrieval(t2i, image_of_text)}
    return results | {f"itm_{key}": both[key[:3]][key] for key in both["i2t"]}
