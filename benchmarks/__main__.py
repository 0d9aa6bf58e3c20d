"""All benchmarks one after the other, as the README quotes them: python -m benchmarks DATA PARTS

DATA is a folder in COCO layout, PARTS holds the laptop recipe's models; both are for `cache` alone. On two cores it
takes an hour and a half, and other work on the machine makes the figures worse than they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from minblip2.data.entry import run_command

COMMANDS = (["stage1"], ["stage1", "--draw", "random", "--batch", "16", "--forms", "official recipe"], ["stage2"],
            ["generate"], ["generate", "--batch", "8", "--beams", "1", "--tokens", "1"], ["retrieve"], ["memory"],
            ["growth"])


def main() -> int:
    """Run each in a process of its own; the first code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("parts")
    options = parser.parse_args()
    images = ["cache", "--data", options.data]
    caches = ([*images, "--parts", options.parts], [*images, "--sizes", "gpu", "--batch", "8"],
              [*images, "--sizes", "paper", "--batch", "2"])
    for command in (*caches, *COMMANDS, ["table", "--write"]):
        print(f"== {' '.join(command)}", flush=True)
        if code := subprocess.run([sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]]).returncode:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks", main))
