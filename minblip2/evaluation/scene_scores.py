"""What is measured on drawn scenes, where the truth is known: right captions, pointing, and binding by foils."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.coco import CocoCaptions
from ..data.scene_captions import flip_relation, judge, phrase, swap_colours
from ..data.scenes import Scene
from ..training.bridge import Bridge
from ..vit import to_grid
from ..weights.blip2 import Blip2
from ..weights.reader import Images
from ..weights.retriever import Retriever
from . import metrics
from .asking import captions_from_text, evaluate_questions
from .retrieval import TOP, evaluate_retrieval

# How captions of each kind open in the language of the scenes: the text prompt that asks for what is to be judged.
QUESTIONS = {"things": "a picture of", "positions": "this picture shows", "relations": "we see", "background": "on a",
             "size": "there is"}


def write_after(blip2: Blip2, images: Images, prompt: str) -> list[str]:
    """Captions by the language model that begin with `prompt`, which is part of the text returned."""
    return [f"{prompt} {text}" for text in blip2.caption(images, prompt)]


def scene_accuracy(captions: Sequence[str], truths: Sequence[Scene]) -> dict[str, float]:
    """Percent of captions that are right: `things` of all; positions, relations, ... of those that state any.

    `positions_of_right` and so on look only at captions whose things are right: what is left is placing.
    """
    verdicts = [judge(caption, scene) for caption, scene in zip(captions, truths, strict=True)]
    results = {}
    for key in ("things", "positions", "relations", "background", "size"):
        stated = [verdict[key] for verdict in verdicts if verdict[key] is not None]
        results[key] = 100 * sum(stated) / len(stated) if stated else float("nan")
        results[f"{key}_coverage"] = 100 * len(stated) / len(verdicts)
        of_right = [verdict[key] for verdict in verdicts if verdict[key] is not None and verdict["things"]]
        results[f"{key}_of_right"] = 100 * sum(of_right) / len(of_right) if of_right else float("nan")
    return results


def pointing(retriever: Retriever, data: CocoCaptions, features: Tensor, truths: Sequence[Scene]) -> dict[str, float]:
    """Percent of things at which the gradient-weighted map of "a <colour> <shape>" points, and what chance gives."""
    asked = [(row, thing) for row, scene in enumerate(truths) for thing in scene.things]
    hits, chances = [], []
    for some in (asked[start:start + 100] for start in range(0, len(asked), 100)):
        text = retriever.text_ids([phrase(thing.colour, thing.shape) for _, thing in some])
        images = features[[row for row, _ in some]].float().to(retriever.device)
        maps = to_grid(retriever.stage1.match_map(images, *text), retriever.vit.config.class_token).cpu()
        for heat, (row, thing) in zip(maps, some, strict=True):
            size = (data.images[row].width, data.images[row].height)
            hits.append(metrics.pointing_game(heat, [thing.box], size))
            chances.append(metrics.pointing_chance([thing.box], size, tuple(heat.shape)))
    return {"pointing": 100 * float(np.mean(hits)), "pointing_chance": 100 * float(np.mean(chances))}


def foil_accuracy(retriever: Retriever, features: Tensor, data: CocoCaptions, spoil) -> float:
    """Percent of captions that ITM scores above their spoiled version (50 is chance): of the first 1,000 that have one,
    as `spoil(caption)` may decline."""
    pairs = [(row, caption, foil) for row, record in enumerate(data.images) for caption in record.captions
             if (foil := spoil(caption)) is not None][:1000]
    rows = torch.tensor([row for row, _, _ in pairs])
    true, false = (retriever.match_logits(features, [pair[side] for pair in pairs], rows, torch.arange(len(pairs)))
                   for side in (1, 2))
    return 100 * float((true > false).float().mean())


def longest_captions(data: CocoCaptions, most: int) -> tuple[list[str], list[int]]:
    """The longest caption of each image, at most `most` of them, and the images' rows; none is there twice."""
    texts: dict[str, int] = {}
    for row, record in enumerate(data.images):
        texts.setdefault(max(record.captions, key=lambda caption: caption.count(" ")), row)
    return list(texts)[:most], list(texts.values())[:most]


def evaluate_scenes(bridge: Bridge, data: CocoCaptions, truths: Sequence[Scene], features: np.ndarray,
                    candidates: int = 200, top: int = TOP, whole: bool = True) -> dict[str, float]:
    """What is measured on drawn scenes: retrieval, captions, pointing, binding. If it is to be the `whole`, also what
    takes the most time: answers to questions, captions of scenes that are told in text, and relations.

    Figures of what no scene has, as of unseen pairs in the train split, are left out.
    """
    seen = torch.from_numpy(np.array(features))
    unseen = np.array([scene.unseen for scene in truths])
    chosen, rows = longest_captions(data, candidates)
    found = evaluate_retrieval(bridge.retriever, seen[rows], chosen, list(range(len(chosen))), top)
    results = {"images": len(truths), "candidates": len(chosen), **found}
    written = {"stage1": {"things": bridge.retriever.caption(seen)}}
    if bridge.stage2 is not None:
        written["stage2"] = {key: write_after(bridge.blip2, seen, prompt) for key, prompt in QUESTIONS.items()}
        # Every picture gets another one's captions (seen stay seen): what is left is what fluent guessing is worth.
        written["shuffled"] = {key: captions[2:] + captions[:2] for key, captions in written["stage2"].items()}
        if whole:
            written["told"] = {key: captions_from_text(bridge.blip2, seen, truths, prompt)
                               for key, prompt in QUESTIONS.items()}
            results |= evaluate_questions(bridge.blip2, seen, truths)
    for name, kinds in written.items():
        for key, captions in kinds.items():
            judged = scene_accuracy(captions, truths)
            results |= {f"{name}_{measured}": judged[measured]
                        for measured in (key, f"{key}_coverage", f"{key}_of_right") if measured != "things_of_right"}
        for side, rows_of in (("seen", ~unseen), ("unseen", unseen)):
            if some := [(kinds["things"][i], truths[i]) for i in np.flatnonzero(rows_of)]:
                results[f"{name}_things_{side}"] = scene_accuracy(*zip(*some, strict=True))["things"]
    results |= pointing(bridge.retriever, data, seen, truths)
    foils = {"binding": swap_colours} | ({"relation_choice": flip_relation} if whole else {})
    for name, spoil in foils.items():
        if any(spoil(caption) is not None for caption in data.texts):
            results[name] = foil_accuracy(bridge.retriever, seen, data, spoil)
    return results
