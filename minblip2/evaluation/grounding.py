"""Where the queries look: cross-attention maps, plain and weighted by what they do to the matching score.

Source of the weighting: Grad-CAM on cross-attention as in ALBEF (arXiv 2107.07651, §5) and LAVIS `compute_gradcam`.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from .. import masks
from ..attention import record
from ..stage1 import Stage1


def to_grid(weights: Tensor, class_token: bool) -> Tensor:
    """Weights over visual tokens (... v) as maps (... gh gw) of a square grid; a class token in front has no place."""
    weights = weights[..., 1:] if class_token else weights
    side = int(weights.shape[-1] ** 0.5)
    return rearrange(weights, "... (gh gw) -> ... gh gw", gh=side)


@torch.no_grad()
def query_maps(stage1: Stage1, image: Tensor) -> Tensor:
    """How much each query looks at each visual token: (b n q v), n the layers that read; mean over heads.

    image (b v image_width) are frozen features; no text takes part.
    """
    with record(*stage1.qformer.cross_attentions) as weights:
        stage1.qformer(stage1.image_kv(image))
    return torch.stack([reduce(layer, "b h q v -> b q v", "mean") for layer in weights], dim=1)


@torch.enable_grad()
def text_map(stage1: Stage1, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Which visual tokens make these texts match their images: (b v).

    Attention times the positive part of the gradient of the logit "match", summed over layers, heads and queries.
    """
    with record(*stage1.qformer.cross_attentions) as weights:
        match = stage1.match(stage1.image_kv(image), text_ids, text_mask)[:, 1].sum()
    gradients = torch.autograd.grad(match, weights)
    return sum(reduce(layer * gradient.relu(), "b h q v -> b v", "sum").detach()
               for layer, gradient in zip(weights, gradients, strict=True))


@torch.no_grad()
def text_query_maps(stage1: Stage1, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """The plain attention (b q v) of each query in the fused pass, mean over layers and heads: what is often shown."""
    mask = masks.bidirectional(stage1.qformer.config.queries, text_mask)
    with record(*stage1.qformer.cross_attentions) as weights:
        stage1.qformer(stage1.image_kv(image), text_ids, mask)
    return reduce(torch.stack(weights), "n b h q v -> b q v", "mean")
