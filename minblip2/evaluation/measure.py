"""What a trained bridge can do, measured on a split: retrieval, captions, pointing, beside baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import scenes
from ..data.coco import CocoCaptions
from ..data.files import read_json, write_json
from ..device import autocast
from ..stage1 import Stage1
from ..training.bridge import Bridge
from . import metrics
from .grounding import text_map, to_grid

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
    "stage2_positions": "stated absolute positions right (%)",
    "shuffled_positions": "— of another picture, the control (%)",
    "stage2_relations": "stated relations right (%)",
    "shuffled_relations": "— of another picture, the control (%)",
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

@torch.no_grad()
def embed(bridge: Bridge, features: Tensor, captions: Sequence[str], batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Unit vectors of images (n q e) and of captions (m e) in the shared space, in float32."""
    stage1 = bridge.stage1.to(bridge.device).eval()
    with autocast(bridge.device):
        images = [stage1.embed_image(stage1.image_kv(chunk.float().to(bridge.device)))
                  for chunk in features.split(batch_size)]
        texts = [stage1.embed_text(*bridge.text_ids(captions[i : i + batch_size]))
                 for i in range(0, len(captions), batch_size)]
    return torch.cat(images).float(), torch.cat(texts).float()


def itc_scores(bridge: Bridge, features: Tensor, captions: Sequence[str]) -> Tensor:
    """ITC's similarities (n m) of images (n v e) and captions, on the CPU."""
    images, texts = embed(bridge, features, captions)
    return torch.cat([bridge.stage1.similarity(chunk, texts) for chunk in images.split(50)]).cpu()


@torch.no_grad()
def match_all(stage1: Stage1, features: Tensor, text_ids: Tensor, text_mask: Tensor, image_rows: Tensor,
              text_rows: Tensor, batch_size: int = 32) -> Tensor:
    """ITM logits "match" (n) of chosen pairs: image `image_rows` (n) with text `text_rows` (n); features (b v e).

    Each image's keys and values are projected once, however many texts it meets; these read them together,
    `batch_size` at a time and the short ones first, so that there is little padding.
    """
    scores, device = torch.empty(len(image_rows)), text_ids.device
    lengths = text_mask.sum(dim=1).cpu()
    order = lengths[text_rows].argsort()
    for image in image_rows.unique().tolist():
        kv = stage1.image_kv(features[image : image + 1].float().to(device))
        for some in order[image_rows[order] == image].split(batch_size):
            texts, longest = text_rows[some].to(device), lengths[text_rows[some]].max()
            scores[some] = stage1.match(kv, text_ids[texts, :longest], text_mask[texts, :longest])[:, 1].float().cpu()
    return scores


def match_scores(bridge: Bridge, features: Tensor, captions: Sequence[str], image_rows: Tensor,
                 text_rows: Tensor) -> Tensor:
    """`match_all` of a bridge's stage 1 for captions, in the precision that its device prefers."""
    with autocast(bridge.device):
        return match_all(bridge.stage1.to(bridge.device).eval(), features, *bridge.text_ids(captions), image_rows,
                         text_rows)


def rerank(bridge: Bridge, features: Tensor, captions: Sequence[str], cosine: Tensor,
           top: int) -> tuple[Tensor, Tensor]:
    """Retrieval scores after matching has seen the `top` best: ITM logit + cosine, as LAVIS ranks; others far below.

    cosine (images, texts). Returns image->text and text->image scores, both (images, texts).
    """
    directions = []
    for dim in (1, 0):
        best = cosine.topk(min(top, cosine.shape[dim]), dim=dim).indices
        chosen = torch.zeros_like(cosine, dtype=torch.bool).scatter(dim, best, True)
        images, texts = chosen.nonzero(as_tuple=True)
        scores = cosine - 100.0
        scores[images, texts] = cosine[images, texts] + match_scores(bridge, features, captions, images, texts)
        directions.append(scores)
    return directions[0], directions[1]


