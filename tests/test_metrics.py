"""Metrics against independent truths: pycocoevalcap, brute-force loops, and numbers worked out by hand."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minblip2 import UserError
from minblip2.evaluation import measure
from minblip2.evaluation.metrics import (
    bleu,
    cider_d,
    confidence_interval,
    pointing_chance,
    pointing_game,
    recall_at_k,
    retrieval,
    split_words,
)


def official(name, candidates, references, order=4):
    """The score that pycocoevalcap gives on the words of the same texts, in percent."""
    def join(text):
        return " ".join(split_words(text))

    truth = {index: [join(text) for text in texts] for index, texts in enumerate(references)}
    guess = {index: [join(text)] for index, text in enumerate(candidates)}
    if name == "bleu":
        from pycocoevalcap.bleu.bleu import Bleu
        return 100 * Bleu(4).compute_score(truth, guess, verbose=0)[0][order - 1]
    from pycocoevalcap.cider.cider import Cider
    return 100 * Cider().compute_score(truth, guess)[0]


def check_captions(candidates, references):
    for order in (1, 2, 3, 4):
        assert bleu(candidates, references, order) == \
            pytest.approx(official("bleu", candidates, references, order), rel=1e-9)
    assert cider_d(candidates, references) == \
        pytest.approx(official("cider", candidates, references), rel=1e-9, abs=1e-9)


def draw_text(generator, shortest=0):
    return " ".join(generator.choices("a red blue cat dog sits on the mat".split(), k=generator.randint(shortest, 14)))


# --- words ---

def test_words_drop_case_and_punctuation():
    assert split_words("A man's 2 dogs, 'running' — FAST_er!") == ["a", "man's", "2", "dogs", "running", "fast", "er"]
    assert split_words("the dogs’ café isn’t") == ["the", "dogs", "café", "isn't"]
    assert split_words(" ... ") == []


def test_marks_stay_on_their_letters():
    assert split_words("हिन्दी में कुत्ता।") == ["हिन्दी", "में", "कुत्ता"]
    assert split_words("Cafe\u0301 \u0301 a\u0301b'cd\u0323_e") == ["café", "áb'cḍ", "e"]
    assert bleu(["कि"], [["की"]], order=1) == pytest.approx(0)


@given(st.text() | st.text(st.characters(categories=("Lo", "Lu", "Mn", "Mc", "Zs", "Pc"))))
def test_words_of_words_are_the_same_words(text):
    once = split_words(text)
    assert split_words(" ".join(once)) == once


# --- captions ---

@pytest.mark.parametrize("count", [1, 2])
def test_another_pictures_caption_needs_another_picture(monkeypatch, count):
    """Of a split of one picture the control was the picture's own caption."""
    monkeypatch.setattr(measure, "evaluate_retrieval", lambda *given: {})
    captions = ["a red dog on the grass", "two cats"][:count]
    bridge = SimpleNamespace(retriever=SimpleNamespace(caption=lambda seen: captions), stage2=object(),
                             blip2=SimpleNamespace(caption=lambda seen: captions))
    data = SimpleNamespace(images=[SimpleNamespace(captions=[text]) for text in captions], pairs=captions,
                           texts=captions, rows=list(range(count)))
    found = measure.evaluate_photos(bridge, None, data, np.zeros((count, 1, 2)), None)
    assert found["stage2_bleu4"] > 0 and ("shuffled_bleu4" in found) == ("shuffled_cider" in found) == (count > 1)


@pytest.mark.parametrize("seed", range(5))
def test_captions_equal_pycocoevalcap_on_random_corpora(seed):
    generator = random.Random(seed)
    references = [[draw_text(generator, 1) for _ in range(generator.randint(1, 5))] for _ in range(30)]
    check_captions([draw_text(generator) for _ in references], references)


@pytest.mark.parametrize(("candidates", "references"), [
    (["", "a cat"], [["a cat on a mat"], ["a cat", "the cat"]]),  # an empty candidate
    (["", ""], [["a cat"], ["a dog"]]),  # nothing but empty candidates
    (["cat", "dog"], [["cat"], ["a dog"]]),  # one word: no 2-gram exists
    (["the the the the the", "a"], [["the cat is on the mat"], ["a dog"]]),  # repeated words are clipped
    (["a cat sits"], [["a cat sits", "a cat sits"]]),  # one image only: nothing is rare
    (["a b c d", "x y"], [["a b c", "a b c d e"], ["x y z q w e r t"]]),  # two references equally close
    (["a cat on a mat", "dogs run"], [["a cat on a mat"], ["dogs run"]]),  # perfect
    (["sky", "a cat"], [["..."], ["a cat"]]),  # a reference without words
])
def test_captions_equal_pycocoevalcap_on_edge_cases(candidates, references):
    check_captions(candidates, references)


