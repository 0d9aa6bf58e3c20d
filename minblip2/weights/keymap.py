"""How names of settings and tensors are translated, theirs -> ours, and back.

In a table of tensors `{i}` stands for a layer's number, and a name without `.weight` or `.bias` for both. Several of
our names in a tuple are copies of one tensor; `Fused`, they lie one below the other in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


class Fused(tuple):
    """Our names of the parts that one of their tensors holds, first rows first."""


Targets = str | tuple[str, ...]
Table = Mapping[str, Targets]


def renamed(ours: Targets, change: Callable[[str], str]) -> Targets:
    """Each of our names changed alike; what kind of tuple they are in stays."""
    return change(ours) if isinstance(ours, str) else type(ours)(map(change, ours))


def within(theirs: str, ours: str, table: Table) -> dict[str, Targets]:
    """The table of a part: each name with the prefix that the part has in the whole."""
    return {theirs + name: renamed(target, lambda one: ours + one) for name, target in table.items()}


def spelt(ours: Targets, layer: str, ending: str) -> tuple[str, ...]:
    """Full names of ours, in a tuple even if there is one only."""
    return renamed((ours,) if isinstance(ours, str) else ours, lambda one: one.replace("{i}", layer) + ending)


def pattern(theirs: str) -> str:
    """What matches their name, whatever the layer's number, which is a group."""
    return re.escape(theirs).replace(r"\{i\}", r"(\d+)")


def translate(name: str, table: Table) -> tuple[str, ...]:
    """Our names for one of theirs; none when the table does not know it."""
    for theirs, ours in table.items():
        if found := re.fullmatch(pattern(theirs) + r"(\.weight|\.bias)?", name):
            *layer, ending = found.groups(default="")
            return spelt(ours, "".join(layer), ending)
    return ()


def spell_out(table: Table, layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every pair of full names that a table can stand for in a model of so many layers."""
    for theirs, ours in table.items():
        for layer in map(str, range(layers if "{i}" in theirs else 1)):
            for ending in ("", ".weight", ".bias"):
                yield theirs.replace("{i}", layer) + ending, spelt(ours, layer, ending)


@dataclass(frozen=True)
class KeyMap:
    """How a kind of model is written elsewhere: settings, tensors, and which tensors are left aside for what reason.

    `prefix` stands before all tensors in some files, and in others not. `only` are settings that may be this alone,
    `grown` the tensors that may have a last row more here than in a file.
    """

    settings: Mapping[str, str]
    tensors: Table
    ignored: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    only: Mapping[str, Any] = field(default_factory=dict)
    grown: tuple[str, ...] = ()

    def leaves_aside(self, name: str) -> bool:
        """Whether a tensor, or the part that it belongs to, is ignored."""
        return any(re.fullmatch(pattern(theirs) + r"(\..+)?", name) for theirs in self.ignored)

    def rows(self) -> list[tuple[str, str]]:
        """The tensors as rows of a table, theirs and ours, in Markdown; at the end what is left aside, and why."""
        rows = [(f"`{self.prefix}{theirs}`", f"`{ours}`" if isinstance(ours, str) else f"`{'`, `'.join(ours)}`")
                for theirs, ours in self.tensors.items()]
        return rows + [(f"`{theirs}`", f"left aside: {reason}") for theirs, reason in self.ignored.items()]
