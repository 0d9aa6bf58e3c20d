"""How training the scenes begins: each part of a small copy of the recipe, on few scenes, in seconds.

Two states of the code under which this is the same train the same bridge, unless they differ in what only a long run
would show; that is why a weekly job trains one from nothing. How a bridge is measured is another matter: a test
measures the one that ships (tests/test_shipping.py).
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minblip2.data.scene_dataset import write_scenes
from minblip2.device import computing
from minblip2.training.bridge import train_bridge
from minblip2.training.loop import TrainConfig, read_log
from minblip2.training.recipes import SCENES
from minblip2.training.shipping import PARTS

STEPS, SCENES_DRAWN = 12, 400
LOGGED = "lr", "loss", "itc", "itm", "itg", "temperature", "gradient"
# As a fraction: machines round differently, and each step builds on the rounding of those before.
CLOSE, CLOSE_GRADIENT = 0.02, 0.1


def short(config: TrainConfig) -> TrainConfig:
    """The same in a dozen steps that go through every phase of the learning rate; in float32, which machines share."""
    return replace(config, steps=STEPS, warmup=2, hold=4 if config.hold else 0, precision="float32")


def beginning() -> dict[str, Any]:
    """The recipe's settings, and what each part logs in its steps: a name, and a value for each step."""
    recipe = replace(SCENES, experts={name: short(config) for name, config in SCENES.experts.items()},
                     stage1=short(SCENES.stage1), stage2=short(SCENES.stage2))
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        write_scenes(data, SCENES_DRAWN, 1, 1, progress=False)
        with computing(dtype="float32"):
            train_bridge(recipe, data, None, out)
        logs = {part: read_log(out / part / "log.jsonl") for part in PARTS}
    return {"recipe": repr(sorted((asdict(SCENES) | {"build": None}).items())),
            "logs": {part: {name: [float(f"{step[name]:.5g}") for step in log] for name in LOGGED if name in log[0]}
                     for part, log in logs.items()}}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two beginnings differ by more than rounding: "recipe", or a part and what it logs."""
    found = [] if one["recipe"] == other["recipe"] else ["recipe"]
    for part in PARTS:
        logs = one["logs"][part], other["logs"][part]
        for name in sorted({*logs[0], *logs[1]}):
            values, close = [log.get(name, []) for log in logs], CLOSE_GRADIENT if name == "gradient" else CLOSE
            if len(values[0]) != len(values[1]) or not all(math.isclose(*pair, rel_tol=close)
                                                           for pair in zip(*values, strict=True)):
                found.append(f"{part}: {name}")
    return found