def retrieval(bridge: Bridge, features: Tensor, captions: Sequence[str], image_of_text: Sequence[int],
              top: int = 16) -> dict[str, float]:
    """Recall both ways in percent, by ITC and with ITM re-ranking of the `top` best."""
    cosine = itc_scores(bridge, features, captions)
    image_of_text = torch.as_tensor(image_of_text)
    results = {f"itc_{key}": value for key, value in metrics.retrieval(cosine, image_of_text).items()}
    i2t, t2i = rerank(bridge, features, captions, cosine, top)
    both = {"i2t": metrics.retrieval(i2t, image_of_text), "t2i": metrics.retrieval(t2i, image_of_text)}
    return results | {f"itm_{key}": both[key[:3]][key] for key in both["i2t"]}


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D and BLEU-4 (both x100), and how many of the captions differ."""
    candidates, references = list(candidates), [list(some) for some in references]
    return {"cider": metrics.cider_d(candidates, references), "bleu4": metrics.bleu(candidates, references),
            "distinct": len(set(candidates))}


def nearest_captions(train_features: np.ndarray, features: np.ndarray, train: CocoCaptions) -> list[str]:
    """For each picture the first caption of the training picture whose first visual token is nearest by cosine."""
    known, asked = (F.normalize(torch.from_numpy(np.array(f[:, 0], dtype=np.float32)), dim=-1)
                    for f in (train_features, features))
    return [train.images[i].captions[0] for i in (asked @ known.T).argmax(dim=1).tolist()]


def evaluate_photos(bridge: Bridge, train: CocoCaptions, data: CocoCaptions, features: np.ndarray,
                    train_features: np.ndarray, top: int = 16) -> dict[str, float]:
    """Retrieval and captions of a split, beside the nearest training picture's caption and shuffled images."""
    seen = torch.from_numpy(np.array(features))
    results = {"images": len(data.images), "captions": len(data.pairs), "chance_r1": 100 / len(data.images)}
    results |= retrieval(bridge, seen, [caption for _, caption in data.pairs], [image for image, _ in data.pairs], top)
    references = [record.captions for record in data.images]
    sources = {"nearest": nearest_captions(train_features, features, train), "stage1": bridge.caption_stage1(seen)}
    if bridge.stage2 is not None:
        sources["stage2"] = bridge.caption(seen)
        # Every picture gets another one's caption: what is left is what fluent guessing is worth.
        sources["shuffled"] = sources["stage2"][1:] + sources["stage2"][:1]
    for name, captions in sources.items():
        results |= {f"{name}_{key}": value for key, value in caption_scores(captions, references).items()}
    return results


# --- scenes -----------------------------------------------------------------------------------------------------------


# How captions of each kind open in the language of the scenes: the text prompt that asks for what is to be judged.
QUESTIONS = {"things": "a picture of", "positions": "this picture shows", "relations": "we see", "background": "on a",
             "size": "there is"}


def ask(bridge: Bridge, features: Tensor, prompt: str) -> list[str]:
    """Captions by the language model that begin with `prompt`, which is part of the text returned."""
    return [f"{prompt} {text}" for text in bridge.caption(features, prompt=prompt)]


def scene_accuracy(captions: Sequence[str], truths: Sequence[scenes.Scene]) -> dict[str, float]:
    """Percent of captions that are right: `things` of all; positions, relations, ... of those that state any."""
    verdicts = [scenes.judge(caption, scene) for caption, scene in zip(captions, truths, strict=True)]
    results = {}
    for key in ("things", "positions", "relations", "background", "size"):
        told = [verdict[key] for verdict in verdicts if verdict[key] is not None]
        results[key] = 100 * sum(told) / len(told) if told else float("nan")
        results[f"{key}_told"] = 100 * len(told) / len(verdicts)
    return results


def pointing(bridge: Bridge, data: CocoCaptions, features: Tensor, truths: Sequence[scenes.Scene]) -> dict[str, float]:
    """Percent of things at which the gradient-weighted map of "a <colour> <shape>" points, and what chance gives."""
    asked = [(row, thing) for row, scene in enumerate(truths) for thing in scene.things]
    hits, chances = [], []
    for start in range(0, len(asked), 100):
        some = asked[start : start + 100]
        ids, mask = bridge.text_ids([scenes.phrase(thing.colour, thing.shape) for _, thing in some])
        image = features[[row for row, _ in some]].float().to(bridge.device)
        heat_of = text_map(bridge.stage1.to(bridge.device).eval(), image, ids, mask)
        maps = to_grid(heat_of, bridge.parts.class_token).cpu()
        for heat, (row, thing) in zip(maps, some, strict=True):
            size = (data.images[row].width, data.images[row].height)
            hits.append(metrics.pointing_game(heat, [thing.box], size))
            chances.append(metrics.pointing_chance([thing.box], size, tuple(heat.shape)))
    return {"pointing": 100 * float(np.mean(hits)), "pointing_chance": 100 * float(np.mean(chances))}


