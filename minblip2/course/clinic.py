"""The ward of the bug clinic (bonus to lesson 13): five patients, each trained with one bug, and their healthy twins.

Do not read on before you have made your five diagnoses: the bugs stand at the end of this file.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import masks
from ..data.batches import PairBatches
from ..data.coco import CocoCaptions
from ..data.scene_dataset import load_scenes
from ..stage1 import Stage1
from ..stage2 import Stage2
from ..training.bridge import Bridge
from ..training.loop import TrainConfig, learning_rate, parameter_groups
from ..training.stages import prompt_and_target
from . import figures

SUSPECTS = ["words may look at [PAD] in the text pass of ITC", "ITC multiplies similarities by the temperature",
            "the queries all start out identical", "ITG's labels are not shifted by one",
            "ITG's words may look at later words", "a caption may be drawn as the “wrong” caption of its own picture",
            "ITM draws its negatives uniformly instead of hard ones",
            "stage 2: pictures are shuffled against the captions",
            "stage 1: pictures are shuffled against the captions",
            "stage 2: the language model is left in training mode",
            "stage 2: the queries' output is detached before the projection",
            "maps are laid out with rows and columns swapped"]
BATCH = 16  # pairs, of patients A to C
VERDICTS = {"A": "977f186f", "B": "79e88e6c", "C": "0ab5fed9", "D": "d839c63c", "E": "896d0f11"}
Log = list[dict[str, float]]


def diagnose(patient: str, number: int | None) -> str:
    """Whether suspect `number` is what ails the patient, in words; None: not answered yet."""
    found = hashlib.sha256(f"minBLIP-2 {patient} {number}".encode()).hexdigest()[:8]
    verdict = "right" if found == VERDICTS[patient] else "no. Which of the symptoms would that bug not explain?"
    return f"{patient}: {'not answered yet' if number is None else verdict}"


def fit(model: nn.Module, losses: Callable, batch: Callable, config: TrainConfig) -> Log:
    """Train in memory: the loss by name for each step; losses(model, batch(step)) as in `train`."""
    groups, log = parameter_groups(model.train(), config), []
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
    torch.manual_seed(config.seed)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, config) * group["lr_scale"]
        parts = losses(model, batch(step))
        optimiser.zero_grad()
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimiser.step()
        log.append({"step": step + 1} | {name: value.item() for name, value in parts.items()})
    model.eval()
    return log


def healthy(given):
    """No bug: what it is given stays as it is."""
    return given


@dataclass
class Ward:
    """Where patients are trained, all by the same code: `patient("A")` and `twin("A")` give a model and its log.

    A, B and C are small Q-Formers in stage 1, on pictures with one thing; D is the finished stage 1, trained on with
    small batches; E is a fresh stage 2 on the finished stage 1. A, B and C share a twin.
    """

    bridge: Bridge
    data: Path
    run: Path

    def __post_init__(self):
        self.train, scenes = CocoCaptions(self.data, "train"), load_scenes(self.data, "train")
        self.features = self.bridge.features(self.train, self.run / "cache")
        self.simple = [(row, text) for row, text in self.train.pairs
                       if text.startswith("a picture of") and len(scenes[row].things) == 1]

    def patient(self, name: str) -> tuple[nn.Module, Log]:
        """Train a patient, bug and all."""
        return self._train(name, BUGS[name])

    def twin(self, name: str) -> tuple[nn.Module, Log]:
        """Train its healthy twin: the same seed, batches and steps, without the bug."""
        return self._train(name, healthy)

    def _train(self, name: str, bug: Callable) -> tuple[nn.Module, Log]:
        return {"D": self._trained_on, "E": self._fresh_stage2}.get(name, self._small_stage1)(bug)

    def _pairs(self, pairs: list[tuple[int, str]], image_ids: list[int], batch_size: int, tokenizer) -> PairBatches:
        return PairBatches([self.features], [row for row, _ in pairs], [tokenizer.encode(text) for _, text in pairs],
                           image_ids, batch_size, 0, tokenizer.pad_id)

    def _small_stage1(self, bug: Callable) -> tuple[Stage1, Log]:
        wordings, same_words = sorted({text for _, text in self.simple}), [0] * len(self.train.images)
        for row, text in self.simple:  # pictures that the same words describe count as the same
            same_words[row] = wordings.index(text)
        batches = self._pairs(self.simple, same_words, BATCH, self.bridge.backbones.tokenizer)
        torch.manual_seed(0)
        model = Stage1(replace(self.bridge.stage1.qformer.config, width=48, layers=2, mlp_width=192, num_queries=8,
                               cross_attention_every=1, init_std=0.08), 32)
        bug(model)
        return model, fit(model, _stage1_parts, batches.batch, TrainConfig(steps=90, learning_rate=4e-3, warmup=20))

    def _trained_on(self, bug: Callable) -> tuple[Stage1, Log]:
        ids = [entry.id for entry in self.train.images]
        batches = self._pairs(self.train.pairs, ids, 8, self.bridge.backbones.tokenizer)
        model = copy.deepcopy(self.bridge.stage1)
        bug(model)
        return model, fit(model, _stage1_parts, batches.batch, TrainConfig(steps=36, learning_rate=1e-3, warmup=5))

    def _fresh_stage2(self, bug: Callable) -> tuple[Stage2, Log]:
        told = [(row, text) for row, text in self.train.pairs if text.startswith("a picture of")]
        words = self.bridge.backbones.lm_tokenizer
        batches = self._pairs(told, [entry.id for entry in self.train.images], 16, words)
        torch.manual_seed(0)
        model = Stage2.from_stage1(self.bridge.stage1, self.bridge.backbones.lm, len(words))
        model.match_embedding_scale(torch.from_numpy(np.array(self.features[:64], dtype=np.float32)))
        config = TrainConfig(steps=80, learning_rate=1e-3, warmup=20, new_params="projection", lr_scale=10)

        def loss(model, batch):
            return {"loss": model(bug(batch.image_features), *prompt_and_target(batch, words, "")).loss}
        return model, fit(model, loss, batches.batch, config)


def _stage1_parts(model, batch) -> dict[str, Tensor]:
    out = model(batch.image_features, batch.text_ids, batch.text_mask, batch.image_ids)
    return dict(loss=out.loss, itc=out.itc, itm=out.itm, itg=out.itg, temperature=model.temperature)


def stage1_curves(name: str, log: Log, twin_log: Log, floor: float, keys: tuple[str, ...] = ("itc", "itg")) -> Figure:
    """A patient of A to C beside its twin; dashed: ITC where nothing is known, and the floor of ITG."""
    return figures.curves({name: log, "twin": twin_log}, keys, 10, {"itc": math.log(BATCH), "itg": floor},
                          {"itc": f"ln {BATCH} =", "itg": "floor"})


def cosine_maps(values: dict[str, Tensor]) -> Figure:
    """Cosines of pictures (rows) and captions (columns), one panel for each model, all on the scale from -1 to 1."""
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    for panel, (name, cosines) in zip(figure.subplots(1, len(values)), values.items(), strict=True):
        drawing = panel.imshow(cosines, cmap="viridis", vmin=-1, vmax=1)
        panel.set(title=name, xlabel="caption", ylabel="picture", xticks=[], yticks=[])
    figure.colorbar(drawing, ax=figure.axes, label="cosine", shrink=0.8)
    return figure


# The five bugs. Do not read on before you have answered.


def _bug_a(model):
    model.similarity = lambda image, text: Stage1.similarity(image, text) * model.temperature ** 2  # c · T² / T = c · T


def _bug_b(model):
    def itg_loss(text_ids, text_mask, cache):
        num_queries = model.qformer.config.num_queries
        mask = masks.multimodal_causal(num_queries, text_mask)[:, :, num_queries:]
        begun = torch.cat([torch.full_like(text_ids[:, :1], model.qformer.dec_id), text_ids[:, 1:]], dim=1)
        states = model.qformer(text_ids=begun, mask=mask, cache=cache).text
        logits = model.qformer.lm_logits(states[text_mask])
        return F.cross_entropy(logits, text_ids[text_mask], label_smoothing=model.label_smoothing), logits
    model.itg_loss = itg_loss


def _bug_c(model):
    queries = model.qformer.query_tokens.data
    queries.copy_(queries[:, :1].expand_as(queries).clone())


def _bug_d(model):
    model.sample_negatives = lambda itc_logits, same_image: tuple(
        torch.multinomial(logits.detach().softmax(dim=1), 1)[:, 0] for logits in (itc_logits.T, itc_logits))


def _bug_e(image):
    return image.roll(1, dims=0)


BUGS = {"A": _bug_a, "B": _bug_b, "C": _bug_c, "D": _bug_d, "E": _bug_e}
