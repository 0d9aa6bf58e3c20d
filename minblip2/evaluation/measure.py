"""A whole run measured on a split of its data, beside baselines; what each figure is called."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .. import UserError
from ..data.coco import CocoCaptions
from ..data.files import field, read_json, write_json
from ..data.scene_dataset import load_scenes
from ..training.bridge import Bridge
from ..training.checks import open_split
from ..training.records import read_record, recorded_data
from ..training.shipping import PARTS
from . import metrics
from .retrieval import TOP, evaluate_retrieval
from .scene_scores import evaluate_scenes

LABELS = {  # what is told of a run, in this order -> what it is called
    "images": "pictures",
    "candidates": "captions to choose from",
    "itc_i2t_r1": "image → text R@1, ITC (%)",
    "itc_i2t_r10": "image → text R@10, ITC (%)",
    "itc_t2i_r1": "text → image R@1, ITC (%)",
    "itc_t2i_r10": "text → image R@10, ITC (%)",
    "itm_i2t_r1": "image → text R@1, re-ranked by ITM (%)",
    "itm_i2t_r10": "image → text R@10, re-ranked by ITM (%)",
    "itm_t2i_r1": "text → image R@1, re-ranked by ITM (%)",
    "itm_t2i_r10": "text → image R@10, re-ranked by ITM (%)",
    "chance_r1": "R@1 by chance (%)",
    "stage2_things_seen": "captions with every colour and shape right, seen pairs (%)",
    "stage2_things_unseen": "captions with every colour and shape right, unseen pairs (%)",
    "stage2_things": "captions with every colour and shape right, all (%)",
    "stage1_things": "— by the Q-Former alone, without a language model (%)",
    "shuffled_things": "— of another picture, the control (%)",
    "told_things": "— by the language model, told in text instead (%)",
    "stage2_positions": "stated absolute positions right (%)",
    "shuffled_positions": "— of another picture, the control (%)",
    "stage2_positions_of_right": "— among captions whose things are right (%)",
    "told_positions_of_right": "— among these, told in text instead (%)",
    "stage2_size": "stated sizes right (%)",
    "shuffled_size": "— of another picture, the control (%)",
    "stage2_size_of_right": "— among captions whose things are right (%)",
    "told_size_of_right": "— among these, told in text instead (%)",
    "stage2_relations": "stated relations right (%)",
    "shuffled_relations": "— of another picture, the control (%)",
    "stage2_relations_of_right": "— among captions whose things are right (%, chance 50)",
    "told_relations_of_right": "— among these, told in text instead (%)",
    "stage2_background": "stated backgrounds right (%)",
    "shuffled_background": "— of another picture, the control (%)",
    "told_background": "— told in text instead (%)",
    "binding": "caption preferred to itself with colours swapped (%, chance 50)",
    "relation_choice": "caption preferred to itself with the relation flipped (%, chance 50)",
    "pointing": "pointing game, gradient-weighted maps (%)",
    "pointing_chance": "— by chance (%)",
    "stage2_cider": "CIDEr-D ×100",
    "stage1_cider": "— by the Q-Former alone, without a language model",
    "nearest_cider": "— of the nearest training picture's caption",
    "shuffled_cider": "— of another picture, the control",
    "stage2_bleu4": "BLEU-4 ×100",
    "stage1_bleu4": "— by the Q-Former alone, without a language model",
    "nearest_bleu4": "— of the nearest training picture's caption",
    "shuffled_bleu4": "— of another picture, the control",
    "seconds_vit": "seconds to train the vision transformer",
    "seconds_lm": "seconds to train the language model",
    "seconds_stage1": "seconds to train stage 1",
    "seconds_stage2": "seconds to train stage 2",
}


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D and BLEU-4 (both x100), how many of the captions differ, and their mean length in words."""
    candidates, references = list(candidates), [list(some) for some in references]
    return {"cider": metrics.cider_d(candidates, references), "bleu4": metrics.bleu(candidates, references),
            "distinct": len(set(candidates)),
            "words": statistics.fmean(len(metrics.split_words(text)) for text in candidates)}


