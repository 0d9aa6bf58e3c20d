"""Scenes in patches, and the questions about them that have one answer."""

import random

import pytest
import torch

from minblip2.course import places, viz
from minblip2.data import scenes


def test_patches_lie_where_their_pixels_lie():
    centres = places.patch_centres(8)
    assert centres[0].tolist() == [4, 4] and centres[1].tolist() == [12, 4] and centres[8].tolist() == [4, 12]
    box = torch.tensor([[0, 0, 8, 8], [7, 0, 2, 8], [56, 56, 8, 8]])
    assert [row.nonzero()[:, 0].tolist() for row in places.patches_on(box, 8)] == [[0], [0, 1], [63]]


def test_a_thing_is_found_by_its_colour():
    picture, scene = scenes.draw(random.Random(22))
    thing = next(thing for thing in scene.things if thing.colour == "green")
    x, y, width, height = thing.box
    assert places.thing_of(scene, "green") == thing
    assert places.middle_of(scene, "green").tolist() == [x + width / 2, y + height / 2]
    with pytest.raises(ValueError, match="nothing here is pink: its things are "):
        places.thing_of(scene, "pink")
    assert places.as_tensor(picture).shape == (64, 64, 3) and places.as_tensor(picture).max() <= 1


def test_weight_on_a_thing_is_that_of_its_patches():
    _, scene = scenes.draw(random.Random(22))
    even = torch.full((8, 8), 1 / 64)
    touched = places.patches_on(torch.tensor([places.thing_of(scene, "red").box]), 8).sum().item()
    assert places.weight_on(even, scene, "red") == pytest.approx(touched / 64)


def test_each_question_has_one_answer():
    asked = places.colour_questions(40, 8)
    again = places.colour_questions(40, 8)
    assert asked.patches.shape == (40, 64, 8 * 8 * 3 + 2) and torch.equal(asked.patches, again.patches)
    colours = list(scenes.COLOURS)
    for row, colour, middle in zip(asked.scene.tolist(), asked.colour.tolist(), asked.middle, strict=True):
        _, scene = asked.drawn[row]
        assert sum(thing.colour == colours[colour] for thing in scene.things) == 1
        assert torch.equal(places.middle_of(scene, colours[colour]), middle)
    shows = asked.shows()
    assert shows.sum().item() == sum(len({thing.colour for thing in scene.things}) for _, scene in asked.drawn)


def test_the_alt_text_of_maps_says_where_each_is_largest(monkeypatch):
    shown = []
    monkeypatch.setattr(viz, "show", lambda figure, alt: shown.append(alt))
    picture, scene = scenes.draw(random.Random(22))
    on_green = places.patches_on(torch.tensor([places.thing_of(scene, "green").box]), 8)[0].float().reshape(8, 8)
    corner = torch.zeros(8, 8)
    corner[7, 0] = 1
    places.show_maps(picture, scene, {"a": on_green, "b": corner})
    assert "a: its maximum lies on a green square; b: its maximum lies on no thing." in shown[0]
