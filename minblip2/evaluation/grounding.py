"""Where the queries look: plain cross-attention maps. `Stage1.match_map` weights them by their effect on matching."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor

from .. import masks
from ..attention import capture_attention
from ..stage1 import Stage1


@torch.no_grad()
def query_maps(stage1: Stage1, image_features: Tensor) -> Tensor:
    """How much each query looks at each visual token: (b n q v), n the layers that read; mean over heads.

    image_features (b v image_width) are frozen features; no text takes part.
    """
    with capture_attention(*stage1.qformer.cross_attentions) as weights:
        stage1.qformer(stage1.image_kv(image_features))
    return torch.stack([reduce(layer, "b h q v -> b q v", "mean") for layer in weights], dim=1)


@torch.no_grad()
def text_query_maps(stage1: Stage1, image_features: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """The plain attention (b q v) of each query in the fused pass, mean over layers and heads: what is often shown."""
    mask = masks.bidirectional(stage1.qformer.config.num_queries, text_mask)
    with capture_attention(*stage1.qformer.cross_attentions) as weights:
        stage1.qformer(stage1.image_kv(image_features), text_ids, mask)
    return reduce(torch.stack(weights), "n b h q v -> b q v", "mean")
