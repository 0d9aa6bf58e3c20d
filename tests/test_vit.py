"""The vision transformer against transformers' Dinov2Model on random weights."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from minblip2.pretrained import load_vit
from minblip2.vit import ViT, ViTConfig

from .parity import difference, randomise

SIZES = [dict(image_size=42, patch_size=14, width=24, layers=2, heads=3, mlp_width=96),
         dict(image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp_width=32)]


def pair(sizes, seed, folder):
    """Our ViT and transformers' with the same random weights, through the files that transformers writes."""
    theirs = randomise(Dinov2Model(Dinov2Config(
        image_size=sizes["image_size"], patch_size=sizes["patch_size"], hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_width"] // sizes["width"])), seed)
    theirs.save_pretrained(folder)
    return load_vit(folder), theirs


@pytest.mark.parametrize("sizes", SIZES, ids=["patch14", "patch8"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("grid", [None, (5, 3), (1, 1), (2, 7), (8, 8)], ids=str)
def test_equals_transformers(sizes, seed, grid, tmp_path):
    ours, theirs = pair(sizes, seed, tmp_path)
    side = sizes["image_size"] // sizes["patch_size"]
    gh, gw = grid or (side, side)
    image = torch.randn(2, 3, gh * sizes["patch_size"], gw * sizes["patch_size"])
    with torch.no_grad():
        assert difference(ours(image), theirs(image).last_hidden_state) < 1e-5
    assert ours(image).shape == (2, 1 + gh * gw, ours.width)


def test_positions_of_the_trained_size_are_used_as_they_are(tmp_path):
    ours, _ = pair(SIZES[0], 0, tmp_path)
    assert ours.positions_for(3, 3) is ours.positions
    assert torch.equal(ours.positions_for(6, 2)[:, 0], ours.positions[:, 0])


@pytest.mark.parametrize("class_token", [False, True])
def test_stem_and_class_token_make_the_same_grid(class_token):
    vit = ViT(ViTConfig(image_size=32, patch_size=8, width=16, layers=1, heads=2, mlp_width=32, stem=(4, 8, 8),
                        class_token=class_token, layer_scale=False, final_norm=False)).eval()
    assert vit(torch.randn(2, 3, 32, 48)).shape == (2, 4 * 6 + class_token, 16)
    with pytest.raises(ValueError, match="stem"):
        ViT(ViTConfig(patch_size=16, stem=(4, 8)))
