"""What a run keeps of how it was made, in its run.json, and where its data and frozen models are found again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import UserError
from ..data.files import field, read_json, write_json
from .recipes import FETCHED_PARTS, RECIPES, Recipe, default_data, find_recipe

# what of a recipe may differ from the one of its name (`dataclasses.replace`) and matters to whoever reads the run
CHANGEABLE = ("models", "qformer", "embed_dim", "prompt", "question", "max_length", "beams", "match_weight")


@dataclass(frozen=True)
class RunRecord:
    """A run's recipe as it was trained, its data and frozen models where they are now, or were, and whether broken
    pictures were left out."""

    recipe: Recipe
    data: Path | None
    parts: Path | None
    skip_broken: bool


def with_batch_size(recipe: Recipe, batch_size: int | None) -> Recipe:
    """The recipe with both stages in batches of so many pairs; None leaves it as it is."""
    if batch_size is None:
        return recipe
    return replace(recipe, stage1=replace(recipe.stage1, batch_size=batch_size),
                   stage2=replace(recipe.stage2, batch_size=batch_size))


def write_record(out: Path, recipe: Recipe, data: Path, parts: Path | None, skip_broken: bool = False) -> None:
    """Write run.json. Folders are told from here, too, so that run and data may move together."""
    folders, sizes = {"data": data, "parts": parts}, {recipe.stage1.batch_size, recipe.stage2.batch_size}
    record: dict[str, Any] = dict(recipe=recipe.name, seed=recipe.stage1.seed)
    record |= {name: str(path.resolve()) if path else None for name, path in folders.items()}
    record["from_here"] = {name: there for name, path in folders.items() if path and (there := _from(out, path))}
    usual = find_recipe(recipe.name)
    if len(sizes) == 1 and sizes != {usual.stage1.batch_size, usual.stage2.batch_size}:
        (record["batch_size"],) = sizes
    if changed := {name: value for name in CHANGEABLE if (value := getattr(recipe, name)) != getattr(usual, name)}:
        record["changed"] = changed
    if skip_broken:
        record["skip_broken"] = True
    write_json(out / "run.json", record)


def is_begun(out: Path) -> bool:
    """Whether a folder holds a record and something of stage 1 to go on from, of which the record must stay true."""
    kept = (out / "stage1" / name for name in ("model.safetensors", "checkpoint.pt"))
    return (out / "run.json").exists() and any(path.exists() for path in kept)


def carried_record(run: Path, data: str | None = None) -> dict[str, Any]:
    """A run's run.json for others: no folder of this machine, and at most the name of the data it was trained on."""
    record = read_json(run / "run.json") | {"data": data, "parts": None}
    return {name: value for name, value in record.items() if name != "from_here"}


def read_record(out: Path) -> RunRecord:
    """What `write_record` has written. Raises UserError when there is none, or something else."""
    path = out / "run.json"
    if not path.exists():
        if (out / "config.json").exists():
            raise UserError(f"{out} is a folder of the model hub, and no run of a recipe: name it with --model")
        recipe = f"--recipe {out.name} " if out.name in RECIPES else ""
        raise UserError(f"{out.resolve()} holds no trained bridge: run `python -m minblip2 train {recipe}--out {out}` "
                        "first")
    record = read_json(path)
    recipe = find_recipe(field(record, "recipe", str, path)).with_seed(field(record, "seed", int, path))
    changed = field(record, "changed", dict, path) if "changed" in record else {}
    recipe = replace(recipe, **{name: value for name, value in changed.items() if name in CHANGEABLE})
    batch_size = field(record, "batch_size", int, path) if "batch_size" in record else None
    near = record.get("from_here")
    data, parts = (_found(out, record, near if isinstance(near, dict) else {}, name) for name in ("data", "parts"))
    return RunRecord(with_batch_size(recipe, batch_size), data, parts, record.get("skip_broken") is True)


def recorded_data(out: Path) -> Path:
    """The data that a run was trained on; scenes that are not there are drawn again.

    Raises UserError where others are not there any more.
    """
    record = read_record(out)
    if record.recipe.name == "scenes" and (record.data is None or not record.data.exists()):
        return default_data(record.recipe, out, None)
    if record.data is None or not record.data.exists():
        raise UserError(f"the data that {out} was trained on are not in {record.data} any more: name their folder with "
                        "--data")
    return record.data


def recorded_parts(record: RunRecord) -> Path | None:
    """The frozen models that a run was trained with; None means where they are fetched to.

    Raises UserError where they are not there any more.
    """
    if record.parts is not None and not record.parts.exists():
        if FETCHED_PARTS.is_dir():
            return None
        raise UserError(f"the pretrained models are not in {record.parts} any more: name their folder with --parts")
    return record.parts


def _from(out: Path, path: Path) -> str | None:
    try:
        return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
    except ValueError:  # Windows: on another drive
        return None


def _found(out: Path, record: Mapping[str, Any], near: Mapping[str, Any], name: str) -> Path | None:
    """Where the folder is: seen from the run, else where it was; where it was if it is nowhere."""
    if record.get(name) is None:
        return None
    was = Path(field(record, name, str, out / "run.json"))
    if isinstance(there := near.get(name), str) and (path := out / there).exists():
        return path.resolve()  # not by its letters: the run may be a link to another place
    return was
