"""Questions that no bridge was trained on: answered from the picture, from another one, from none, and from text.

Stage 2 has seen captions only. What the language model answers beside a picture it has brought along (paper §4.1). What
it answers when everything is told to it in text is what a bridge is compared with.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..data.scene_captions import write_caption
from ..data.scene_questions import KINDS, one_of_each
from ..data.scenes import Scene
from ..weights.blip2 import ANSWER, CAPTION, Blip2

COLUMNS = {"own": "own picture", "seen": "seen pairs", "unseen": "unseen pairs", "another": "another's",
           "none": "no picture", "guess": "commonest answer", "told": "told in text"}
TELLING = ("positions", "size", "background")  # captions that together tell all there is to know of a scene


def without_picture(blip2: Blip2) -> Blip2:
    """The same language model with nothing before its text: whatever image it is given, it is shown none."""
    stage2 = copy.copy(blip2.stage2)
    stage2.soft_prompt = lambda image_features: image_features.new_zeros(len(image_features), 0, stage2.lm.width)
    return replace(blip2, stage2=stage2)


def tell(blip2: Blip2, scene: Scene, rng: random.Random) -> str:
    """A scene in text, as the language model has learned to read several texts: one after another."""
    end = blip2.tokenizer.backend.id_to_token(blip2.tokenizer.eos_id)
    return " ".join(f"{write_caption(scene, kind, rng)} {end}" for kind in TELLING)


def captions_from_text(blip2: Blip2, features: Tensor, truths: Sequence[Scene], prompt: str, seed: int = 0
                       ) -> list[str]:
    """Captions by the language model alone that begin with `prompt`, each after its scene was told in text."""
    rng, reader = random.Random(seed), without_picture(blip2)
    prompts = [f"{tell(blip2, scene, rng)} {prompt}" for scene in truths]
    return [f"{prompt} {text}" for text in reader.generate(features, prompts, **CAPTION)]


def evaluate_questions(blip2: Blip2, features: Tensor, truths: Sequence[Scene], seed: int = 0) -> dict[str, float]:
    """Percent of questions answered rightly, one of every kind about each scene: `ask_{kind}_{column}`, see `COLUMNS`.

    features (n v e) are of the scenes' images, seen and unseen ones in turn. Columns without a question are left out.
    """
    rng = random.Random(seed)
    asked = [(row, question) for row, scene in enumerate(truths) for question in one_of_each(scene, rng)]
    rows, texts = [row for row, _ in asked], [question.text for _, question in asked]
    stories = [tell(blip2, scene, rng) for scene in truths]
    reader = without_picture(blip2)
    prompts = [f"{stories[row]} {blip2.question.format(text)}" for row, text in zip(rows, texts, strict=True)]
    own = features[rows]
    answers = {"own": blip2.ask(own, texts, batch_size=100),
               "another": blip2.ask(features.roll(-2, 0)[rows], texts, batch_size=100),
               "none": reader.ask(own, texts, batch_size=100),
               "told": reader.generate(own, prompts, batch_size=100, **ANSWER)}
    kinds, unseen = np.array([question.kind for _, question in asked]), np.array([truths[row].unseen for row in rows])
    right = {column: np.array([answer == question.answer for answer, (_, question) in zip(given, asked, strict=True)])
             for column, given in answers.items()}
    commonest = {kind: Counter(question.answer for _, question in asked if question.kind == kind).most_common(1)[0][0]
                 for kind in set(kinds.tolist())}
    right["guess"] = np.array([question.answer == commonest[question.kind] for _, question in asked])
    right |= {"seen": np.where(unseen, np.nan, right["own"]), "unseen": np.where(unseen, right["own"], np.nan)}
    return {f"ask_{kind}_{column}": 100 * float(np.nanmean(some)) for kind in KINDS for column in COLUMNS
            if not np.isnan(some := right[column][kinds == kind]).all()}


def questions_table(found: Sequence[dict[str, float]], cell: Callable[[list[float]], str],
                    title: str = "asked, never trained on (%)") -> list[list[str]]:
    """A header, and for each kind of question a row of `cell(values)`, the values of all results; [] without any."""
    known = [kind for kind in KINDS if any(f"ask_{kind}_own" in results for results in found)]
    rows = [[kind, *(cell([results[key] for results in found if (key := f"ask_{kind}_{column}") in results])
                     for column in COLUMNS)] for kind in known]
    return [[title, *COLUMNS.values()], *rows] if rows else []
