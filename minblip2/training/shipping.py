"""The bridge that ships with the module, and how a run becomes it: python -m minblip2.training.shipping RUN

A copy of the run in half precision is written to minblip2/bridges/, with its logs to four digits, packed. What was
measured of the run itself is not copied: the copy is measured, for that is what is used.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from .. import UserError
from ..data.coco import CocoCaptions
from ..data.entry import run_command
from ..data.files import read_json, write_beside, write_folder, write_json
from .bridge import Bridge
from .loop import load_weights, read_log, run_fingerprint
from .recipes import find_recipe
from .records import carried_record

SHIPPED = Path(__file__).resolve().parents[1] / "bridges" / "scenes"
OWN = Path("runs") / "scenes"  # a run of one's own, which takes its place
PARTS = ("vit", "lm", "stage1", "stage2")


def finished(run: Path) -> bool:
    """Whether a folder holds a bridge that was trained to the end of stage 2."""
    return all((run / part / "model.safetensors").exists() for part in PARTS[2:])


def usual_run(root: Path = Path()) -> Path:
    """The bridge that is meant when none is named: one's own below `root`, else the one that ships."""
    return root / OWN if finished(root / OWN) else SHIPPED


def working_copy(root: Path = Path()) -> Path:
    """The same where there is room for features and results: of the bridge that ships, a copy in runs/shipped."""
    run = usual_run(root)
    if run != SHIPPED:
        return run
    copy = root / "runs" / "shipped"

    def is_there() -> bool:
        return finished(copy) and run_checksum(copy) == run_checksum(SHIPPED)

    if not is_there():
        write_folder(copy, partial(shutil.copytree, SHIPPED), is_there)
    return copy


def run_checksum(run: Path) -> str:
    """sha256 over the weights of a run's parts: which bridge it is."""
    digest = hashlib.sha256()
    for part in PARTS:
        path = run / part / "model.safetensors"
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def halve(source: Path, target: Path, fingerprint: str | None = None) -> None:
    """Copy safetensors in half precision, under another fingerprint if one is given."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() if fingerprint is None else {"fingerprint": fingerprint}
        state = {name: file.get_tensor(name) for name in file.keys()}
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    write_beside(target, lambda path: save_file(state, path, metadata=metadata))


def rounded(record: dict[str, float]) -> dict[str, float]:
    """A line of a log with its fractions to four digits, which is as much as a curve shows."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in record.items()}


def ship(run: Path, to: Path = SHIPPED) -> None:
    """Write a finished run of the scenes in half precision to `to`. Raises UserError when it is not finished."""
    if not finished(run):
        raise UserError(f"{run} holds no finished bridge: run `python -m minblip2 train` first")
    shutil.rmtree(to, ignore_errors=True)
    for part in PARTS:
        (to / part).mkdir(parents=True)
        records = map(rounded, read_log(run / part / "log.jsonl"))
        lines = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        packed = gzip.compress(lines.encode(), mtime=0)  # without the time, so that the same log gives the same bytes
        write_beside(to / part / "log.jsonl.gz", lambda path, packed=packed: path.write_bytes(packed))
        shutil.copy(run / part / "seconds.json", to / part)
    for part in PARTS[:2]:
        halve(run / part / "model.safetensors", to / part / "model.safetensors")
    record = read_json(run / "run.json")
    write_json(to / "run.json", carried_record(run))
    # A stage was trained on what stands before it: its fingerprint names that, as rounded as it is now.
    recipe = find_recipe(record["recipe"]).with_seed(record["seed"])
    data = CocoCaptions(record["data"], "train")
    backbones = recipe.build(recipe, Path(record["data"]), None, to)
    bridge = Bridge(recipe, backbones, recipe.new_stage1(backbones))
    stage1, stage2 = (to / part / "model.safetensors" for part in PARTS[2:])
    halve(run / "stage1" / "model.safetensors", stage1, run_fingerprint(recipe.stage1, bridge.stage1_settings(data)))
    load_weights(bridge.stage1, stage1)
    halve(run / "stage2" / "model.safetensors", stage2, run_fingerprint(recipe.stage2, bridge.stage2_settings(data)))


def main() -> int:
    """Ship a run; 2 when it cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=OWN, help="a finished run (default %(default)s)")
    args = parser.parse_args()
    try:
        ship(args.run)
    except UserError as error:
        print(f"shipping: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    print(f"{SHIPPED.name}: {size / 1e6:.2f} MB, checksum {run_checksum(SHIPPED)[:12]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("minblip2.training.shipping", main))
