"""What every notebook of the course opens with: figures said in prose and tables, and how long it takes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.coco import CocoCaptions
from ..data.files import read_json
from ..data.scene_dataset import SPLITS
from ..evaluation.tables import markdown
from ..training.bridge import load_bridge
from ..training.recipes import SCENES, default_data
from ..training.shipping import working_copy

ROOT = Path(__file__).resolve().parents[2]
WORDS_PER_MINUTE = 70  # prose and code together; a fresh reader of each lesson needed 59 to 90, 70 on average


def __getattr__(name: str) -> Path:
    """RUN, the bridge that notebooks look at, and DATA, the drawn scenes; both are made when first asked for.

    RUN is the folder in the environment variable MINBLIP2_RUN, else one's own run, else a copy of the one that ships.
    """
    if name == "RUN":
        return Path(os.environ["MINBLIP2_RUN"]).resolve() if "MINBLIP2_RUN" in os.environ else working_copy(ROOT)
    if name == "DATA":
        return default_data(SCENES, ROOT / "runs" / "scenes", None)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def prepare() -> Path:
    """Make what notebooks share before two of them make it at once: the run, which is returned, scenes and features."""
    run, data = __getattr__("RUN"), __getattr__("DATA")
    bridge = load_bridge(run)
    for split in SPLITS:
        bridge.features(CocoCaptions(data, split), run / "cache")
    return run


def say(text: str) -> None:
    """Display Markdown in a notebook."""
    from IPython.display import Markdown, display  # only notebooks need it

    display(Markdown(text))


def table(header: Sequence[object], *rows: Sequence[object]) -> None:
    """Display a table in a notebook; numbers stand to the right. Raises ValueError for rows of unequal lengths."""
    say(markdown(header, *rows))


def folded(title: str, header: Sequence[object], *rows: Sequence[object]) -> None:
    """Display a long table in a notebook behind a line to click on. Raises ValueError for rows of unequal lengths."""
    say(f"<details><summary>{title}</summary>\n\n{markdown(header, *rows)}\n\n</details>")


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors of one shape, as a fraction of the largest value of the `other`."""
    return ((one - other).abs().max() / other.abs().max()).item()


def apart(one: Tensor, other: Tensor) -> str:
    """Their `difference` for a table, as "3e-07", or "none" where it is exactly zero."""
    return f"{gap:.0e}" if (gap := difference(one, other)) else "none"


def said_by(error: type[Exception], function: Callable, *inputs, **settings) -> str:
    """What the error says that a call raises. Raises AssertionError when it raises none of that kind."""
    try:
        function(*inputs, **settings)
    except error as raised:
        return str(raised)
    raise AssertionError(f"{function} should have raised {error.__name__}")


def reading_minutes(cells: Sequence[Mapping[str, Any]]) -> int:
    """How long a notebook's cells take to read, code included."""
    words = sum(len("".join(cell["source"]).split()) for cell in cells)
    return max(1, round(words / WORDS_PER_MINUTE))


class Minutes:
    """How long a notebook takes: `minutes = Minutes("02_masks")` in a cell at its top, `minutes.stop()` in its last."""

    def __init__(self, notebook: str):
        from IPython.display import Markdown, display

        cells: list[dict[str, Any]] = read_json(ROOT / "notebooks" / f"{notebook}.ipynb")["cells"]
        self.reading = f"Reading: about **{reading_minutes(cells)} minutes**, at {WORDS_PER_MINUTE} words a minute, " \
                       "code included. Computing: "
        self.started = time.perf_counter()
        self.line = display(Markdown(f"{self.reading}shown here once the last cell has run."), display_id=True)

    def stop(self) -> None:
        """Write into the line at the top how long computing took."""
        from IPython.display import Markdown

        seconds = round(time.perf_counter() - self.started)
        took = f"{seconds} second{'s' * (seconds != 1)}"
        self.line.update(Markdown(f"{self.reading}**{took}** on the machine that ran it."))
