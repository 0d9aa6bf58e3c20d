"""What lessons 05 to 08 draw and compare says what is true of a small model."""

import copy

import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

from minblip2 import masks
from minblip2.course import (
    ablation_figures,
    flow,
    maps,
    qformer_figures,
    qformer_lab,
    small_blip2,
    soft_prompts,
    stage1_figures,
    stage1_lab,
    t5_figures,
)
from minblip2.qformer import QFormer, QFormerBlock, QFormerConfig
from minblip2.stage1 import Stage1

SMALL = QFormerConfig(width=16, layers=2, heads=2, mlp_width=32, num_queries=3, image_width=8, vocab_size=11,
                      max_positions=16, dropout=0.0, init_std=0.3)
IDS, MASK = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]]), torch.tensor([[True] * 4, [True] * 3 + [False]])


@pytest.mark.parametrize("draw", [stage1_figures.itc_flow, stage1_figures.itm_flow, stage1_figures.itg_flow,
                                  soft_prompts.stage2_flow, t5_figures.two_halves, maps.flow,
                                  ablation_figures.path_of_a_number, small_blip2.path_of_a_file])
def test_every_label_of_a_flow_fits_into_its_box(draw):
    figure = draw()
    figure.draw_without_rendering()
    panel = figure.axes[0]
    boxes = [patch.get_window_extent() for patch in panel.patches if type(patch).__name__ == "FancyBboxPatch"]
    assert len(boxes) >= 10
    for text in panel.texts:
        label = text.get_window_extent()
        inside = any(box.x0 <= label.x0 and label.x1 <= box.x1 and box.y0 <= label.y0 and label.y1 <= box.y1
                     for box in boxes)
        apart = all(label.x1 < box.x0 or box.x1 < label.x0 or label.y1 < box.y0 or box.y1 < label.y0 for box in boxes)
        assert inside or apart, text.get_text()


def test_arrows_of_a_flow_end_at_boxes():
    boxes = {"a": (0, 0, 4, 4, "", "grey"), "b": (6, 0, 4, 4, "", "grey"), "c": (0, 8, 4, 4, "", "grey"),
             "d": (6, 20, 4, 4, "", "grey")}
    assert flow._ends(boxes["a"], boxes["b"]) == ((4, 2), (6, 2))
    assert flow._ends(boxes["c"], boxes["a"]) == ((2, 8), (2, 4))
    assert flow._ends(boxes["a"], boxes["c"]) == ((2, 4), (2, 8))
    assert flow._ends(boxes["a"], boxes["d"]) == ((4, 2), (6, 22))


def test_parts_that_rest_are_pale():
    def pale(running):
        panel = qformer_figures.passes({"x": running}).axes[0]
        return sum(to_hex(patch.get_edgecolor()) == "#aaaaaa" for patch in panel.patches)

    everything = {part: owners for part, (_, owners) in qformer_figures.PARTS.items()}
    assert pale(everything) == 0
    assert pale({"self_attention": ["text"], "text_mlp": ["text"]}) == 2  # cross-attention, the queries' feed-forward


def test_a_faint_matrix_has_a_scale_of_its_own_and_the_others_share_one():
    named = {"dark": torch.full((3, 3), 0.04), "bright": torch.eye(3), "brighter": torch.eye(3)}
    figure = stage1_figures.matrices(named, faint=["dark"])
    tops = [panel.images[0].get_clim()[1] for panel in figure.axes[:3]]
    assert tops == pytest.approx([0.04, 1, 1]) and len(figure.axes) == 5, "three panels and two bars"


def test_every_parameter_has_an_owner():
    model = QFormer(SMALL)
    parts = qformer_lab.ledger(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters()) and min(parts.values()) > 0
    assert qformer_lab.owner("norm.weight") == "embeddings"
    assert qformer_lab.owner("blocks.0.cross_norm.bias") == "cross-attention"


def test_what_runs_in_a_block_is_told_by_side_and_nothing_stays_hooked():
    block, x, image = QFormerBlock(SMALL, True), torch.randn(1, 7, 16), torch.randn(1, 5, 8)
    assert qformer_lab.what_runs(block, x, 3, image)["self_attention"] == ["queries", "text"]
    alone = qformer_lab.what_runs(block, x[:, 3:], 0, image)
    assert alone["text_mlp"] == ["text"] and not {"cross_attention", "query_mlp"} & alone.keys()
    assert qformer_lab.what_runs(block, x[:, :3], 3, image)["cross_attention"] == ["queries"]
    assert not any(part._forward_hooks for part in block.modules())


