"""What lesson 11 counts and draws: right captions, claims by lot, pairs that a judge must tell apart, and figures."""

import math
import random

import torch

from minblip2.course import decoding, viz
from minblip2.data.scenes import Scene, Thing

SCENE = Scene((Thing("red", "circle", "small", (5, 5, 12, 12)), Thing("blue", "square", "large", (45, 45, 16, 16))),
              "grey")
TRUE = "a picture of a red circle and a blue square"
SWAPPED = "a picture of a blue circle and a red square"
STRANGE = "a picture of a green star"


def test_shares_count_only_captions_that_make_the_claim():
    share, said, made = decoding.shares([TRUE, SWAPPED], [SCENE, SCENE])
    assert (share, made) == (50.0, 2) and said.startswith("50.0 % (")
    share, _, made = decoding.shares([TRUE], [SCENE], "size")
    assert math.isnan(share) and made == 0


def test_captions_are_marked():
    assert decoding.marked(TRUE, SCENE) == f"✓ {TRUE}" and decoding.marked(SWAPPED, SCENE) == f"✗ {SWAPPED}"


def test_claims_by_luck_draw_only_their_kind():
    told = "there is a small red circle top left and a large blue square bottom right on a grey background"
    dice = random.Random(0)
    sizes = {decoding.by_luck(told, "size", dice) for _ in range(40)}
    assert len(sizes) == 4 and all("top left" in text and "grey" in text for text in sizes)
    assert len({decoding.by_luck(told, "positions", dice) for _ in range(300)}) > 40
    assert {decoding.by_luck(told, "background", dice).split()[-2] for _ in range(60)} == {
        "black", "grey", "white", "brown"}
    assert {decoding.by_luck("we see a red circle left of a blue square", "relations", dice) for _ in range(40)} == {
        "we see a red circle left of a blue square", "we see a red circle right of a blue square"}


def test_pairs_are_judged_by_what_is_wrong():
    scores = torch.tensor([[1.0, 2.0, 0.0]])
    assert list(decoding.judged_pairs([[TRUE], [SWAPPED], [STRANGE]], [SCENE], scores).values()) == [[False], [True]]
    none = decoding.judged_pairs([[SWAPPED], [STRANGE]], [SCENE], scores[:, :2])  # nothing right to compare with
    assert list(none.values()) == [[], []]


def test_a_tree_is_drawn_in_which_greedy_is_dropped():
    notes = [[(-0.5, (1,)), (-1.0, (2,))], [(-1.2, (2, 0)), (-2.5, (1, 1))]]
    figure = decoding.search_tree(notes, (2, 0), [(-0.5, (1,)), (-2.5, (1, 1))], 1, 0, str, "a", [[[0, 0, 0]]])
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert "greedy" in texts and texts.count("1\n−0.50") == 2  # in the tree, and in greedy's own row
    assert len(viz.png(figure)) > 1000


def test_a_nucleus_is_as_large_as_it_says():
    figure, sizes = decoding.nuclei({"flat": torch.zeros(20), "sharp": torch.eye(20)[0] * 50}, 0.5, str)
    assert sizes == [10, 1]
    blue = [sum(bar.get_facecolor()[:3] != (171 / 255,) * 3 for bar in panel.patches) for panel in figure.axes]
    assert blue == sizes


def test_words_of_next_to_no_probability_are_left_out():
    figure = decoding.first_words([[[0, 0, 0]]], {"sure": torch.tensor([9.0, 0, 0, 0, 0, 0, 0])}, str)
    assert len(figure.axes[1].patches) == 1


def test_the_other_figures_are_drawn():
    for figure in (decoding.loop(), decoding.calls({"a": [(3, 3), (1, 4)]}, 2),
                   decoding.endings([[1, 0, 0], [1, 2, 0]], 0, str)):
        assert len(viz.png(figure)) > 1000
