"""What the benchmarks share: turns, medians, ratios, and where the figures are kept.

The sides of a comparison take turns, so that a slow moment of the machine hits all of them alike, and each round gives
its own ratio. "wall" is the time one waits; "cpu" is what the process used, which other people's jobs disturb far less.
Beside the time stands the arithmetic: as many times as fast as a side does more of it, ours would be if every operation
of both ran at one speed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minblip2.data.files import read_json, write_json

RESULTS = Path("runs/benchmarks")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OURS = "ours"  # the side to which the others are compared
Seconds = dict[str, dict[str, list[float]]]


def options(doc: str, repeats: int = 7, **more) -> argparse.Namespace:
    """Command line of a benchmark: --repeats, --threads, and `more` options by name, each a default value, a list of
    them, or a tuple of all values that it may have, the default first."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, of all sides")
    for name, default in more.items():
        choices = default if isinstance(default, tuple) else None
        default = choices[0] if choices else default
        several = dict(nargs="+", type=type(default[0])) if isinstance(default, list) else dict(type=type(default))
        parser.add_argument(f"--{name}", default=default, choices=choices, **several)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def interleave(sides: Mapping[str, Callable[[int], object]], repeats: int) -> Seconds:
    """Seconds of each side in each of so many rounds: clock -> side -> rounds.

    A side is called with the round's number, from 1 on: with round 0 each has shown that it computes the same, and is
    warm.
    """
    seconds: Seconds = {clock: {name: [] for name in sides} for clock in CLOCKS}
    for turn in range(1, repeats + 1):
        for name, side in sides.items():
            started = {clock: read() for clock, read in CLOCKS.items()}
            side(turn)
            for clock, read in CLOCKS.items():
                seconds[clock][name].append(read() - started[clock])
    return seconds


def work(sides: Mapping[str, Callable[[int], object]]) -> dict[str, int]:
    """Floating-point operations of each side in round 0: those of matrix products, attention's and backward passes too.

    Attention is counted in its plain form, for the counter does not know the kernel that a CPU has for it.
    """
    def packed(x, matrix, *_, out_shape, **__) -> int:  # the products of `minblip2.lm.packed`
        return 2 * math.prod(out_shape) * x[-1]

    counted = {}
    for name, side in sides.items():
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: packed})
        with sdpa_kernel(SDPBackend.MATH), counter:
            side(0)
        counted[name] = counter.get_total_flops()
    return counted


def case(seconds: Seconds, **facts) -> dict:
    """One line of a benchmark: medians, and how many times as long as ours each side takes (median of the rounds')."""
    ratio = {name: {clock: statistics.median(theirs / own for theirs, own in
                                             zip(each[name], each[OURS], strict=True)) for clock, each in
                    seconds.items()} for name in seconds["wall"] if name != OURS}
    medians = {name: {clock: statistics.median(each[name]) for clock, each in seconds.items()}
               for name in seconds["wall"]}
    return {"median": medians, "ratio": ratio, "seconds": seconds, **facts}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a fraction of the largest value. Raises ValueError for different shapes."""
    if ours.shape != theirs.shape:
        raise ValueError(f"the two sides computed {tuple(ours.shape)} and {tuple(theirs.shape)}: they must agree")
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def same(what: str, value: float, allowed: float = 1e-5) -> float:
    """The difference between two sides if it is small enough; else nothing may be timed and a ValueError says so."""
    if not value <= allowed:
        raise ValueError(f"{what}: the two sides differ by {value:.1e}, more than {allowed:.0e}: they are not the same "
                         "computation")
    return value


def gradient_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any gradient, by name: the length of the difference as a fraction of its own length.

    A key's bias has none in theory (it moves all scores alike) and rounding in practice: it is judged by the length of
    the longest. Raises ValueError when the names differ.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one side has a gradient for {sorted(ours.keys() ^ theirs.keys())[:3]}")
    lengths = {name: gradient.norm().item() for name, gradient in theirs.items()}
    longest = max(lengths.values())
    return max((ours[name] - theirs[name]).norm().item() / (longest if name.endswith("key.bias") else lengths[name])
               for name in theirs)


def processor() -> str:
    """The name of this machine's processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")  # on Linux
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def machine() -> dict[str, object]:
    """What the figures depend on: processor, cores, threads, versions."""
    return {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def store(benchmark: str, cases: Mapping[str, dict], where: Mapping[str, object]) -> Path:
    """Put cases into runs/benchmarks/BENCHMARK.json, beside those that other calls have measured."""
    path = RESULTS / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read_json(path)["cases"] if path.exists() else {}
    write_json(path, {"benchmark": benchmark, "cases": before | {name: {**found, "machine": where}
                                                                 for name, found in cases.items()}})
    return path


def keep(benchmark: str, cases: Mapping[str, dict]) -> Path:
    """Print the cases and `store` them."""
    path = store(benchmark, cases, machine())
    for name, found in cases.items():
        print(name)
        for side, median in found["median"].items():
            times = "".join(f"  {unit} {value:10.3f} {found['ratio'][side][unit] if side != OURS else 1:5.2f}x"
                            for unit, value in median.items())
            print(f"  {side:52}{times}")
    print(f"wrote {path}")
    return path
