"""Named settings: what is frozen, what is trained on it, for how long, and on which machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import UserError
from ..data import scene_dataset
from ..data.tokenizer import Tokenizer
from ..data.transforms import Transform
from ..device import best_device, compute_dtype
from ..qformer import QFormerConfig
from ..stage1 import Stage1
from ..stage2 import Stage2
from ..weights import official, pretrained
from ..weights.hub import RECIPE_MODELS
from . import experts, texts
from .loop import TrainConfig

FETCHED_DATA, FETCHED_PARTS = Path("data/coco"), Path("data/parts")  # where data/download.py puts things


@dataclass
class Backbones:
    """What a recipe builds on: the frozen image encoder, the frozen language model, and how texts become ids."""

    encoder: nn.Module
    transform: Transform
    tokenizer: Tokenizer
    lm: nn.Module
    lm_tokenizer: Tokenizer
    qformer: QFormerConfig
    bert: Path | None = None

    @property
    def class_token(self) -> bool:
        """Whether the encoder's first visual token stands for the whole image."""
        return self.encoder.config.class_token


@dataclass(frozen=True)
class Recipe:
    """Everything that is chosen before training. `prompt` stands before each caption that the language model reads.

    `crops` also trains on so many random crops of each image, `keep_tokens` is how many visual tokens of an image
    training sees at a time, `max_length` counts the ids of a text, `match_weight` is how much matching counts when
    candidates are ranked again (None: as in LAVIS). `qformer` holds what differs from the sizes that the parts dictate.
    `models` names the hub models it builds on, `images` is how many it is meant for. `device` is where it computes
    unless told otherwise; None: see `best_device`. `loss_weights` are those of ITC, ITM and ITG in stage 1; the paper's
    are equal. Stage 2 starts from stage 1's matrices times `warm_start`, the rest of them is a fresh start's; the
    paper's starts from all of them.
    """

    name: str
    build: Callable[..., Backbones]
    stage1: TrainConfig
    stage2: TrainConfig
    qformer: dict[str, Any]
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    warm_start: float = 1.0
    embed_dim: int = 256
    prompt: str = ""
    question: str = "Question: {} Answer:"
    max_length: int = 32
    crops: int = 0
    keep_tokens: int | None = None
    beams: int = 5
    match_weight: float | None = None
    experts: dict[str, TrainConfig] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    images: int = 0
    device: str | None = None

    @property
    def views(self) -> list[dict[str, Any]]:
        """What is trained on, as changes to the transform: every picture, and its random crops."""
        return [{}, *({"crop": i} for i in range(self.crops))]

    def with_seed(self, seed: int) -> Recipe:
        """The same with each of its training runs under another seed."""
        experts = {name: replace(config, seed=seed) for name, config in self.experts.items()}
        return replace(self, experts=experts, stage1=replace(self.stage1, seed=seed),
                       stage2=replace(self.stage2, seed=seed))

    def new_stage1(self, backbones: Backbones, kind: type[Stage1] = Stage1) -> Stage1:
        """A fresh stage 1 of this kind on these parts, from BERT where there is one."""
        torch.manual_seed(self.stage1.seed)
        stage1 = kind(backbones.qformer, self.embed_dim)
        if backbones.bert is not None:
            official.init_from_bert(stage1.qformer, backbones.bert)
        return stage1

    def new_stage2(self, backbones: Backbones, stage1: Stage1) -> Stage2:
        """A fresh stage 2 that starts from what stage 1 has learned, or from part of it (arXiv 1910.08475)."""
        torch.manual_seed(self.stage2.seed)
        stage2 = Stage2.from_stage1(stage1, backbones.lm, len(backbones.lm_tokenizer))
        if self.warm_start < 1:
            shrink_and_perturb(stage2.qformer, self.warm_start, backbones.qformer.init_std)
        return stage2


@torch.no_grad()
def shrink_and_perturb(model: nn.Module, share: float, init_std: float) -> None:
    """Let each matrix keep this share of its values, and add what is missing of a fresh one's (arXiv 1910.08475)."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(share).add_((1 - share) * init_std * torch.randn_like(parameter))


def find_parts(recipe: Recipe, parts: Path | None) -> Path | None:
    """Where a recipe's frozen models lie; None for one that makes its own. Raises UserError without a folder."""
    if not recipe.models:
        if parts is not None:
            raise UserError(f"the recipe {recipe.name} trains its frozen models itself: leave --parts out")
        return None
    if parts is None and not FETCHED_PARTS.is_dir():
        raise UserError(f"the recipe {recipe.name} needs pretrained models: name their folder with --parts, or fetch "
                        f"them with `python data/download.py weights {recipe.name}`")
    return parts or FETCHED_PARTS


def find_part(recipe: Recipe, parts: Path, role: str) -> Path:
    """The hub folder of one of a recipe's frozen models. Raises UserError where there is none."""
    folder = parts / recipe.models[role]
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: put the model's hub folder there, name another with --parts, or "
                        f"fetch it with `python data/download.py weights {recipe.name}`")
    return folder


def transform_for(folder: Path, image_size: int) -> Transform:
    """How an encoder's images are prepared: as its folder says; but where CLIP would cut sides off, BLIP-2 squeezes."""
    is_clip = pretrained.read_config(folder)["model_type"] in ("clip", "clip_vision_model")
    return Transform(size=image_size) if is_clip else Transform.from_folder(folder)


