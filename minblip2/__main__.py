"""Command line: python -m minblip2 train | caption | ask | retrieve | evaluate | attend | export | demo."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__
from .data.entry import run_command

COMMANDS = ("train", "caption", "ask", "retrieve", "evaluate", "attend", "export", "demo")
KEPT = ("--csv", "--jsonl")  # with which `caption` goes on where it stopped


def parser() -> argparse.ArgumentParser:
    """The command line's grammar, from the file of each command."""
    from importlib import import_module

    top = argparse.ArgumentParser(prog="python -m minblip2", description=__doc__)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        import_module(f"{__package__}.commands.{name}").add(commands)
    return top


def execute() -> int | None:
    """Run the command that the words of the command line name; its exit code, if it has one to tell."""
    from .commands.rules import given_options, refuse_idle_options
    from .device import computing

    args = parser().parse_args()
    refuse_idle_options(args.command, given_options(parser(), None))
    with computing(args.device, args.dtype):
        return args.execute(args)


def is_speaker() -> bool:
    """Whether this process is to report an error: of those that torchrun has started, the first that asks."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from .training.distributed import is_first_to_report

    return is_first_to_report()


def main() -> int:
    """Run one command; 0 when it worked, 2 when the user's input cannot be used, 130 when it was stopped.

    PyTorch is imported only inside: Ctrl-C is one sentence from the first moment on.
    """
    words = sys.argv[1:]
    goes_on = words[:1] == ["train"] or words[:1] == ["caption"] and any(word.startswith(KEPT) for word in words)
    anew = any(word.startswith("--rest") for word in words)  # --restart, which may be cut short
    again = f"{'without --restart ' if anew else ''}the same command goes on where it stopped" if goes_on else ""
    return run_command("minblip2", execute, again, is_speaker)


if __name__ == "__main__":
    sys.exit(main())
