"""What lessons 13 and its clinic play and draw: the game at scale, greyed patches, one scale for a wall, the ward."""

import pytest
import torch
from torch import nn

from minblip2.course import clinic, maps, viz
from minblip2.data.scenes import Scene, Thing
from minblip2.training.loop import TrainConfig

TRUTHS = [Scene((Thing("red", "circle", "small", (0, 0, 16, 16)), Thing("blue", "star", "small", (32, 32, 16, 16))),
                "grey"),
          Scene((Thing("pink", "ring", "large", (48, 0, 16, 16)),), "white")]


def test_the_game_is_played_for_all_things_at_once():
    asked = maps.Asked.of(TRUTHS, 4)  # cells of 16 pixels
    assert asked.phrases == ["a red circle", "a blue star", "a pink ring"] and asked.rows.tolist() == [0, 0, 1]
    assert asked.boxes.nonzero()[:, 1].tolist() == [0, 10, 3] and asked.chance == pytest.approx(100 / 16)
    heat = torch.zeros(3, 16)
    heat[0, 0] = heat[1, 0] = heat[2, 3] = 1.0  # the second points at the other thing of its picture
    assert asked.hits(heat).tolist() == [True, False, True] and asked.hits(heat, asked.anything).all()
    assert not asked.hits(torch.ones(3, 16)).any()  # a constant map wins nothing
    assert asked.interval(asked.hits(heat)).startswith("66.7 % (50.0 to 100.0")  # pictures are drawn, not things


def test_rank_correlation_knows_upside_down():
    rising = torch.tensor([[1.0, 5.0, 9.0]])
    assert maps.rank_correlation(rising, rising ** 3).item() == pytest.approx(1)
    assert maps.rank_correlation(rising, -rising).item() == pytest.approx(-1)


def test_only_the_first_tokens_are_greyed_out():
    image, nothing = torch.ones(2, 4, 3), torch.zeros(3)
    cut = maps.grey_out(image, torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]]), 2, nothing)
    assert cut.sum(dim=2).tolist() == [[3, 0, 3, 0], [0, 0, 3, 3]] and image.sum() == 24


def test_what_a_scene_lacks_is_not_in_it():
    assert all(maps.lacking(TRUTHS[0], seed) not in ("a red circle", "a blue star") for seed in range(60))


def test_a_wall_has_one_scale():
    figure = maps.wall(None, [torch.full((2, 2), 1.0), torch.full((2, 2), 5.0)], ["a", "b"])
    limits = [panel.images[0].get_clim() for panel in figure.axes[:2]]
    assert limits == [(0, 5), (0, 5)] and figure.axes[-1].get_ylabel() == "weight"


def test_figures_are_drawn():
    for figure in (maps.flow(), maps.deletion({name: torch.rand(3, 5) for name in "abc"}, (1, 2, 4)),
                   clinic.cosine_maps({"a": torch.eye(3), "b": torch.eye(3)})):
        assert len(viz.png(figure)) > 1000


def test_each_patient_has_one_right_diagnosis():
    right = {patient: [number for number in range(1, len(clinic.SUSPECTS) + 1)
                       if clinic.diagnose(patient, number) == f"{patient}: right"] for patient in clinic.BUGS}
    assert [len(numbers) for numbers in right.values()] == [1] * 5 and len({*map(tuple, right.values())}) == 5
    assert clinic.diagnose("A", None) == "A: not answered yet"


def test_the_ward_trains():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    x, y = torch.randn(32, 2), torch.randn(32, 1)
    log = clinic.fit(model, lambda model, batch: {"loss": (model(x) - y).square().mean()}, lambda step: None,
                     TrainConfig(steps=20, learning_rate=0.05, warmup=1))
    assert [line["step"] for line in log] == list(range(1, 21)) and log[-1]["loss"] < log[0]["loss"]
    assert not model.training
