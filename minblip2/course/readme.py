"""The parts of README.md that are computed, put there by `python -m minblip2.course.readme`.

What is where comes from the docstrings of `minblip2`, the results and the picture from what runs left behind; without
runs these stay as they are. The other tables have commands of their own: `python -m benchmarks.table`,
`python -m tests.parity_table` and `python -m tests.course.exercises.table`, each with --write.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.entry import run_command
from ..data.files import read_json, write_beside
from ..training.shipping import working_copy
from . import layout
from .lesson import ROOT
from .markers import put
from .results import columns, kept, provenance, results_table

MEASURED = ROOT / "benchmarks" / "results"  # fetched.json: tests/pins.py; course.json: course.run --write


def under_picture(right: Sequence[bool], prompt: str) -> str:
    """What stands below the picture: how many of its captions name every thing of their scene, and nothing else."""
    return (f'*The first {len(right)} scenes of the validation split, not chosen, captioned after the prompt '
            f'"{prompt}":\n{sum(right)} of the {len(right)} captions are right in every colour and shape. How good '
            "they are on the whole, and what\nfails, is under [Results](#results).*")


def picture(run: Path, count: int = 8) -> tuple[bytes, str]:
    """The first pictures of the validation split as PNG, captioned by a trained bridge; and what to write below it."""
    from ..data.coco import CocoCaptions
    from ..data.pictures import load_image
    from ..data.scene_captions import judge
    from ..data.scene_dataset import load_scenes
    from ..evaluation.scene_scores import QUESTIONS, write_after
    from ..training.bridge import load_bridge
    from ..training.records import recorded_data
    from . import figures, viz

    bridge = load_bridge(run)
    data = recorded_data(run)
    images = [load_image(record.path) for record in CocoCaptions(data, "val", limit=count).images]
    prompt = QUESTIONS["things"]
    captions = write_after(bridge.blip2, images, prompt)
    truths = load_scenes(data, "val")[:count]
    right = [bool(judge(caption, truth)["things"]) for caption, truth in zip(captions, truths, strict=True)]
    return viz.png(figures.caption_sheet(images, [[caption] for caption in captions])), under_picture(right, prompt)


def write_layout() -> None:
    """Put the two tables of files and rooms into README.md. Raises ValueError where it has no place for them."""
    sources = layout.module()
    put(layout.paper(sources, layout.shown_in(ROOT / "notebooks")), "paper")
    put(layout.rooms(sources), "rooms")


def write_results() -> list[str]:
    """Put the results of all runs into README.md, and the picture; the titles of the columns, none without runs."""
    found, output = columns(ROOT / "runs"), kept()
    if not found:
        return []
    found = {f"{name}, val": [figures] for name, figures in output.items() if f"{name}, val" not in found} | found
    recipes = sorted({name.split(",")[0] for name in found}, key=lambda name: (name != "scenes", name))
    tables = [results_table({name: some for name, some in sorted(found.items()) if name.split(",")[0] == recipe})
              for recipe in recipes]  # one for each: what is measured on drawings is not what is on photographs
    put("\n\n".join([*tables, *([provenance(output)] if output else [])]), "results")
    figure = ROOT / "notebooks" / "figures" / "bridge.png"
    figure.parent.mkdir(exist_ok=True)
    drawn, sentence = picture(working_copy(ROOT))
    put(sentence, "picture")
    write_beside(figure, lambda partial: partial.write_bytes(drawn))
    return list(found)


def takes(fetched: dict[str, float], course: dict[str, Any] | None) -> str:
    """What the course costs before it begins: gigabytes for each system, and minutes where they were measured."""
    sizes = ", ".join(f"{size:.1f} GB on {system}" for system, size in fetched.items())
    said = f"*Setting up fetches {sizes}, once.\nOn Linux most of it is for NVIDIA GPUs; `TORCH=cpu` leaves that out."
    if course:
        said += (f"\n`make course` then takes {course['wall_minutes']:.0f} minutes on {course['cores']} cores"
                 f" ({course['cpu_minutes']:.0f} minutes of CPU time; {course['machine']}).")
    return f"{said}*"


def put_takes() -> None:
    """Put into README.md what the course costs."""
    course = MEASURED / "course.json"
    put(takes(read_json(MEASURED / "fetched.json"), read_json(course) if course.exists() else None), "takes")


def main() -> int:
    """Write what there is to write; 2 when README.md has no place for it."""
    try:
        write_layout()
        put_takes()
        results = write_results()
    except ValueError as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    print("README.md: what is where; " + (f"results of {'; '.join(results)}" if results else
          "no runs/*/results-*.json, so the results stay as they are (make course makes some)"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("minblip2.course.readme", main))
