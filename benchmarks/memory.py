"""Peak memory of what the other benchmarks time, each side in a process of its own: python -m benchmarks.memory

The peak is that of the process while it computes, weights included, less what Python and the libraries took before.
Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the peak is what is in use, not what the
allocator keeps. Linux only: it is read from /proc.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks import generate, stage1, stage2
from benchmarks.timing import OURS, machine, options, store
from minblip2.data.entry import run_command

WHAT = ("stage 1, batch 16", "stage 2, OPT-125m size, batch 8", "5 beams, OPT-125m size, batch 8")
THEIRS = stage1.THEIRS


def read(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most so far."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def forget_peak() -> None:
    """Give back what is free, and let the peak begin anew."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as control:
        control.write("5")


def build(what: str, side: str, size: str) -> Callable[[int], object]:
    """One side of a benchmark alone: all that belongs to the other is gone."""
    name, _, rest = what.partition(", ")
    batch = int(what.rpartition(" ")[2])
    if name == "stage 1":
        config, visual = stage1.SIZES[size]
        torch.manual_seed(0)
        ours = stage1.PlainStage1(config, savings=tuple(stage1.SAVINGS))
        model = ours if side == OURS else stage1.sides(ours, [side])[side]
        image, ids, mask, negatives = stage1.example(config, visual, batch, 0, stage1.similar_lengths(batch)[0])
        return lambda turn: model(image, ids, mask, negatives=negatives).loss.backward()
    models = stage2.pair(size, rest.partition(" size")[0])
    if name == "stage 2":
        run = stage2.steps(models, [stage2.batch_of(models, size, batch, 0)] * 2)[side]
    else:
        image, *_ = stage1.example(*stage1.SIZES[size], batch)
        run = generate.ways(models, image, int(name.split()[0]), 30)[side]
    if side == OURS:
        models.theirs = None
    else:
        models.ours = None
    return run


def peak(what: str, side: str, size: str, threads: int) -> int:
    """Bytes, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", f"{what}|{side}", "--size", size,
               "--threads", str(threads)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, encoding="utf-8")
    return int(done.stdout.split()[-1])


def measure(what: str, size: str, threads: int) -> dict:
    """The peaks of both sides and their ratio."""
    sides = [OURS, THEIRS] + ([stage1.OFFICIAL] if what.startswith("stage 1") else [])
    peaks = {side: peak(what, side, size, threads) for side in sides}
    return {"bytes": peaks, "share": {side: peaks[OURS] / peaks[side] for side in sides[1:]}}


def main() -> None:
    """Measure, print, and keep runs/benchmarks/memory.json; or, as a child, one side and print its peak."""
    args = options(__doc__, size=tuple(stage1.SIZES), what=list(WHAT), child="")
    if args.child:
        before = read("VmRSS")
        run = build(*args.child.split("|"), args.size)
        forget_peak()
        run(0)
        print(read("VmHWM") - before)
        return
    found = {what: measure(what, args.size, args.threads) for what in args.what}
    for what, each in found.items():
        print(what, *(f"{side} {value / 1e9:.2f} GB" for side, value in each["bytes"].items()), each["share"])
    store("memory", found, machine())


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.memory", main))
