"""What a recipe will take, before anything is loaded: parameters, memory, disk, steps, and what must be fetched."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .. import UserError
from ..data.coco import CocoCaptions
from ..data.files import read_json
from ..data.scene_dataset import write_scenes
from ..data.transforms import Transform
from ..device import best_device, compute_dtype
from ..qformer import QFormerConfig
from ..stage1 import Stage1
from ..weights import official, pretrained
from ..weights.checkpoint import HubConfig, shards
from ..weights.hub import MODELS
from .checks import (
    check_batches,
    check_folder,
    check_part,
    check_precision,
    check_same_data,
    check_settings,
    check_split,
    why_broken,
)
from .loop import TrainConfig
from .recipes import FETCHED_DATA, FETCHED_PARTS, SCENES, Recipe, find_parts
from .shipping import SHIPPED

CAPTION = 15  # tokens of an average COCO caption, with its start and end
CAPTIONS = 5  # of each picture
SAVED = 34  # bytes that a layer keeps for its gradient per token and channel, two for a number (arXiv 2205.05198 §4)
LOGIT = 3 * 4  # bytes: a logit, its logarithm of a probability and its gradient, in float32


def sizes_of_scenes() -> tuple[nn.Module, nn.Module, QFormerConfig]:
    """The small experts of the scenes, as they ship, and the sizes of the Q-Former between them."""
    backbones = SCENES.build(SCENES, None, None, SHIPPED)
    return backbones.encoder, backbones.lm, backbones.qformer


def settings_of(name: str, parts: Path) -> HubConfig:
    """A model's config.json if it was fetched, else what is known of the pinned model."""
    path = parts / name / "config.json"
    return HubConfig(read_json(path) if path.exists() else MODELS[name].config)


def parameters(model: nn.Module) -> int:
    """How many numbers a model holds; those that two of its parts share count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_parameters(config: QFormerConfig, embed_dim: int, lm_width: int) -> tuple[int, int]:
    """Of stage 1 and of stage 2: the bridge itself is built, but without memory."""
    with torch.device("meta"):
        stage1 = Stage1(config, embed_dim)
        branch = stage1.qformer.query_branch()
    return parameters(stage1), parameters(branch) + parameters(stage1.vision_norm) + (config.width + 1) * lm_width


def activations(tokens: int, layers: int, width: int, value: int) -> float:
    """Bytes that a transformer keeps for its gradient, when a number takes `value` bytes."""
    return SAVED / 2 * value * tokens * layers * width


def kept_by_stage1(batch: int, config: QFormerConfig, visual: int, value: int) -> float:
    """Bytes that a stage-1 step on `batch` pairs with `visual` tokens keeps for its gradient; see `activations`."""
    queries, cross = config.num_queries, -(-config.layers // config.cross_attention_every)
    each = 2 * queries + 5 * CAPTION + 3 * (queries + CAPTION)  # queries for ITC, text for ITC and ITG, three ITM pairs
    return (activations(batch * each, config.layers, config.width, value) + 4 * value * batch * visual
            * (config.image_width + cross * config.width) + LOGIT * batch * CAPTION * config.vocab_size)


def kept_by_stage2(batch: int, config: QFormerConfig, lm: nn.Module, visual: int, value: int) -> float:
    """Bytes that a stage-2 step on `batch` pairs keeps, most of them for the gradient through the language model."""
    queries, cross = config.num_queries, -(-config.layers // config.cross_attention_every)
    return (activations(batch * (queries + CAPTION), lm.config.layers, lm.width, value)
            + activations(batch * queries, config.layers, config.width, value)
            + 4 * value * batch * visual * cross * config.width + LOGIT * batch * CAPTION * lm.config.vocab_size)


@dataclass(frozen=True)
class StageCost:
    """What training a stage takes, in bytes: `fixed`, whatever the batch, and `each` for every pair in it.

    Fixed are weights, gradients and Adam's two moments of the `trained` parameters in float32, and the frozen models.
    """

    trained: int
    fixed: float
    each: float

    def memory(self, batch_size: int) -> float:
        """Bytes that batches of this size take."""
        return self.fixed + batch_size * self.each

    def largest_batch(self, memory: float) -> int:
        """How many pairs fit into so many bytes; 0 where not even the weights do."""
        return max(0, int((memory - self.fixed) / self.each))


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes: parameters of the frozen models, both stages, and one view of one picture in the cache."""

    encoder: int
    lm: int
    stage1: StageCost
    stage2: StageCost
    tokens: int
    width: int

    @property
    def cached(self) -> int:
        """Bytes on disk of one picture's features in float16."""
        return 2 * self.tokens * self.width


