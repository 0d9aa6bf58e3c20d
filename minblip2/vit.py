"""The vision transformer: an image becomes a sequence of visual tokens (arXiv 2010.11929)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention import ACTIVATIONS, FeedForward, MultiHeadAttention


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer; the defaults are those of DINOv2-small (transformers `Dinov2Model`).

    image_size and patch_size in pixels. `embedding_norm` normalises before the first block, `final_norm` after the
    last. `align_corners` is how positions are resized to another image: whether the outermost stay where they are
    (so in LAVIS's CLIP, not in transformers').
    `stem` lists the widths of 3x3 convolutions of stride 2 that replace the one patch convolution: a small ViT on
    little data learns shapes far sooner with it (arXiv 2106.14881).
    """

    image_size: int = 518
    patch_size: int = 14
    width: int = 384
    layers: int = 12
    heads: int = 6
    mlp_width: int = 1536
    eps: float = 1e-6
    class_token: bool = True
    layer_scale: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    patch_bias: bool = True
    activation: str = "gelu"
    align_corners: bool = False
    stem: tuple[int, ...] = ()

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


# BLIP-2's two encoders, without their last block and without a final norm (paper §3.4). EVA's original has no bias for
# keys; here it is zero, or whatever a file holds: the same number added to all scores of a query changes no softmax.
EVA_G = ViTConfig(image_size=224, width=1408, layers=39, heads=16, mlp_width=6144, layer_scale=False, final_norm=False)
CLIP_L = ViTConfig(image_size=224, width=1024, layers=23, heads=16, mlp_width=4096, eps=1e-5, layer_scale=False,
                   final_norm=False, embedding_norm=True, patch_bias=False, activation="quick_gelu", align_corners=True)


class ViTBlock(nn.Module):
    """Pre-norm block; each branch may be scaled per channel (LayerScale, arXiv 2103.17239)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.attention = MultiHeadAttention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = FeedForward(config.width, config.mlp_width, ACTIVATIONS[config.activation])
        self.attention_scale = nn.Parameter(torch.ones(config.width)) if config.layer_scale else 1.0
        self.mlp_scale = nn.Parameter(torch.ones(config.width)) if config.layer_scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (b v e)."""
        x = x + self.attention_scale * self.attention(self.attention_norm(x))
        return x + self.mlp_scale * self.mlp(self.mlp_norm(x))


def conv_stem(widths: tuple[int, ...], width: int) -> nn.Sequential:
    """Stride-2 convolutions with batch norm, then a 1x1 convolution to `width`: (b c H W) -> (b e gh gw)."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], width, 1))


class ViT(nn.Module):
    """Patches, positions, blocks: pixels (b c H W) -> visual tokens (b v e), the class token first if there is one.

    Raises ValueError when the stem does not make patches of `patch_size`.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        if config.stem and 2 ** len(config.stem) != config.patch_size:
            raise ValueError(f"{len(config.stem)} stem layers make patches of {2 ** len(config.stem)} px, "
                             f"not {config.patch_size}: change stem or patch_size")
        self.config, self.width = config, config.width
        self.patches = (conv_stem(config.stem, config.width) if config.stem
                        else nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=config.patch_bias))
        self.class_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02) if config.class_token else None
        self.position_embedding = nn.Parameter(torch.randn(1, config.class_token + config.grid**2, config.width) * 0.02)
        norm = partial(nn.LayerNorm, config.width, eps=config.eps)
        self.embedding_norm = norm() if config.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.layers))
        self.norm = norm() if config.final_norm else nn.Identity()

    def positions_for(self, gh: int, gw: int) -> Tensor:
        """Position embeddings (1 v e), resized bicubically if this is not the trained patch grid."""
        grid, special = self.config.grid, int(self.config.class_token)
        if (gh, gw) == (grid, grid):
            return self.position_embedding
        patches = rearrange(self.position_embedding[:, special:], "1 (gh gw) e -> 1 e gh gw", gh=grid)
        patches = F.interpolate(patches.float(), size=(gh, gw), mode="bicubic",
                                align_corners=self.config.align_corners)
        patches = rearrange(patches, "1 e gh gw -> 1 (gh gw) e").to(self.position_embedding.dtype)
        return torch.cat([self.position_embedding[:, :special], patches], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (b c H W) into (b v e): v = gh·gw patches and any class token.

        Raises ValueError where a patch does not divide a side: a strip would go unseen.
        """
        if any(side % self.config.patch_size for side in pixels.shape[-2:]):
            raise ValueError(f"{tuple(pixels.shape)}: no whole number of patches fits each side")
        patches = self.patches(pixels)
        positions = self.positions_for(*patches.shape[-2:])
        x = rearrange(patches, "b e gh gw -> b (gh gw) e")
        if self.class_token is not None:
            x = torch.cat([repeat(self.class_token, "1 1 e -> b 1 e", b=len(x)), x], dim=1)
        x = self.embedding_norm(x + positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def to_grid(weights: Tensor, class_token: bool) -> Tensor:
    """Weights over visual tokens (... v) as maps (... gh gw) of a square grid; a class token in front has no place."""
    weights = weights[..., 1:] if class_token else weights
    side = int(weights.shape[-1] ** 0.5)
    return rearrange(weights, "... (gh gw) -> ... gh gw", gh=side)