def on_halves(captions: Mapping[str, Sequence[str]], references: Sequence[Sequence[str]], draws: int = 20
            ) -> dict[str, list[float]]:
    """CIDEr-D x100 of each captioner on the same random halves of the pictures: name -> `draws` scores.

    Halves drawn without replacement spread as whole sets of so many pictures do: their standard deviation is the
    standard error of the score of all pictures.
    """
    random, count = np.random.default_rng(0), len(references)
    halves = [random.permutation(count)[:count // 2] for _ in range(draws)]
    return {name: [metrics.cider_d([texts[i] for i in half], [list(references[i]) for i in half]) for half in halves]
            for name, texts in captions.items()}


def of_next_picture(captions: Sequence[str]) -> list[str]:
    """The control: every picture gets another one's caption, and what is left is what fluent guessing is worth."""
    return [*captions[1:], *captions[:1]]


def nearest_captions(train_features: np.ndarray, features: np.ndarray, train: CocoCaptions) -> list[str]:
    """For each picture the first caption of the training picture whose first visual token is nearest by cosine."""
    known, asked = (F.normalize(torch.from_numpy(np.array(f[:, 0], dtype=np.float32)), dim=-1)
                    for f in (train_features, features))
    return [train.images[i].captions[0] for i in (asked @ known.T).argmax(dim=1).tolist()]


def evaluate_photos(bridge: Bridge, train: CocoCaptions | None, data: CocoCaptions, features: np.ndarray,
                    train_features: np.ndarray | None, top: int = TOP) -> dict[str, float]:
    """Retrieval and captions of a split, beside the nearest training picture's caption and shuffled images.

    features (n v e) are of the split, train_features (n v e) of `train`; without these there is no nearest picture.
    """
    seen = torch.from_numpy(np.array(features))
    results = {"images": len(data.images), "captions": len(data.pairs), "chance_r1": 100 / len(data.images)}
    results |= evaluate_retrieval(bridge.retriever, seen, data.texts, data.rows, top)
    references = [record.captions for record in data.images]
    sources = {} if train is None else {"nearest": nearest_captions(train_features, features, train)}
    sources["stage1"] = bridge.retriever.caption(seen)
    if bridge.stage2 is not None:
        sources["stage2"] = bridge.blip2.caption(seen)
        if len(references) > 1:
            sources["shuffled"] = of_next_picture(sources["stage2"])
    for name, captions in sources.items():
        results |= {f"{name}_{key}": value for key, value in caption_scores(captions, references).items()}
    if bridge.stage2 is not None and len(references) > 3:
        scores = on_halves({name: sources[name] for name in ("stage1", "stage2")}, references)
        results["stage2_cider_sd"] = float(np.std(scores["stage2"]))
        results["stage2_lead_sd"] = float(np.std(np.subtract(scores["stage2"], scores["stage1"])))
    return results


def measure_run(out: Path, bridge: Bridge, split: str, top: int = TOP, begun: Callable[[], None] | None = None,
                data: Path | None = None) -> dict[str, float]:
    """Measure a run on a split of its own data, or of other `data`. Nothing is written but caches.

    `begun` is called when it is known that all can be read, before the long part. Of other `data`, photographs are
    measured without the nearest training picture where the run's own are not there any more.
    """
    root = data or recorded_data(out)
    skip = read_record(out).skip_broken
    measured = open_split(root, split, out, skip)
    truths = load_scenes(root, split) if bridge.recipe.name == "scenes" else None
    train = None
    if truths is None:
        with contextlib.nullcontext() if data is None else contextlib.suppress(UserError):
            train = open_split(recorded_data(out), "train", out, skip)
    if begun is not None:
        begun()
    features = bridge.features(measured, out / "cache")
    started = time.perf_counter()
    if truths is not None:
        results = evaluate_scenes(bridge, measured, truths, features, top=top)
    else:
        known = None if train is None else bridge.features(train, out / "cache")
        results = evaluate_photos(bridge, train, measured, features, known, top)
    results |= {"seconds_to_evaluate": time.perf_counter() - started}
    for stage in PARTS:
        path = out / stage / "seconds.json"  # of a run that was stopped, of its last session alone
        if path.exists() and field(read_json(path), "from_step", int, path) == 0:
            results[f"seconds_{stage}"] = field(read_json(path), "seconds", float, path)
    return results


def keep_results(out: Path, name: str, results: dict[str, float]) -> Path:
    """Write what was measured to results-{name}.json, which is returned; name: the split, and more if need be."""
    path = out / f"results-{name}.json"
    write_json(path, {key: value for key, value in results.items() if value == value})  # JSON has no nan
    return path


def evaluate_run(out: Path, bridge: Bridge, split: str, top: int = TOP) -> dict[str, float]:
    """Measure a run on a split of its own data and keep the figures in results-{split}.json."""
    results = measure_run(out, bridge, split, top)
    keep_results(out, split, results)
    return results
