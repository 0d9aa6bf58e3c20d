"""The benchmarks' tables from what runs/benchmarks holds: python -m benchmarks.table [--write]

With --write they go into docs/RESULTS.md, between their markers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.timing import OURS, RESULTS
from minblip2.course.markers import asked_to_write, put
from minblip2.data.entry import run_command
from minblip2.data.files import read_json
from minblip2.evaluation.tables import markdown

TITLES = {  # benchmark -> what its cases are called
    "stage1": "stage-1 step", "stage2": "stage-2 step", "generate": "writing", "retrieve": "re-ranking",
    "cache": "stage-1 step", "memory": ""}


def loaded(folder: Path = RESULTS) -> dict[str, dict[str, dict]]:
    """Benchmark -> its cases by name, for those that were measured."""
    return {name: read_json(folder / f"{name}.json")["cases"] for name in TITLES if (folder / f"{name}.json").exists()}


def agreement(same: Mapping[str, float | str]) -> str:
    """How far the two sides' numbers are apart, at most: "identical", or a figure."""
    numbers = [value for value in same.values() if not isinstance(value, str)]
    return f"{max(numbers):.0e}".replace("e-0", "e-") if numbers else ", ".join(map(str, same.values()))


def times(found: Mapping[str, Mapping[str, dict]]) -> list[list[str]]:
    """A row for each case and each side that ours is compared with."""
    rows = [["", "against", "ours, s", "theirs, s", "times as fast", "by the clock", "their arithmetic", "difference"]]
    for benchmark, cases in found.items():
        for name, case in cases.items():
            for side in case.get("ratio", {}):
                median, ratio = case["median"], case["ratio"][side]
                title = f"{TITLES[benchmark]}: {name}" + f" ({len(case['seconds']['cpu'][side])})"
                rows.append([title, side, f"{median[OURS]['cpu']:.2f}", f"{median[side]['cpu']:.2f}",
                             f"{ratio['cpu']:.2f}", f"{ratio['wall']:.2f}",
                             f"{case['work'][side] / case['work'][OURS]:.2f}", agreement(case["same"][side])])
    return rows


def peaks(found: Mapping[str, Mapping[str, dict]]) -> list[list[str]]:
    """A row for each case whose memory was measured, and each side."""
    rows = [["peak memory", "against", "ours, GB", "theirs, GB", "share"]]
    for name, case in found.get("memory", {}).items():
        for side, share in case["share"].items():
            rows.append([name, side, f"{case['bytes'][OURS] / 1e9:.2f}", f"{case['bytes'][side] / 1e9:.2f}",
                         f"{share:.2f}"])
    return rows


def machines(found: Mapping[str, Mapping[str, dict]]) -> str:
    """The machines that the figures are of, in words."""
    said = {f"{where['processor']}, {where['cores']} cores, {where['threads']} "
            f"thread{'s' if where['threads'] != 1 else ''}, PyTorch {where['torch']}"
            for cases in found.values() for where in (case["machine"] for case in cases.values())}
    return "; ".join(sorted(said))


def text(found: Mapping[str, Mapping[str, dict]]) -> str:
    """Both tables, and under what conditions they were measured. Raises ValueError when nothing was measured."""
    if not found:
        raise ValueError(f"{RESULTS} holds no results: run python -m benchmarks.stage1 and the others first")
    tables = [markdown(*rows) for rows in (times(found), peaks(found)) if len(rows) > 1]
    return "\n\n".join([f"{machines(found)}, float32.", *tables])


def main() -> int:
    """Print the tables, and with --write put them there; 2 when there is nothing to write."""
    writes = asked_to_write(__doc__)
    try:
        made = text(loaded())
        print(made)
        if writes:
            put(made, "benchmarks")
    except ValueError as error:
        print(f"benchmarks.table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.table", main))
