"""What lessons on encoders draw and measure: probes find what is there and only that, baselines are entropies."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minblip2 import UserError
from minblip2.course import vision
from minblip2.course.pipeline import Step, pipeline
from minblip2.data.scenes import draw_scenes
from minblip2.training.experts import TINY_VIT, ImageBatch, PatchReader, patch_labels, reading_losses
from minblip2.vit import ViT


def labels_of(count):
    drawn = list(draw_scenes(count, "test"))
    return drawn, torch.stack([torch.from_numpy(patch_labels(scene, 8, 64)) for *_, scene in drawn]).long()


def test_a_probe_reads_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    _, labels = labels_of(40)
    colour = labels[..., 0].flatten(1, 2).clamp(min=0)
    planted = F.one_hot(colour, 8).float() @ torch.randn(8, 16)
    assert vision.linear_probe(planted, labels, 0, half=30) == 1.0
    assert vision.linear_probe(torch.randn_like(planted), labels, 0, half=30) < 0.5


def test_the_blind_baseline_is_what_the_best_constant_answer_pays():
    torch.manual_seed(0)
    drawn, labels = labels_of(30)
    model, blind = PatchReader(), vision.blind_losses(labels.float())
    for name, head in model.heads.items():
        nn.init.zeros_(head.weight)
        answers = F.one_hot(labels[..., vision.QUESTIONS.index(name)].flatten() % head.out_features, head.out_features)
        weight = torch.where(labels[..., 0].flatten() >= 0, 1.0, 0.15)
        with torch.no_grad():
            head.bias.copy_((weight @ answers.float()).log())
    losses = reading_losses(model, ImageBatch(torch.zeros(30, 3, 64, 64), labels.float()))
    assert all(abs(losses[name].item() - blind[name]) < 1e-4 for name in blind)
    for where in ("row", "column"):
        assert 0 < vision.place_floor(labels.float(), where) < blind[where] <= math.log(4)


def test_the_taps_end_with_what_the_encoder_gives_and_shares_are_of_covered_patches():
    torch.manual_seed(0)
    _, labels = labels_of(3)
    reader, images = PatchReader().eval(), torch.randn(3, 3, 64, 64)
    taps = vision.tapped(reader.vit, images)
    with torch.no_grad():
        assert torch.allclose(taps["final norm"], reader.vit(images), atol=1e-5)
    assert list(taps) == ["pixels", "stem", "+ positions", "block 1", "block 2", "final norm"]
    shares = vision.share_read(reader.heads, taps["final norm"], labels)
    by_hand = reader.heads["row"](taps["final norm"]).argmax(-1)[labels[..., 0].flatten(1) >= 0]
    right = labels[..., 3][labels[..., 0] >= 0]
    assert shares["row"] == pytest.approx((by_hand == right).float().mean().item())
    assert vision.share_rows({"a": {"row": 0.5}}) == [["a", "50 %"]]
    assert vision.commonest(labels)["row"] == pytest.approx(torch.bincount(right).max().item() / len(right))


def test_costs_are_counted_without_computing():
    with torch.device("meta"):
        layer = nn.Linear(1000, 2000, bias=False)
        size, work = vision.cost(layer, lambda: layer(torch.empty(3, 1000)))
    assert (size, work) == (2.0, 3 * 2e6 / 1e9)


def test_figures_have_a_panel_for_each_thing_they_show():
    drawn, labels = labels_of(2)
    torch.manual_seed(0)
    pictures, vectors = [picture for _, picture, _ in drawn], torch.randn(2, 64, 9)
    colours = vision.principal_colours(vectors, 2)
    assert colours.shape == (2, 8, 8, 3) and 0 <= colours.min() and colours.max() <= 1
    assert len(vision.map_figure(pictures, {"one": colours, "other": colours}).axes) == 6
    assert len(vision.patch_figure(pictures[0], torch.rand(64, 192), 8).subfigs[1].axes) == 64
    assert len(vision.label_figure(pictures[0], drawn[0][2], labels[0].numpy(), 8).axes) == 3
    assert vision.colours_read(PatchReader().heads, torch.randn(2, 64, TINY_VIT.width)).shape == (2, 8, 8, 3)
    read = {name: {"a": 0.1, "b": 0.9} for name in vision.QUESTIONS}
    assert [panel.get_title(loc="left") for panel in
            vision.probe_figure(read, dict.fromkeys(read, 0.2)).axes] == list(vision.QUESTIONS)
    lines = [{"step": step, **dict.fromkeys(vision.QUESTIONS, 2.0 - step)} for step in range(2)]
    figure = vision.two_runs_figure({"a": lines, "b": lines}, dict.fromkeys(vision.QUESTIONS, 1.0),
                                    floor={"row": 0.6, "column": 0.7})
    marked = [[text.get_text() for text in panel.texts if "floor" in text.get_text()] for panel in figure.axes]
    assert marked == [[], [], ["floor: all but the row known, 0.60"], ["floor: all but the column known, 0.70"]]


def test_the_encoder_drawn_has_the_shapes_of_the_encoders():
    words = " ".join(text.get_text() for text in vision.encoder_figure().axes[0].texts)
    tiny = ViT(TINY_VIT)
    assert f"64 × {tiny.width}" in words and f"{len(tiny.blocks)} blocks" in words and "257 × 1408" in words


def test_a_pipeline_needs_steps():
    with pytest.raises(UserError, match="empty"):
        pipeline([])
    with pytest.raises(UserError, match="empty"):
        pipeline()
    figure = pipeline([Step("a", "b 3", "#000000"), Step("c", "b 4", "#000000", frozen=True)])
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b 3", "c", "b 4"]