def outlines(recipe: Recipe, parts: Path, lm_dtype: torch.dtype = torch.float32
             ) -> tuple[nn.Module, nn.Module, QFormerConfig]:
    """A recipe's image encoder and language model, at their true sizes but without memory, and its Q-Former's sizes."""
    if not recipe.models:
        return sizes_of_scenes()
    config = {role: settings_of(name, parts) for role, name in recipe.models.items()}
    vit, _ = pretrained.empty_encoder(recipe.models["encoder"], config["encoder"], torch.float32)
    lm, _ = pretrained.empty_lm(recipe.models["lm"], config["lm"], False, lm_dtype)
    return vit, lm, official.bert_sizes(recipe.models["bert"], config["bert"], image_width=vit.width, **recipe.qformer)


def estimate(recipe: Recipe, parts: Path | None = None, value: int = 4) -> Estimate:
    """The costs of a recipe on pretrained models when a number is computed with in `value` bytes.

    No pretrained model is loaded: those that are not among `parts` have their known sizes. Memory is an estimate from
    what the layers keep, and the logits.
    """
    vit, lm, config = outlines(recipe, parts or FETCHED_PARTS)
    first, second = trained_parameters(config, recipe.embed_dim, lm.width)
    size = Transform().size if recipe.models else vit.config.image_size
    tokens = (size // vit.config.patch_size) ** 2 + vit.config.class_token
    kept, seen = 4 * parameters(vit) + value * parameters(lm), recipe.keep_tokens or tokens
    saved1, saved2 = kept_by_stage1(1, config, seen, value), kept_by_stage2(1, config, lm, seen, value)
    return Estimate(parameters(vit), parameters(lm), StageCost(first, 16 * first + kept, saved1),
                    StageCost(second, 16 * second + kept, saved2), tokens, vit.width)


def free_memory(device: torch.device) -> float | None:
    """Bytes that are free on a device, of a CPU in the machine; None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        record = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return 1024.0 * int(record["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def dry_run(recipe: Recipe, data: Path | None = None, parts: Path | None = None, split: str = "val",
            out: Path | None = None, skip_broken: bool = False, resume: bool = True) -> str:
    """A recipe's parts, costs, and what is missing or cannot be used, as text; nothing is written.

    Memory is an estimate: see `estimate`. Of a picture no more than the header is read here; to `skip_broken`, those
    that have none are left out. To `resume`, a run that is in `out` must be this one.
    """
    device = best_device(recipe.device)
    value = compute_dtype(device).itemsize
    given, data, parts, missing, absent = parts, data or usual_data(recipe, out), parts or FETCHED_PARTS, [], []
    wrong = list(_troubles(recipe, given, parts, out, resume))
    try:
        costs = estimate(recipe, parts, value)
    except UserError:  # which is among the troubles already
        costs = estimate(recipe, parts / "nowhere", value)
    try:
        train = CocoCaptions(data, "train")
        if skip_broken:
            train = _with_headers(train, True)
        images, pairs, of = len(train), len(train.pairs), f"in {data}"
        wrong += _troubles_of_data(recipe, data, train, split, skip_broken, out if resume else None)
    except UserError as error:
        images, of = recipe.images or inspect.signature(write_scenes).parameters["train"].default, "to be fetched"
        pairs = CAPTIONS * images
        if not recipe.models and data == usual_data(recipe, out):
            of = "to be drawn"
        elif recipe.models and not data.exists():
            missing = [f"missing: pictures in {data}: python data/download.py coco --images {recipe.images} --out "
                       f"{data}"]
        else:
            of = "that it is meant for"
            wrong.append(str(error))

    def row(what: str, role: str, count: int, use: str) -> str:
        name = recipe.models.get(role, "")
        there = not name or any((parts / name).glob("*.safetensors")) or any((parts / name).glob("*.bin"))
        if not there:
            absent.append(name)
        return f"  {what:16} {name:24} {count:>15,} {use:8} {'' if there else 'missing'}".rstrip()

    def stage(name: str, settings: TrainConfig, cost: StageCost) -> str:
        passes = settings.steps * settings.grad_accum * settings.batch_size / pairs
        memory = max(0.1, cost.memory(settings.batch_size) / 1e9)
        return (f"  {name:16} {settings.steps:,} steps of {settings.grad_accum * settings.batch_size} pairs, "
                f"{passes:.1f} passes over {pairs:,}; about {memory:.1f} GB of memory")

    views = len(recipe.views)
    experts = {"vit": "image encoder", "lm": "language model"}
    lines = [
        f"recipe {recipe.name}, on {device} in {str(compute_dtype(device)).removeprefix('torch.')}", "",
        row("image encoder", "encoder", costs.encoder, "frozen"),
        row("language model", "lm", costs.lm, "frozen"),
        row("bridge, stage 1", "bert", costs.stage1.trained, "trained"),
        f"  {'bridge, stage 2':16} {'':24} {costs.stage2.trained:>15,} trained", "",
        f"  {'features':16} {views} view{'s' if views > 1 else ''} of {images:,} pictures {of}: {costs.tokens} x "
        f"{costs.width} in float16, {1e-9 * views * images * costs.cached:.1f} GB on disk",
        *(f"  {experts[name]:16} {config.steps:,} steps of {config.batch_size}, before it is frozen"
          for name, config in recipe.experts.items()),
        stage("stage 1", recipe.stage1, costs.stage1), stage("stage 2", recipe.stage2, costs.stage2), ""]
    if absent:
        missing.append(f"missing: models in {parts}: python data/download.py weights {' '.join(absent)} --out {parts}")
    wrong = [f"cannot be used: {said}" for said in wrong]
    return "\n".join([*lines, *wrong, *(missing or ([] if wrong else ["nothing is missing"]))])


def usual_data(recipe: Recipe, out: Path | None) -> Path:
    """Where a recipe looks for its pictures when none are named."""
    return FETCHED_DATA if recipe.models else (out or Path("runs") / recipe.name).parent / "scenes-data"


def _troubles(recipe: Recipe, given: Path | None, parts: Path, out: Path | None, resume: bool) -> Iterator[str]:
    """What is wrong with the folder of the run, the precision and the models that are there."""
    asked = [lambda: check_precision(recipe)]
    if out:
        asked += [lambda: check_folder(out), lambda: resume and check_settings(recipe, out)]
    if not recipe.models:
        asked.append(lambda: find_parts(recipe, given))
    for role, name in recipe.models.items():
        with contextlib.suppress(UserError):  # without weights a model is missing, not wrong
            if shards(parts / name) and (parts / name / "config.json").is_file():
                asked.append(partial(check_part, recipe, parts, role))
    for ask in asked:
        try:
            ask()
        except UserError as error:
            yield str(error)


def _with_headers(data: CocoCaptions, skip_broken: bool) -> CocoCaptions:
    """A split whose pictures all have a header; those that have none are left out to `skip_broken`, else refused."""
    bad = [path for path in data.paths if why_broken(path, decode=False)]
    if bad and not skip_broken:
        raise UserError(f"{len(bad)} pictures of the split {data.split!r} are no pictures, first {bad[0]}: replace "
                        "them, or add --skip-broken to go without")
    return CocoCaptions(data.root, data.split, without=bad) if bad else data


def _troubles_of_data(recipe: Recipe, data: Path, train: CocoCaptions, split: str, skip_broken: bool,
                      out: Path | None) -> Iterator[str]:
    """What is wrong with the splits, the pictures and the batches that they make.

    To `skip_broken`, `train` is without its broken pictures already. A run in `out` must be on the same.
    """
    for ask in (lambda: check_split(recipe, data, split), lambda: _with_headers(CocoCaptions(data, split), skip_broken),
                lambda: skip_broken or _with_headers(train, False), lambda: check_batches(recipe, train),
                lambda: out and check_same_data(data, out)):
        try:
            ask()
        except UserError as error:
            yield str(error)