@settings(max_examples=60, deadline=None)
@given(st.lists(min_size=2, max_size=5, elements=st.tuples(
    st.text("ab ", max_size=12), st.lists(st.text("abc ", max_size=12).map("a".__add__), min_size=1, max_size=3))))
def test_captions_equal_pycocoevalcap_on_any_corpus(corpus):
    candidates, references = map(list, zip(*corpus, strict=True))
    check_captions(candidates, references)


def test_captions_equal_pycocoevalcap_on_real_captions(photos):
    annotations = json.loads((photos / "annotations" / "captions_val.json").read_text(encoding="utf-8"))["annotations"]
    of_image = {}
    for annotation in annotations:
        of_image.setdefault(annotation["image_id"], []).append(annotation["caption"])
    texts = [captions for captions in of_image.values() if len(captions) > 1]
    assert len(texts) > 100
    check_captions([first for first, *_ in texts], [rest for _, *rest in texts])
    own = cider_d([first for first, *_ in texts], [rest for _, *rest in texts])
    assert own > 10 * cider_d([first for first, *_ in texts], [rest for _, *rest in texts[1:] + texts[:1]])


def test_perfect_captions_score_full_marks():
    texts = ["a red cat sits on the mat", "two dogs run over green grass"]
    assert bleu(texts, [[text] for text in texts]) == pytest.approx(100)
    assert cider_d(texts, [[text] for text in texts]) == pytest.approx(1000)


def test_repeating_words_does_not_pay():
    references = [["a red cat"], ["a blue dog"]]
    assert bleu(["cat cat cat", "dog dog dog"], references, order=1) == pytest.approx(100 * 2 / 6)
    assert cider_d(["cat cat cat", "dog dog dog"], references) < cider_d(["red cat", "blue dog"], references)


@pytest.mark.parametrize("metric", [bleu, cider_d])
def test_captions_that_cannot_be_scored_are_refused(metric):
    with pytest.raises(UserError, match="0 captions"):
        metric([], [])
    with pytest.raises(UserError, match="2 captions and 1 lists"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(UserError, match="references of caption 1"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="references of caption 0"):
        metric(["a"], ["a cat"])  # a string where a list of strings belongs


# --- retrieval ---

def recall_by_loop(similarity, positive, k):
    hits = 0
    for row, own in zip(similarity.tolist(), positive.tolist(), strict=True):
        # the worst order: at equal similarity, negatives come first
        order = sorted(range(len(row)), key=lambda column: (-row[column], own[column]))
        hits += any(own[column] for column in order[:k])
    return 100 * hits / len(similarity)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_recall_equals_a_loop_with_and_without_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    similarity = torch.randint(levels, (40, 25), generator=generator) / levels
    positive = torch.rand(40, 25, generator=generator) < 0.1
    assert not positive.any(dim=1).all()  # some rows have no positive at all
    for k, value in recall_at_k(similarity, positive, (1, 2, 5, 10, 25, 50)).items():
        assert value == pytest.approx(recall_by_loop(similarity, positive, k))


def test_recall_is_not_flattered():
    one_each = torch.eye(20, dtype=torch.bool)
    assert recall_at_k(torch.zeros(20, 20), one_each) == {1: 0, 5: 0, 10: 0}
    assert recall_at_k(torch.full((20, 20), math.nan), one_each) == {1: 0, 5: 0, 10: 0}
    assert recall_at_k(torch.eye(20), one_each) == {1: 100, 5: 100, 10: 100}
    assert recall_at_k(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool), (5,)) == {5: 0}  # k exceeds the columns
    assert recall_at_k(torch.full((1, 2), -math.inf), torch.tensor([[True, False]]), (1,)) == {1: 0}


def test_recall_ignores_the_order_of_columns():
    generator = torch.Generator().manual_seed(0)
    similarity, positive = torch.randn(30, 30, generator=generator), torch.eye(30, dtype=torch.bool)
    order = torch.randperm(30, generator=generator)
    assert recall_at_k(similarity, positive) == recall_at_k(similarity[:, order], positive[:, order])


