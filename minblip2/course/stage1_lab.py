"""What lessons 05 to 08 work with: the trained stage 1, frozen features of the scenes, and small models to train."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import masks
from ..data import scene_captions, scene_dataset, scenes
from ..data.coco import CocoCaptions
from ..data.pictures import load_image
from ..data.scenes import Scene
from ..data.tokenizer import Tokenizer
from ..evaluation import metrics
from ..evaluation.scene_scores import longest_captions
from ..stage1 import Stage1
from ..training.bridge import Bridge, load_bridge
from . import lesson
from .small_runs import small_stage1

PLACES = {"top", "bottom", "left", "right", "middle", "above", "below"}


class Lab(NamedTuple):
    """A trained bridge on the CPU and the scenes: `train_features` and `val_features` (n v i) are frozen."""

    bridge: Bridge
    stage1: Stage1
    tokenizer: Tokenizer
    train: CocoCaptions
    val: CocoCaptions
    truths: list[Scene]
    train_features: Tensor
    val_features: Tensor

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts as the Q-Former reads them: ids and mask (b t)."""
        return self.bridge.retriever.text_ids(texts)

    def image(self, row: int) -> Image.Image:
        """A validation image."""
        return load_image(self.val.images[row].path)

    def small(self, seed: int = 0, **changes) -> Stage1:
        """A stage 1 that trains in seconds: 2 blocks of width 64, 8 queries, unless `changes` says otherwise."""
        return small_stage1(self.bridge, seed, embed_dim=32, **changes)

    def telling(self, count: int = 200) -> tuple[list[str], list[int]]:
        """The longest captions of validation images, and the rows of these: see `longest_captions`."""
        return longest_captions(self.val, count)

    def pairs(self, rows: Sequence[int], places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images `rows` with their captions number `places`: features, ids, mask, and numbers of images."""
        rows = list(rows)
        ids, mask = self.encode([self.train.images[row].captions[place]
                                 for row, place in zip(rows, places, strict=True)])
        return self.train_features[rows].float(), ids, mask, torch.tensor(rows)

    def drawn(self, step: int, seed: int = 0, images: int | None = None, size: int = 32
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The batch of this step, as `pairs`: images drawn from the first `images` (None: all), a caption of each."""
        generator = random.Random(f"{seed} {step}")
        rows = generator.sample(range(images or len(self.train)), size)
        return self.pairs(rows, [generator.randrange(5) for _ in rows])


def open_lab() -> Lab:
    """The bridge that the course looks at, its stage 1 in evaluation mode without gradients, and the scenes."""
    bridge = replace(load_bridge(lesson.RUN), device=torch.device("cpu"))
    train, val = CocoCaptions(lesson.DATA, "train"), CocoCaptions(lesson.DATA, "val")
    known, seen = (torch.from_numpy(bridge.features(data, lesson.RUN / "cache").copy()) for data in (train, val))
    return Lab(bridge, bridge.stage1.cpu().eval().requires_grad_(False), bridge.backbones.tokenizer, train, val,
               scene_dataset.load_scenes(lesson.DATA, "val"), known, seen.float())


def images_found(similarity: Tensor) -> float:
    """Percent of texts whose own image comes first; similarity (n n), text i belongs to image i."""
    return metrics.retrieval(similarity, torch.arange(len(similarity)))["t2i_r1"]


def cost_of_words(model: Stage1, features: Tensor, ids: Tensor, mask: Tensor, first_position: int = 0) -> Tensor:
    """−ln p of every word that is asked for (n), on top of the queries; the text counts from `first_position`."""
    former, cache = model.qformer, model.qformer.new_cache()
    former(model.image_kv(features), cache=cache)
    dec = torch.cat([torch.full_like(ids[:, :1], former.dec_id), ids[:, 1:]], dim=1)
    rows = masks.multimodal_causal(former.config.num_queries, mask)[:, :, former.config.num_queries:]
    states = former(text_ids=dec, mask=rows, cache=cache, first_position=first_position).text[:, :-1]
    return F.cross_entropy(former.lm_logits(states[mask[:, 1:]]), ids[:, 1:][mask[:, 1:]], reduction="none")


def things_right(lab: Lab, texts: Sequence[str], shift: int = 0) -> list[bool]:
    """Whether each text names all things of its validation scene and no other, or of the scene `shift` further on."""
    return [scene_captions.judge(text, lab.truths[(row + shift) % len(texts)])["things"]
            for row, text in enumerate(texts)]


def costs_by_kind(lab: Lab, texts: Sequence[str], shift: int) -> dict[str, list[float]]:
    """−ln p of every word of the captions of the first validation images, colours and shapes, places, and all others.

    Each caption is written beside the image `shift` further on.
    """
    found: dict[str, list[float]] = {"colours and shapes": [], "places": [], "all others": []}
    for row, text in enumerate(texts):
        ids, mask = lab.encode([text])
        costs = cost_of_words(lab.stage1, lab.val_features[[(row + shift) % len(texts)]], ids, mask)
        for cost, number in zip(costs.tolist(), ids[0, 1:].tolist(), strict=True):
            word = lab.tokenizer.backend.id_to_token(number)
            kind = ("colours and shapes" if word in scenes.COLOURS or word in scenes.SHAPES
                    else "places" if word in PLACES else "all others")
            found[kind].append(cost)
    return found


def fit(model: nn.Module, loss_of: Callable[[int], Tensor | Mapping[str, Tensor]], steps: int,
        rate: float = 2e-3) -> list[dict[str, float]]:
    """Train on loss_of(step) with AdamW, a short warm-up and half a cosine; what it logs for each step.

    loss_of gives the loss, or losses by name, of which the first is trained on.
    """
    optimiser, log = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98)), []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        found = loss_of(step)
        found = found if isinstance(found, Mapping) else {"loss": found}
        optimiser.zero_grad()
        next(iter(found.values())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        log.append({"step": step, **{name: value.item() for name, value in found.items()}})
    return log
