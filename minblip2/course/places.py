"""Where is the red thing? Scenes in patches, and questions about the places of their colours (lesson 01)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..data import scene_captions, scenes
from . import figures, viz


def as_tensor(picture: Image.Image) -> Tensor:
    """The picture's pixels between 0 and 1: (height, width, c)."""
    return torch.from_numpy(np.array(picture)).float() / 255


def patch_centres(grid: int) -> Tensor:
    """The middle of each patch of a scene cut into grid x grid, in pixels across and down: (v 2)."""
    middle = (torch.arange(grid) + 0.5) * scenes.SIDE / grid
    across, down = torch.meshgrid(middle, middle, indexing="xy")
    return torch.stack([across.flatten(), down.flatten()], dim=1)


def patches_on(boxes: Tensor, grid: int) -> Tensor:
    """Which patches of a scene cut into grid x grid a box touches. boxes (n 4) in pixels: (n v), boolean."""
    centres, reach = patch_centres(grid), scenes.SIDE / grid / 2
    start, end = boxes[:, None, :2], boxes[:, None, :2] + boxes[:, None, 2:]
    return ((centres > start - reach) & (centres < end + reach)).all(dim=2)


def thing_of(scene: scenes.Scene, colour: str) -> scenes.Thing:
    """The first thing of this colour. Raises ValueError if the scene has none."""
    for thing in scene.things:
        if thing.colour == colour:
            return thing
    raise ValueError(f"nothing here is {colour}: its things are {', '.join(thing.colour for thing in scene.things)}")


def middle_of(scene: scenes.Scene, colour: str) -> Tensor:
    """The middle of the box of the thing of this colour, in pixels across and down: (2)."""
    x, y, width, height = thing_of(scene, colour).box
    return torch.tensor([x + width / 2, y + height / 2])


def weight_on(values: Tensor, scene: scenes.Scene, colour: str) -> float:
    """How much of a map (gh gw) rests on patches that the thing of this colour touches."""
    touched = patches_on(torch.tensor([thing_of(scene, colour).box]), len(values))[0]
    return values.flatten()[touched].sum().item()


def show_maps(picture: Image.Image, scene: scenes.Scene, maps: Mapping[str, Tensor]) -> None:
    """Display attention maps (gh gw) over a scene, whose alt text says on which thing each has its maximum."""
    names = [scene_captions.phrase(thing.colour, thing.shape) for thing in scene.things]
    where = []
    for label, values in maps.items():
        boxes = torch.tensor([thing.box for thing in scene.things])
        touched = patches_on(boxes, len(values))[:, values.argmax()].tolist()
        place = next((name for name, touches in zip(names, touched, strict=True) if touches), "no thing")
        where.append(f"{label}: its maximum lies on {place}")
    figure = figures.attention_maps(picture, maps, [thing.box for thing in scene.things])
    for panel in figure.axes[1:]:  # each map has a scale of its own: so each has its bar
        drawn = panel.images[-1]
        bar = figure.colorbar(drawn, ax=panel, location="bottom", shrink=0.9, aspect=16, pad=0.03,
                              ticks=[0, drawn.get_clim()[1]], format=lambda weight, _: f"{weight:.2g}")
        bar.ax.tick_params(length=2, labelsize=9)
    viz.show(figure, f"A scene with {', '.join(names)}, and attention maps over it. {'; '.join(where)}.")


class Questions(NamedTuple):
    """Scenes, and every question "where is the thing of this colour?" about them that has one answer."""

    drawn: list[tuple[Image.Image, scenes.Scene]]
    patches: Tensor  # (b v e): the pixels of each patch, and its place
    scene: Tensor  # (n) which scene a question is about
    colour: Tensor  # (n) which of the `scenes.COLOURS` it asks for
    box: Tensor  # (n 4) of the thing: x, y, width, height in pixels

    @property
    def middle(self) -> Tensor:
        """The middle of each thing asked for, in pixels across and down: (n 2)."""
        return self.box[:, :2] + self.box[:, 2:] / 2

    def shows(self) -> Tensor:
        """Which colours each scene shows: (b, colours), boolean."""
        colours = list(scenes.COLOURS)
        rows = [[colour in {thing.colour for thing in scene.things} for colour in colours] for _, scene in self.drawn]
        return torch.tensor(rows)

    def touched(self, grid: int) -> Tensor:
        """Which patches of each scene cut into grid x grid any of its things touches: (b v), boolean."""
        return torch.stack([patches_on(torch.tensor([thing.box for thing in scene.things]), grid).any(dim=0)
                            for _, scene in self.drawn])


def colour_questions(count: int, grid: int) -> Questions:
    """Draw `count` scenes, always the same ones, cut into grid x grid, and ask what has one answer about them."""
    drawn = [scenes.draw(random.Random(f"lesson {index}")) for index in range(count)]
    colours = list(scenes.COLOURS)
    asked = [(row, colours.index(thing.colour), thing.box) for row, (_, scene) in enumerate(drawn)
             for thing in scene.things if sum(other.colour == thing.colour for other in scene.things) == 1]
    row, colour, box = (torch.tensor(part) for part in zip(*asked, strict=True))
    images = torch.stack([as_tensor(picture) for picture, _ in drawn])
    pixels = rearrange(images, "b (gh p1) (gw p2) c -> b (gh gw) (p1 p2 c)", gh=grid, gw=grid)
    place = patch_centres(grid).expand(count, -1, -1) / scenes.SIDE
    return Questions(drawn, torch.cat([pixels, place], dim=2) - 0.5, row, colour, box)