def build_scenes(recipe: Recipe, data: Path, parts: Path | None, out: Path, resume: bool = True) -> Backbones:
    """Train the two small experts on the drawn scenes, or, to `resume`, load those that were trained before."""
    vit = experts.train_vit(out / "vit", recipe.experts["vit"], resume)
    lm, lm_tokenizer = experts.train_lm(out / "lm", recipe.experts["lm"], resume)
    tokenizer = texts.text_tokenizer()
    config = QFormerConfig(image_width=vit.width, vocab_size=len(tokenizer), **recipe.qformer)
    return Backbones(vit, experts.TRANSFORM, tokenizer, lm, lm_tokenizer, config)


def build_pretrained(recipe: Recipe, data: Path, parts: Path | None, out: Path, resume: bool = True) -> Backbones:
    """Load three pretrained models from hub folders below `parts`."""
    parts = find_parts(recipe, parts)
    vit, bert, lm = (find_part(recipe, parts, role) for role in ("encoder", "bert", "lm"))
    encoder = pretrained.load_vit(vit)
    transform = transform_for(vit, encoder.config.image_size)
    words = Tokenizer.from_folder(bert)
    config = official.bert_sizes(bert, pretrained.read_config(bert), words.dec_id, image_width=encoder.width,
                                 **recipe.qformer)
    # The language model is never trained: where the device computes in bfloat16, its weights may be kept so as well.
    return Backbones(encoder, transform, words, pretrained.load_lm(lm, compute_dtype(best_device(recipe.device))),
                     Tokenizer.from_folder(lm), config, bert)


SCENES = Recipe(
    name="scenes", build=build_scenes,
    experts={"vit": TrainConfig(steps=1200, learning_rate=2e-3, grad_clip=5.0),
             "lm": TrainConfig(steps=3000, learning_rate=2e-3, hold=2250, weight_decay=0.01)},
    qformer=dict(width=96, layers=4, heads=4, mlp_width=384, num_queries=16, max_positions=32, dropout=0.0,
                 init_std=0.06),  # 0.02 suits the width 768; the same spread of activations asks for more here
    loss_weights=(0.3, 0.3, 1.0),  # contrast is easy here, and what it does not need it unlearns
    stage1=TrainConfig(steps=4500, learning_rate=2e-3, warmup=60),  # after 1,500 ITM cannot tell swapped colours
    stage2=TrainConfig(steps=4000, learning_rate=1e-3, warmup=40),
    warm_start=0.5,  # what has been trained long learns less of what comes next: lesson 14, section 2
    embed_dim=64, max_length=32, beams=1, device="cpu",  # too small for a GPU to be faster
)

LAPTOP = Recipe(
    name="laptop", build=build_pretrained, models=RECIPE_MODELS["laptop"], images=5500,
    # Each caption is read less than four times in either stage, each time beside other visual tokens (`keep_tokens`),
    # so nothing is mirrored or dropped out. Eight queries make a step of either stage a quarter cheaper than sixteen.
    # After 500 steps of stage 1 ITM has not left its plateau.
    qformer=dict(num_queries=8, dropout=0.0),
    stage1=TrainConfig(steps=1500, batch_size=64, learning_rate=4e-4, warmup=40, checkpoint_every=50),
    # At the projection's rate the Q-Former forgets what it read before the language model has learned to listen.
    # Run 5 of bonus 15_one_step began from half of stage 1, with all photographs and 6,000 steps: no better captions.
    stage2=TrainConfig(steps=4500, batch_size=16, learning_rate=1e-4, new_params="projection", lr_scale=20, warmup=40,
                       checkpoint_every=50),
    # After the start token this is how SmolLM2's chat template opens an answer. Before any training it makes captions
    # likelier than no prompt does, 69 nats each and not 81; "a photo of", with 64, has not been trained with.
    prompt="assistant\n",
    question="user\n{}<|im_end|>\n<|im_start|>assistant\n",  # the whole turn; asked "Question: ...", it does not answer
    keep_tokens=129, beams=3,
    match_weight=0.75,  # chosen on photographs that were held out of training: benchmarks/results/ranking.json
)

# The paper's rate and warm-up (§3.4), for ten passes of stage 1 and five of stage 2 over as many pictures as it takes
# hours, not days, to train on.
GPU = Recipe(
    name="gpu", build=build_pretrained, models=RECIPE_MODELS["gpu"], images=10_000,
    qformer=dict(num_queries=32),
    stage1=TrainConfig(steps=8000, batch_size=64, learning_rate=1e-4, warmup=400),
    stage2=TrainConfig(steps=8000, batch_size=32, learning_rate=1e-4, warmup=400),
    crops=2, beams=5,
)

RECIPES = {recipe.name: recipe for recipe in (SCENES, LAPTOP, GPU)}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError listing the names there are."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def default_data(recipe: Recipe, out: Path, data: Path | None) -> Path:
    """The folder in COCO layout to train on; drawn scenes are written beside the run when none is named."""
    if data is None and recipe.name == "scenes":
        data = out.parent / "scenes-data"
        scene_dataset.write_scenes(data)
    if data is None and not (data := FETCHED_DATA).is_dir():
        raise UserError(f"the recipe {recipe.name} needs pictures: name a folder in COCO layout with --data, or fetch "
                        f"one with `python data/download.py coco --images {recipe.images}`")
    return data