def prefers_truth(bridge: Bridge, features: Tensor, data: CocoCaptions, spoil) -> float:
    """Percent of captions that ITM scores above their spoiled version (50 is chance); `spoil(caption)` may decline."""
    pairs = [(row, caption, foil) for row, record in enumerate(data.images) for caption in record.captions
             if (foil := spoil(caption)) is not None][:1000]
    rows = torch.tensor([row for row, _, _ in pairs])
    true, false = (match_scores(bridge, features, [pair[side] for pair in pairs], rows, torch.arange(len(pairs)))
                   for side in (1, 2))
    return 100 * float((true > false).float().mean())


def telling_captions(data: CocoCaptions, most: int) -> tuple[list[str], list[int]]:
    """The caption of each picture that tells most, and the pictures' rows; none twice, for a plain one fits many."""
    texts: dict[str, int] = {}
    for row, record in enumerate(data.images):
        texts.setdefault(max(record.captions, key=lambda caption: caption.count(" ")), row)
    return list(texts)[:most], list(texts.values())[:most]


def evaluate_scenes(bridge: Bridge, data: CocoCaptions, truths: Sequence[scenes.Scene], features: np.ndarray,
                    candidates: int = 200) -> dict[str, float]:
    """All that is measured on drawn scenes: retrieval, captions of seen and unseen pairs, pointing, binding."""
    seen = torch.from_numpy(np.array(features))
    unseen = np.array([scene.unseen for scene in truths])
    chosen, rows = telling_captions(data, candidates)
    found = retrieval(bridge, seen[rows], chosen, list(range(len(chosen))))
    results = {"images": len(truths), "candidates": len(chosen), **found}
    written = {"stage1": {"things": bridge.caption_stage1(seen)}}
    if bridge.stage2 is not None:
        written["stage2"] = {key: ask(bridge, seen, prompt) for key, prompt in QUESTIONS.items()}
        # Every picture gets another one's captions (seen stay seen): what is left is what fluent guessing is worth.
        written["shuffled"] = {key: captions[2:] + captions[:2] for key, captions in written["stage2"].items()}
    for name, kinds in written.items():
        for key, captions in kinds.items():
            judged = scene_accuracy(captions, truths)
            results |= {f"{name}_{key}": judged[key], f"{name}_{key}_told": judged[f"{key}_told"]}
        for side, rows_of in (("seen", ~unseen), ("unseen", unseen)):
            some = [(kinds["things"][i], truths[i]) for i in np.flatnonzero(rows_of)]
            results[f"{name}_things_{side}"] = scene_accuracy(*zip(*some, strict=True))["things"]
    results |= pointing(bridge, data, seen, truths)
    results["binding"] = prefers_truth(bridge, seen, data, scenes.swap_colours)
    results["relation_choice"] = prefers_truth(bridge, seen, data, scenes.flip_relation)
    return results


# --- a whole run ------------------------------------------------------------------------------------------------------


def evaluate_run(out: Path, bridge: Bridge, split: str, top: int = 16) -> dict[str, float]:
    """Measure a run on a split of its own data and keep the figures in results-{split}.json."""
    told = read_json(out / "run.json")
    root = Path(told["data"])
    data = CocoCaptions(root, split)
    features = bridge.features(data, out / "cache")
    started = time.perf_counter()
    if bridge.recipe.name == "scenes":
        results = evaluate_scenes(bridge, data, scenes.load_scenes(root, split), features)
    else:
        train = CocoCaptions(root, "train")
        results = evaluate_photos(bridge, train, data, features, bridge.features(train, out / "cache"), top)
    results |= {"seconds_to_evaluate": time.perf_counter() - started}
    for stage in ("vit", "lm", "stage1", "stage2"):
        if (out / stage / "seconds.json").exists():
            results[f"seconds_{stage}"] = read_json(out / stage / "seconds.json")["seconds"]
    write_json(out / f"results-{split}.json", results)
    return results
