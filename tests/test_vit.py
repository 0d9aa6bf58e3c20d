"""The vision transformer against transformers' DINOv2, CLIP and BLIP-2's EVA on random weights, through their files."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
)

from minblip2 import UserError
from minblip2.vit import CLIP_L, EVA_G, ViT, ViTConfig
from minblip2.weights.pretrained import load_vit

from .parity import difference, randomise

SIZES = [dict(image_size=42, patch_size=14, hidden_size=24, num_hidden_layers=2, num_attention_heads=3),
         dict(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)]
MLP = dict(intermediate_size=37)


def dinov2(sizes):
    model = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2))
    return model, lambda image: model(image).last_hidden_state


def clip(sizes):
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, **MLP))
    return model, lambda image: model(image, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]


def both_sides_of_clip(sizes):
    model = CLIPModel(CLIPConfig(vision_config=sizes | MLP, text_config=dict(
        hidden_size=12, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)))
    return model, lambda image: model.vision_model(image, interpolate_pos_encoding=True,
                                                   output_hidden_states=True).hidden_states[-2]


def eva(sizes):
    model = Blip2VisionModel(Blip2VisionConfig(**sizes, **MLP))
    return model, lambda image: model.encoder(model.embeddings(image, interpolate_pos_encoding=True)).last_hidden_state


KINDS = {"dinov2": dinov2, "clip": clip, "both sides of clip": both_sides_of_clip, "eva": eva}


def pair(kind, sizes, seed, folder):
    """Our ViT and transformers' features with the same random weights, through the files that transformers writes."""
    model, features = KINDS[kind](sizes)
    randomise(model, seed).save_pretrained(folder)
    return load_vit(folder), features


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=["patch14", "patch8"])
@pytest.mark.parametrize("seed, batch", [(0, 2), (1, 1)])
@torch.no_grad()
def test_equals_transformers(kind, sizes, seed, batch, tmp_path):
    ours, features = pair(kind, sizes, seed, tmp_path)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    ours.config = replace(ours.config, align_corners=False)  # transformers resizes CLIP's positions as all others
    side = sizes["image_size"] // sizes["patch_size"]
    for gh, gw in [(side, side), (5, 3), (1, 1), (2, 7), (8, 8)]:
        image = torch.randn(batch, 3, gh * sizes["patch_size"], gw * sizes["patch_size"])
        assert ours(image).shape == (batch, 1 + gh * gw, ours.width)
        assert difference(ours(image), features(image)) < 1e-5


@pytest.mark.parametrize("kind, corners", [("dinov2", False), ("clip", True), ("eva", False)])
def test_positions_are_resized_as_blip2_does_for_each_encoder(kind, corners, tmp_path):
    ours, _ = pair(kind, SIZES[0], 0, tmp_path)
    table = ours.position_embedding[0, 1:].T.reshape(1, 24, 3, 3)
    expected = F.interpolate(table, (6, 2), mode="bicubic", align_corners=corners).reshape(24, 12).T
    assert torch.equal(ours.positions_for(6, 2)[0, 1:], expected)
    assert torch.equal(ours.positions_for(6, 2)[:, 0], ours.position_embedding[:, 0])
    assert ours.positions_for(3, 3) is ours.position_embedding


@pytest.mark.parametrize("kind", ["clip", "eva"])
def test_half_precision_is_kept(kind, tmp_path):
    ours, features = pair(kind, SIZES[0], 0, tmp_path)
    half = load_vit(tmp_path, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    image = torch.randn(1, 3, 42, 42)
    assert difference(half(image.bfloat16()).float(), ours(image)) < 0.05


def test_sizes_of_blip2s_encoders():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in ViT(config).parameters()) for config in (EVA_G, CLIP_L)]
    last_norm, last_block = 2 * 1408, 12 * 1024**2 + 13 * 1024
    # transformers' Blip2VisionModel counts the norm that is the bridge's here; CLIP ViT-L's 303,179,776 count two norms
    assert counts == [985_952_256 - last_norm, 303_179_776 - last_block - 2 * 1024]


def test_an_unknown_activation_is_named(tmp_path):
    randomise(CLIPVisionModel(CLIPVisionConfig(**SIZES[0], **MLP, hidden_act="tanh"))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'tanh' is unknown"):
        load_vit(tmp_path)


@pytest.mark.parametrize("class_token", [False, True])
def test_stem_and_class_token_make_the_same_grid(class_token):
    vit = ViT(ViTConfig(image_size=32, patch_size=8, width=16, layers=1, heads=2, mlp_width=32, stem=(4, 8, 8),
                        class_token=class_token, layer_scale=False, final_norm=False)).eval()
    assert vit(torch.randn(2, 3, 32, 48)).shape == (2, 4 * 6 + class_token, 16)
    with pytest.raises(ValueError, match="no whole number of patches"):
        vit(torch.randn(2, 3, 32, 45))
    with pytest.raises(ValueError, match="stem"):
        ViT(ViTConfig(patch_size=16, stem=(4, 8)))
