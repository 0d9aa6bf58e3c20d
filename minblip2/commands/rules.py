"""Which options have an effect beside which: those that have none are refused, not dropped.

Nothing here needs PyTorch, so that downloads, which have rules as well, start at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .. import UserError


@dataclass(frozen=True)
class Rule:
    """An option, the one that it has an effect with, or has none beside, and why that is so."""

    option: str
    other: str
    together: bool
    why: str

    def broken_by(self, given: set[str]) -> bool:
        """Whether these options hold the one where it has no effect."""
        return self.option in given and (self.other in given) != self.together

    def __str__(self) -> str:
        one, other = (f"--{name.replace('_', '-')}" for name in (self.option, self.other))
        if self.together:
            return f"{one} has an effect only with {other}, for {self.why}: add {other} or leave {one} out"
        return f"{one} has no effect beside {other}, for {self.why}: leave one of them out"


def only_with(other: str, why: str, *options: str) -> list[Rule]:
    """These options have an effect with the other alone."""
    return [Rule(option, other, True, why) for option in options]


def never_with(other: str, why: str, *options: str) -> list[Rule]:
    """These options have no effect beside the other."""
    return [Rule(option, other, False, why) for option in options]


MODEL = "the folder of the hub is the whole model"
RULES: dict[str, list[Rule]] = {
    "train": [
        *only_with("from", "a recipe has its own", "train_split", "prompt", "steps", "learning_rate"),
        *never_with("from", MODEL, "recipe", "parts"),
        *never_with("restart", "it begins anew", "resume")],
    "caption": [
        *never_with("stage1", "the Q-Former writes without a prompt and without a language model", "prompt", "model"),
        *never_with("model", MODEL, "run", "parts"),
        *never_with("top_p", "a draw searches nothing", "beams"),
        *only_with("top_p", "nothing else is drawn", "seed")],
    "evaluate": [
        *never_with("model", MODEL, "run", "parts"),
        *only_with("model", "a run has its own", "prompt")],
    **{name: never_with("model", MODEL, "run", "parts") for name in ("ask", "retrieve", "attend")},
    "demo": [
        *never_with("model", MODEL, "run", "parts"),
        *only_with("run", "the drawings' bridge has its own", "parts"),
        *never_with("page", "that is the page of drawings", "run", "model")],
}


def refuse_idle_options(command: str, given: Iterable[str], rules: Mapping[str, Sequence[Rule]] = RULES) -> None:
    """Raise UserError for the first option, of those that were given, which has no effect beside the others."""
    given = set(given)
    for rule in rules.get(command, ()):
        if rule.broken_by(given):
            raise UserError(str(rule))


def given_options(parser: argparse.ArgumentParser, words: list[str] | None) -> set[str]:
    """Which options stand on a command line that `parser` accepts, by the names under which it would keep them."""
    def forget_defaults(some: argparse.ArgumentParser) -> None:
        for action in some._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    forget_defaults(sub)
            elif action.option_strings:
                # `dest` may be short for a command's own use; a rule knows an option by what is written
                action.default, action.dest = argparse.SUPPRESS, action.option_strings[-1].lstrip("-").replace("-", "_")

    forget_defaults(parser)
    return set(vars(parser.parse_args(words)))
