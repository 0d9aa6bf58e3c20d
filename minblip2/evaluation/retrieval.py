"""Recall of retrieval: contrast (ITC) scores every pair, and matching (ITM) ranks the best again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..weights.reader import Images
from ..weights.retriever import Retriever
from . import metrics

TOP = 16  # so many candidates ITM ranks again


def evaluate_retrieval(retriever: Retriever, images: Images, captions: Sequence[str], image_of_text: Sequence[int],
                       top: int = TOP) -> dict[str, float]:
    """Recall both ways in percent, by ITC and with ITM re-ranking of the `top` best.

    image_of_text (m): the row of the image that each caption belongs to.
    """
    features, image_of_text = retriever.encode_images(images), torch.as_tensor(image_of_text)
    cosine = retriever.similarity(features, captions)
    results = {f"itc_{key}": value for key, value in metrics.retrieval(cosine, image_of_text).items()}
    for direction, dim in (("i2t", 1), ("t2i", 0)):
        scores = retriever.rerank(features, captions, cosine, top, dim)
        results |= {f"itm_{key}": value for key, value in metrics.retrieval(scores, image_of_text).items()
                    if key.startswith(direction)}
    return results
