"""Metrics: recall for retrieval, BLEU and CIDEr-D for captions, the pointing game for attention maps.

Recall, BLEU and CIDEr-D are in percent. Where a rule leaves room (ties), the choice is the one that does not flatter
the model.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import UserError

WORD = re.compile(r"[^\W_]\w*(?:'[^\W_]\w*)*")  # letters and digits, with marks (here "_") and apostrophes inside


def split_words(text: str) -> list[str]:
    """The lower-cased words of a text, without punctuation; accents and vowel signs belong to their letters.

    The official COCO numbers use the Penn Treebank tokenizer (Java), which differs little: it splits "man's" in two.
    """
    text = unicodedata.normalize("NFC", text.lower().replace("’", "'").replace("_", " "))
    shape = "".join("_" if unicodedata.category(letter) in ("Mn", "Mc") else letter for letter in text)
    return [text[found.start():found.end()] for found in WORD.finditer(shape)]


def recall_at_k(similarity: Tensor, positive: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Percent of rows that have a positive among their k most similar columns, for each k.

    similarity (b n), positive (b n) boolean. A positive that ties with negatives (or is NaN) ranks
    behind them; a row without any positive is a miss.
    """
    if similarity.ndim != 2 or not similarity.numel() or similarity.shape != positive.shape:
        raise UserError(f"recall needs two equal, non-empty matrices, got similarity {tuple(similarity.shape)} and "
                        f"positive {tuple(positive.shape)}: give one row per query and one column per candidate")
    best = similarity.masked_fill(~positive, -math.inf).amax(dim=1, keepdim=True)
    ahead = (~positive & ~(similarity < best)).sum(dim=1)
    return {k: 100 * ((ahead < k) & positive.any(dim=1)).double().mean().item() for k in ks}


