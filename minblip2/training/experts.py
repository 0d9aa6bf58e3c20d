"""The two frozen experts of the scenes, trained here, blind to each other: a ViT without words, an LM without images.

The ViT learns from boxes alone: each patch tells which thing covers it. The LM learns from `texts` of scenes that were
never drawn, questions and answers among them. A soft prompt can call up only what the model can do with text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import masks
from ..data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, VERSION, Scene, draw_scenes
from ..data.tokenizer import Tokenizer
from ..data.transforms import Transform
from ..lm.opt import OPT, OPTConfig
from ..vit import ViT, ViTConfig
from . import texts
from .binding import LOOK_BACK, LookBack
from .loop import TrainConfig, train
from .texts import SceneTexts, TextBatch, lm_tokenizer

TRANSFORM = Transform(size=64, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
TINY_VIT = ViTConfig(image_size=64, patch_size=8, width=128, layers=2, heads=4, mlp_width=512, class_token=False,
                     layer_scale=False, final_norm=True, stem=(32, 64, 128))
NOTHING = -1  # the label of a patch that no thing covers


def patch_labels(scene: Scene, grid: int, side: int) -> np.ndarray:
    """What covers each patch: colour, shape, size, row, column, background; (gh gw 6), -1 where nothing does."""
    labels = np.full((grid, grid, 6), NOTHING, dtype=np.float32)
    labels[..., 5] = list(BACKGROUNDS).index(scene.background)
    centre = (np.arange(grid) + 0.5) * side / grid
    for thing in scene.things:
        x, y, w, h = thing.box
        rows, columns = (np.flatnonzero((centre >= start) & (centre <= start + length))
                         for start, length in ((y, h), (x, w)))
        # A small thing may lie between patch centres: the patch of its own centre always belongs to it.
        rows = np.union1d(rows, [int((y + h / 2) * grid / side)])
        columns = np.union1d(columns, [int((x + w / 2) * grid / side)])
        kind = (list(COLOURS).index(thing.colour), SHAPES.index(thing.shape), list(SIZES).index(thing.size))
        labels[np.ix_(rows, columns, range(5))] = *kind, *thing.cell
    return labels


@dataclass
class ImageBatch:
    """pixels (b c h w) float32, labels (b gh gw 6)."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> ImageBatch:
        """The same batch on a device."""
        return ImageBatch(self.pixels.to(device), self.labels.to(device))


