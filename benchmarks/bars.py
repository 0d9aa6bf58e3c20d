"""Does training from nothing, here, still give such a bridge as it did? python -m benchmarks.bars [RUN]

The figures of a finished run of the scenes beside bars that the seeds in results/seeds.json give: their lowest, less
twice their spread, and the spread counted as SPREAD points at least, as three seeds say little of the luck there is.
Asked are the figures in which such a bar is above what needs no picture, or another one; the others are not judged.
Ends with 1 where a bar is not reached. Without RUN it ends with 0 if there is nothing to try: if the code and pins that
are here are those that trained the seeds, or training begins with them as it did then (`benchmarks.beginning`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.beginning import beginning, differences
from benchmarks.provenance import RESULTS
from benchmarks.seeds import Figures, measure, trained_by
from minblip2.data.entry import run_command
from minblip2.data.files import read_json
from minblip2.data.scene_questions import KINDS
from minblip2.evaluation.tables import markdown

SPREAD = 5.0  # points
# A figure, and those that tell what it would be if the bridge, or what it is asked for, were not there.
CONTROLS = {
    **{f"ask_{kind}_own": [f"ask_{kind}_{other}" for other in ("another", "none", "guess")] for kind in KINDS},
    **{f"ask_{kind}_told": [f"ask_{kind}_guess"] for kind in KINDS},
    **{f"stage2_{what}": [f"shuffled_{what}"]
       for what in ("things_seen", "things_unseen", "positions", "background", "size")},
    **{f"{loss}_{way}_r1": [] for loss in ("itc", "itm") for way in ("i2t", "t2i")},
    "pointing": ["pointing_chance"],
}


def bars(seeds: list[Figures]) -> Figures:
    """What a run must reach, by figure, in percent."""
    found = {}
    for name, controls in CONTROLS.items():
        values = [run[name] for run in seeds]
        bar = min(values) - 2 * max(max(values) - min(values), SPREAD)
        if bar > SPREAD + max((run[control] for run in seeds for control in controls), default=0):
            found[name] = bar
    return found


def main() -> int:
    """Measure, and print every bar with what the run has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    kept, run = read_json(RESULTS / "seeds.json"), parser.parse_args().run
    if run is None:
        if kept["sources"] == trained_by():
            return 0
        found = differences(kept["beginning"], beginning())
        print(f"training begins otherwise than it did, in {', '.join(found)}" if found else
              "the code has changed, and training begins as it did")
        return int(bool(found))
    results = measure(run, kept["split"])["results"]
    asked = bars([run["results"] for run in kept["runs"]])
    print(markdown(["", "here", "bar", ""], *([name, f"{results[name]:.1f}", f"{bar:.1f}",
                                              "" if results[name] >= bar else "not reached"]
                                             for name, bar in asked.items())))
    return int(any(results[name] < bar for name, bar in asked.items()))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.bars", main))