def retrieval(similarity: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Recall@1, 5, 10 in percent, image to text ("i2t_r1" ...) and text to image ("t2i_r1" ...).

    similarity (b t), one row per image and one column per text; image_of_text (t) is the row of each text's
    own image. Source: paper §4.4; an image counts as found by any of its captions.
    """
    image_of_text = torch.as_tensor(image_of_text, device=similarity.device)
    if image_of_text.shape != similarity.shape[1:]:
        raise UserError(f"image_of_text has shape {tuple(image_of_text.shape)} but similarity is "
                        f"{tuple(similarity.shape)}: give one image row for each text, that is, for each column")
    if image_of_text.numel() and not 0 <= image_of_text.min() <= image_of_text.max() < len(similarity):
        raise UserError(f"image_of_text runs from {image_of_text.min()} to {image_of_text.max()} but there are "
                        f"{len(similarity)} images: give row numbers of the matrix, not image ids")
    positive = torch.arange(len(similarity), device=similarity.device)[:, None] == image_of_text
    directions = {"i2t": recall_at_k(similarity, positive), "t2i": recall_at_k(similarity.T, positive.T)}
    return {f"{name}_r{k}": value for name, recalls in directions.items() for k, value in recalls.items()}


def ngrams(tokens: Sequence[str], order: int = 4) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to `order` words occurs."""
    return Counter(tuple(tokens[start:start + n]) for n in range(1, order + 1) for start in range(len(tokens) - n + 1))


def _tokenize(candidates: Sequence[str], references: Sequence[Sequence[str]]
              ) -> list[tuple[list[str], list[list[str]]]]:
    """Pair each candidate's words with its references' words; refuse what cannot be scored."""
    if not candidates or len(candidates) != len(references):
        raise UserError(f"there are {len(candidates)} captions and {len(references)} lists of references: "
                        "give at least one caption, and one list of references for each")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise UserError(f"the references of caption {index} are {texts!r}: give a list with at least one text")
    return [(split_words(candidate), [split_words(text) for text in texts])
            for candidate, texts in zip(candidates, references, strict=True)]


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], order: int = 4) -> float:
    """Corpus BLEU in percent: how many of the candidates' n-grams (n up to `order`) the references contain.

    A candidate shorter than its closest reference is punished. Equal to pycocoevalcap's `Bleu` on the same words, its
    smoothing included. Source: Papineni et al. 2002; pycocoevalcap bleu_scorer.py.
    """
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's: no n-gram at all scores 0, not an error
    correct, possible = [0] * order, [0] * order
    length = reference_length = 0
    for candidate, texts in _tokenize(candidates, references):
        most = Counter()
        for text in texts:
            most |= ngrams(text, order)  # of each n-gram, the highest count in any one reference
        for ngram, count in (ngrams(candidate, order) & most).items():
            correct[len(ngram) - 1] += count
        for n in range(order):
            possible[n] += max(0, len(candidate) - n)
        length += len(candidate)
        reference_length += min((len(text) for text in texts), key=lambda size: (abs(size - len(candidate)), size))
    precision = math.prod((hit + tiny) / (all_ + small) for hit, all_ in zip(correct, possible, strict=True))
    ratio = (length + tiny) / (reference_length + small)
    return 100 * precision ** (1 / order) * math.exp(min(0.0, 1 - 1 / ratio))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D in percent: cosine similarity to the references with rare n-grams (n = 1 to 4) weighted up.

    Rarity is counted over these references, so numbers compare only within one set of images, and one image alone
    scores 0. Equal to pycocoevalcap's `Cider` on the same words. Source: Vedantam et al. 2015 (arXiv 1411.5726).
    """
    order, sigma = 4, 6.0
    pairs = [(ngrams(candidate, order), [ngrams(text, order) for text in texts])
             for candidate, texts in _tokenize(candidates, references)]
    images_with = Counter(ngram for _, texts in pairs for ngram in set().union(*texts))

    def weigh(counts: Counter) -> tuple[list[dict], list[float], int]:
        vectors: list[dict] = [{} for _ in range(order)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * math.log(len(pairs) / max(1, images_with[ngram]))
        norms = [math.sqrt(sum(weight ** 2 for weight in vector.values())) for vector in vectors]
        # length in pairs of words, as in the original
        return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def similarity(candidate: tuple, text: tuple) -> float:
        (vectors, norms, length), (text_vectors, text_norms, text_length) = candidate, text
        total = 0.0
        for vector, norm, other, other_norm in zip(vectors, norms, text_vectors, text_norms, strict=True):
            if norm and other_norm:
                # clipped, so that repeating a word of the reference earns nothing
                total += sum(min(weight, other.get(ngram, 0.0)) * other.get(ngram, 0.0)
                             for ngram, weight in vector.items()) / (norm * other_norm)
        return total / order * math.exp(-(length - text_length) ** 2 / (2 * sigma ** 2))

    scores = []
    for counts, texts in pairs:
        candidate = weigh(counts)
        scores.append(sum(similarity(candidate, weigh(text)) for text in texts) / len(texts))
    return 100 * 10 * sum(scores) / len(scores)  # the 10 is part of the definition of CIDEr-D


def confidence_interval(successes: int, trials: int) -> tuple[float, float]:
    """Where the true share lies with 95 % confidence, given this many successes: (low, high).

    No trials tell nothing: (0, 1). Source: Wilson 1927; unlike ± 1.96 standard errors it never
    leaves 0 to 1.
    """
    if not 0 <= successes <= trials:
        raise UserError(f"{successes} successes in {trials} trials is impossible: give 0 <= successes <= trials")
    if not trials:
        return 0.0, 1.0
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    share, extra = successes / trials, z ** 2 / trials
    centre = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt((share * (1 - share) + extra / 4) / trials) / (1 + extra)
    return max(0.0, centre - half), min(1.0, centre + half)


def _inside(boxes: Sequence[Sequence[float]], image_size: tuple[float, float], grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid over the image have their centre in a box: (gh gw) boolean."""
    (width, height), (rows, columns) = image_size, grid
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) * width / columns
    y = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) * height / rows
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    for left, top, box_width, box_height in boxes:
        inside |= (left <= x) & (x < left + box_width) & (top <= y) & (y < top + box_height)
    return inside


def pointing_game(heatmap: Tensor, boxes: Sequence[Sequence[float]], image_size: tuple[float, float]) -> bool:
    """Whether the map's maximum points into one of the boxes.

    heatmap (gh gw) over the whole image, boxes (x, y, width, height) and image_size (width, height) in pixels.
    A cell points to its centre; cells that tie for the maximum must all point into a box, so that a constant map does
    not win by luck. Source: Zhang et al. 2016 (arXiv 1608.00507), without its tolerance of 15 pixels.
    """
    heatmap = torch.as_tensor(heatmap)
    if heatmap.ndim != 2 or not heatmap.numel() or heatmap.isnan().any():
        raise UserError(f"the heatmap has shape {tuple(heatmap.shape)} and {int(heatmap.isnan().sum())} NaN: "
                        "give one finite (gh, gw) map")
    inside = _inside(boxes, image_size, heatmap.shape).to(heatmap.device)
    return bool(inside[heatmap == heatmap.max()].all())


def pointing_chance(boxes: Sequence[Sequence[float]], image_size: tuple[float, float], grid: tuple[int, int]) -> float:
    """The share (0 to 1) of the cells of a (gh, gw) grid whose centre is in a box: what a random map would score."""
    return _inside(boxes, image_size, grid).double().mean().item()