def test_separate_self_attention_with_equal_weights_is_shared_self_attention():
    torch.manual_seed(0)
    shared = Stage1(SMALL, embed_dim=8).eval()
    twin = qformer_lab.separate(copy.deepcopy(shared)).eval()
    features = torch.randn(2, 5, 8)
    inputs = features, IDS, MASK, torch.arange(2), (torch.tensor([1, 0]), torch.tensor([1, 0]))
    assert abs(shared(*inputs).loss - twin(*inputs).loss) > 1e-3  # the second set is fresh
    for block in twin.qformer.blocks:
        block.self_attention.of_text.load_state_dict(block.self_attention.of_queries.state_dict())
    torch.testing.assert_close(twin(*inputs).loss, shared(*inputs).loss)  # with cache and with each mask


def test_a_difference_shows_when_it_is_larger_than_the_luck_of_seeds():
    def logs(values):
        return [[{"step": 1, qformer_lab.NAMING: value, qformer_lab.FITTING: value}] for value in values]

    clear = qformer_lab.verdicts({"a": logs([1.0, 1.1, 0.9]), "b": logs([2.0, 2.11, 1.9])})
    luck = qformer_lab.verdicts({"a": logs([1.0, 2.0, 3.0]), "b": logs([1.5, 1.0, 4.0])})
    assert [row[-1] for row in clear] == ["yes", "yes"] and [row[-1] for row in luck] == ["no", "no"]


def test_equal_queries_have_no_spread():
    assert qformer_lab.spread(torch.ones(2, 3, 4)) == 0
    assert qformer_lab.spread(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))) > 0.5


def test_fit_trains_on_the_first_loss_and_logs_all():
    model = nn.Linear(1, 1)
    log = stage1_lab.fit(model, lambda step: {"loss": model(torch.ones(1, 1)).square().sum(), "weight": model.weight},
                         steps=60, rate=0.1)
    assert [line["step"] for line in log] == list(range(60)) and set(log[0]) == {"step", "loss", "weight"}
    assert log[-1]["loss"] < 0.05 * log[0]["loss"] + 1e-3
    assert set(stage1_lab.fit(model, lambda step: model.weight.sum(), 1)[0]) == {"step", "loss"}


def test_costs_of_words_are_the_module_s():
    torch.manual_seed(0)
    model = Stage1(SMALL, embed_dim=8, label_smoothing=0.0).eval()
    features, cache = torch.randn(2, 5, 8), model.qformer.new_cache()
    model.qformer(model.image_kv(features), cache=cache)
    expected, _ = model.itg_loss(IDS, MASK, cache)
    costs = stage1_lab.cost_of_words(model, features, IDS, MASK)
    assert len(costs) == int(MASK[:, 1:].sum())
    torch.testing.assert_close(costs.mean(), expected)
    late = stage1_lab.cost_of_words(model, features, IDS, MASK, first_position=3)
    assert abs(late.mean() - expected) > 1e-3


def test_what_separate_blocks_see_is_what_the_mask_allows():
    torch.manual_seed(0)
    model = qformer_lab.separate(Stage1(SMALL, embed_dim=8)).eval()
    image_kv = model.image_kv(torch.randn(2, 5, 8))
    one, other = (model.qformer(image_kv, ids, masks.unimodal(3, MASK)).queries for ids in (IDS, IDS.flip(0)))
    torch.testing.assert_close(one, other)


def test_copies_of_a_query_give_every_reader_the_same_answer():
    torch.manual_seed(0)
    model, content = qformer_lab.Recall(4).eval().requires_grad_(False), torch.randn(2, 4, 8)
    told, states = model(content)
    assert told.shape == content.shape and qformer_lab.spread(states) > 0.1
    assert not torch.allclose(told[:, 0], told[:, 1], atol=1e-3)
    model.former.query_tokens[:] = model.former.query_tokens[:, :1].clone()
    told, states = model(content)
    assert torch.allclose(told[:, 0], told[:, 3], atol=1e-6) and qformer_lab.spread(states) < 1e-6