def test_retrieval_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5, 0.2],  # image 0 owns texts 0, 1: found at once
                               [0.8, 0.3, 0.6, 0.4]])  # image 1 owns texts 2, 3: the best is text 0
    scores = retrieval(similarity, torch.tensor([0, 0, 1, 1]))
    assert scores == {"i2t_r1": 50, "i2t_r5": 100, "i2t_r10": 100, "t2i_r1": 75, "t2i_r5": 100, "t2i_r10": 100}


def test_retrieval_at_chance():
    generator = torch.Generator().manual_seed(0)
    scores = retrieval(torch.rand(200, 1000, generator=generator), torch.arange(1000) // 5)
    assert scores["t2i_r10"] == pytest.approx(5, abs=2)
    assert scores["i2t_r10"] == pytest.approx(5, abs=5)


def test_retrieval_refuses_what_does_not_fit():
    with pytest.raises(UserError, match="image_of_text has shape"):
        retrieval(torch.rand(2, 4), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="not image ids"):
        retrieval(torch.rand(2, 2), torch.tensor([17, 4]))
    with pytest.raises(UserError, match="non-empty"):
        retrieval(torch.rand(0, 0), torch.tensor([], dtype=torch.long))
    with pytest.raises(UserError, match="two equal"):
        recall_at_k(torch.rand(2, 3), torch.ones(3, 2, dtype=torch.bool))


# --- confidence ---

def test_confidence_interval_against_known_numbers():
    assert confidence_interval(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)  # z² / (n + z²)
    assert confidence_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert confidence_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, Table I
    assert confidence_interval(0, 0) == (0, 1)
    with pytest.raises(UserError, match="3 successes in 2 trials"):
        confidence_interval(3, 2)


@given(st.integers(1, 5000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_confidence_interval_solves_wilsons_equation(case):
    successes, trials = case
    share = successes / trials
    low, high = confidence_interval(successes, trials)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for bound in (low, high):  # where the share is 1.96 standard errors *of the bound* away
        assert (share - bound) ** 2 == pytest.approx(1.959963985 ** 2 * bound * (1 - bound) / trials, abs=1e-9)


# --- pointing game ---

def peak(rows, columns, row, column):
    heatmap = torch.zeros(rows, columns)
    heatmap[row, column] = 1.0
    return heatmap


def test_pointing_game_by_hand():
    size = (80, 40)  # wider than high, on a grid of 2 rows and 4 columns: cells of 20 x 20 pixels
    box = [(60, 20, 20, 20)]  # the cell at the bottom right
    for row in range(2):
        for column in range(4):
            assert pointing_game(peak(2, 4, row, column), box, size) == ((row, column) == (1, 3))
    assert pointing_game(peak(2, 4, 0, 0), [(0, 0, 15, 15), *box], size)  # any of the boxes
    assert not pointing_game(peak(2, 4, 0, 0), [(0, 0, 10, 40)], size)  # the centre (10, 10) is just outside
    assert pointing_game(peak(2, 4, 0, 0), [(10, 10, 1, 1)], size)  # and here just inside
    assert not pointing_game(peak(2, 4, 0, 0), [], size)


def test_pointing_game_ties_do_not_win():
    assert not pointing_game(torch.ones(4, 4), [(0, 0, 10, 10)], (40, 40))
    assert pointing_game(torch.ones(4, 4), [(0, 0, 40, 40)], (40, 40))
    with pytest.raises(UserError, match="1 NaN"):
        pointing_game(torch.tensor([[math.nan, 1.0]]), [(0, 0, 9, 9)], (9, 9))
    with pytest.raises(UserError, match=r"shape \(4,\)"):
        pointing_game(torch.ones(4), [(0, 0, 9, 9)], (9, 9))


def test_pointing_chance_is_the_share_of_winning_peaks():
    boxes, size = [(3, 2, 30, 11), (20, 5, 50, 20)], (77, 35)  # overlapping boxes count once
    wins = [pointing_game(peak(5, 7, row, column), boxes, size) for row in range(5) for column in range(7)]
    assert pointing_chance(boxes, size, (5, 7)) == pytest.approx(sum(wins) / len(wins))
    assert 0 < sum(wins) < len(wins)
    assert pointing_chance([(0, 0, 40, 20)], (80, 20), (2, 4)) == 0.5
    assert pointing_chance([], size, (5, 7)) == 0