def draws(count: int, batch_size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Indices (b) of batch `start`, `start` + 1, ...: each epoch a new order, a function of seed and number alone."""
    per_epoch, number = count // batch_size, start
    while True:
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield order[place * batch_size : (place + 1) * batch_size]
        number += 1


class SceneImages:
    """Batches of pictures with the labels of their patches; of these pictures no caption tells.

    Every colour occurs with every shape here, as in any large collection of pictures: a frozen encoder knows the pairs
    that are held out of the captioned pictures. What a bridge makes of such a pair is its own achievement.
    """

    def __init__(self, batch_size: int, seed: int, scenes: int = 6000):
        self.batch_size, self.seed, self.scenes = batch_size, seed, scenes

    def iterate(self, start: int = 0) -> Iterator[ImageBatch]:
        """Batches without end, from number `start` on."""
        drawn = list(draw_scenes(self.scenes, f"{self.seed} picture"))
        images = torch.stack([TRANSFORM(image) for _, image, _ in drawn])
        labels = torch.from_numpy(np.stack([patch_labels(scene, TINY_VIT.grid, SIDE) for _, _, scene in drawn]))
        for rows in draws(len(images), self.batch_size, self.seed, start):
            yield ImageBatch(images[rows], labels[rows])


class PatchReader(nn.Module):
    """The tiny ViT with linear heads that read off each patch what covers it, and where."""

    sizes = dict(colour=len(COLOURS) + 1, shape=len(SHAPES) + 1, size=len(SIZES) + 1, row=4, column=4,
                 background=len(BACKGROUNDS))

    def __init__(self, config: ViTConfig = TINY_VIT):
        super().__init__()
        self.vit = ViT(config)
        self.heads = nn.ModuleDict({name: nn.Linear(config.width, size) for name, size in self.sizes.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Predictions (b gh gw n) by name for images (b c h w)."""
        patches = rearrange(self.vit(pixels), "b (gh gw) e -> b gh gw e", gh=self.vit.config.grid)
        return {name: head(patches) for name, head in self.heads.items()}


def reading_losses(model: PatchReader, batch: ImageBatch) -> dict[str, Tensor]:
    """Cross-entropies of what covers each patch, and where it stands, by name and summed."""
    output = model(batch.pixels)
    covered = (batch.labels[..., 0] != NOTHING).float()
    # Most patches are empty; at full weight they would teach "nothing here" before anything else.
    weight = covered + 0.15 * (1 - covered)
    losses = {}
    for index, (name, classes) in enumerate(model.sizes.items()):
        target = batch.labels[..., index].long() % classes  # nothing (-1) becomes the last class
        each = F.cross_entropy(rearrange(output[name].float(), "b gh gw n -> b n gh gw"), target, reduction="none")
        losses[name] = (each * weight).sum() / weight.sum()
    return {"loss": sum(losses.values()), **losses}


def train_vit(folder: str | Path, config: TrainConfig, resume: bool = True) -> ViT:
    """Train the tiny ViT on pictures and boxes alone, or load it from `folder`; returned frozen."""
    torch.manual_seed(config.seed)
    model = PatchReader()
    batches = SceneImages(config.batch_size, config.seed)
    train(model, reading_losses, batches, config, folder, {"vit": TINY_VIT, "scenes": VERSION},
          name="ViT from boxes", resume=resume)
    return model.vit.requires_grad_(False).eval()


def word_loss(model: OPT, batch: TextBatch) -> dict[str, Tensor]:
    """Mean negative log-likelihood of each word given those before it, weighted where the batch has weights."""
    hidden = model(model.embed(batch.ids), masks.causal(batch.mask), masks.token_positions(batch.mask))
    weights = (batch.mask.float() if batch.weights is None else batch.weights)[:, 1:]
    supervised = weights > 0
    each = F.cross_entropy(model.lm_logits(hidden[:, :-1][supervised]).float(), batch.ids[:, 1:][supervised],
                           reduction="none")
    return {"loss": (each * weights[supervised]).sum() / weights.sum()}


def text_losses(model: LookBack, batch: TextBatch) -> dict[str, Tensor]:
    """The loss of the words, that of the readers of the first block, and their weighted sum."""
    states: list[Tensor] = []
    hook = model.lm.blocks[0].register_forward_hook(lambda block, inputs, output: states.append(output))
    words = word_loss(model.lm, batch)["loss"]
    hook.remove()
    look_back = model(batch.ids, states[0], batch.mask)
    return {"loss": words + 0.3 * look_back, "words": words, "look_back": look_back}


def train_lm(folder: str | Path, config: TrainConfig, resume: bool = True, look_back: int = LOOK_BACK
             ) -> tuple[OPT, Tokenizer]:
    """Train the tiny OPT on text alone, or load it from `folder`; returned frozen."""
    torch.manual_seed(config.seed)
    tokenizer = lm_tokenizer()
    sizes = OPTConfig(vocab_size=len(tokenizer), width=128, layers=4, heads=4, mlp_width=256, max_positions=256)
    model = LookBack(OPT(sizes), look_back)
    batches = SceneTexts(tokenizer, config.batch_size, config.seed, config.steps)
    settings = {"lm": sizes, "texts": texts.VERSION, "look_back": look_back}
    train(model, text_losses, batches, config, folder, settings, name="LM from text", resume=resume)
    return model.lm.requires_grad_(False).eval(), tokenizer
