"""What is computed of README.md, minblip2/README.md and docs/RESULTS.md: `python -m minblip2.course.readme`.

What is where comes from the docstrings of `minblip2`, minutes from the notebooks, results and pictures from the bridge
that ships and from what runs left behind. The other tables have commands of their own, to be called before this one:
`python -m benchmarks.table`, `python -m tests.parity_table`, `python -m tests.course.exercises.table`, with --write.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.coco import CocoCaptions
from ..data.entry import run_command
from ..data.files import read_json, write_beside
from ..data.pictures import load_image
from ..evaluation.asking import questions_table
from ..evaluation.tables import markdown
from ..training.shipping import SHIPPED, working_copy
from . import diagram, figures, guide, layout, viz
from .lesson import ROOT
from .markers import put, read
from .results import cell, columns, kept, provenance, results_table, seeds

ASKED = ("count", "colour", "shape", "where", "relation")  # the kinds of questions that the README names
MEASURED = ROOT / "benchmarks" / "results"  # fetched.json: tests/pins.py; course.json: course.run --write


def under_picture(right: Sequence[bool], prompt: str) -> str:
    """What stands below the picture: how many of its captions name every thing of their scene, and nothing else."""
    return (f'*The first {len(right)} scenes of the validation split, not chosen, captioned after "{prompt}": '
            f"{sum(right)} of {len(right)}\nright in every colour and shape.*")


def picture(run: Path, count: int = 8) -> tuple[bytes, str]:
    """The first pictures of the validation split as PNG, captioned by a trained bridge; and what to write below it."""
    from ..data.scene_captions import judge
    from ..data.scene_dataset import load_scenes
    from ..evaluation.scene_scores import QUESTIONS, write_after
    from ..training.bridge import load_bridge
    from ..training.records import recorded_data

    bridge = load_bridge(run)
    data = recorded_data(run)
    images = [load_image(record.path) for record in CocoCaptions(data, "val", limit=count).images]
    prompt = QUESTIONS["things"]
    captions = write_after(bridge.blip2, images, prompt)
    truths = load_scenes(data, "val")[:count]
    right = [bool(judge(caption, truth)["things"]) for caption, truth in zip(captions, truths, strict=True)]
    return viz.png(figures.caption_sheet(images, [[caption] for caption in captions])), under_picture(right, prompt)


def photographs_picture(count: int = 4) -> tuple[bytes, str]:
    """The first photographs that ship as JPEG, with what is kept of the laptop bridge; and what to write below it."""
    from . import photographs as one

    said, data, run = one.kept(), one.photographs(), read_json(MEASURED / "laptop.json")
    images = [one.DINO.crop_and_resize(load_image(path)) for path in data.paths[:count]]
    figure, panels = viz.make_panels(2 * count, count, 2.3, 2.8)
    maps, captions = one.unpacked(said["maps"]), one.marked(said["captions"])
    for number, image in enumerate(images):
        above, below = panels[number], panels[count + number]
        viz.draw_picture(above, image)
        figures.lay_over(below, image, maps[number])
        for panel, text in ((above, f"{captions[number]}\n{one.QUESTIONS[number]} → {said['answers'][number]}"),
                            (below, f"where ITM looks: {data.images[number].captions[0]}")):
            panel.set_title("\n".join(textwrap.fill(line, 32) for line in text.split("\n")), fontsize=9,
                            weight="normal")
    minutes = run["minutes_stage1"] + run["minutes_stage2"]
    named = one.named(said["captions"])
    return viz.jpeg(figure), (
        f"*The first {count} of {len(named)}, not chosen, after {minutes:.0f} minutes of training without a GPU; "
        f"{sum(named)} of the {len(named)} captions\nname the subject: "
        "[lesson 15](notebooks/15_photographs.ipynb). CC BY 2.0, [credits](data/photographs/CREDITS.md).*")


def write_layout() -> None:
    """Put the two tables of files and rooms on their page. Raises ValueError where it has no place for them."""
    sources = layout.module()
    put(layout.paper(sources, layout.shown_in(ROOT / "notebooks")), "paper")
    put(layout.rooms(sources), "rooms")


def write_results() -> list[str]:
    """Put the results of all runs on their page; the titles of the columns, none without runs."""
    found, output = columns(ROOT / "runs"), kept()
    if not found:
        return []
    found = {f"{name}, val": [figures] for name, figures in output.items() if f"{name}, val" not in found} | found
    found |= seeds()
    recipes = sorted({name.split(",")[0] for name in found}, key=lambda name: (name != "scenes", name))
    tables = [results_table({name: some for name, some in sorted(found.items()) if name.split(",")[0] == recipe})
              for recipe in recipes]  # one for each: what is measured on drawings is not what is on photographs
    tables += [markdown(*asked) for title, some in found.items()
               if (asked := questions_table(some, cell, f"questions, {title} (%)"))]
    put("\n\n".join([*tables, *([provenance(output)] if output else [])]), "results")
    return list(found)


def write_pictures() -> None:
    """Draw the README's pictures: the whole of BLIP-2, captions of the bridge that ships, and photographs."""
    (scenes, below), (photographs, credited) = picture(working_copy(ROOT)), photographs_picture()
    put(below, "picture")
    put(credited, "photographs")
    for name, content in (("bridge.png", scenes), ("photographs.jpg", photographs),
                          ("blip2.png", viz.png(diagram.whole()))):
        write_beside(ROOT / "notebooks" / "figures" / name,
                     lambda partial, content=content: partial.write_bytes(content))


def rows_of(name: str) -> list[list[str]]:
    """The cells of a table between markers, without its header."""
    lines = [line for line in read(name).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def headlines(scenes: dict[str, float], photographs: dict[str, float], runs: Sequence[dict[str, float]]) -> str:
    """What the README says of all results, in a few lines: the bridge that ships, those of other seeds (`runs`),
    photographs, and the tables' ends."""
    parity = [row for row in rows_of("parity") if re.fullmatch(r"[\d.e-]+", row[2]) and "memory" not in row[0]]
    largest = max(float(row[2]) for row in parity)
    step = next(row for row in rows_of("benchmarks") if row[0].startswith("stage-1 step") and row[1] == "transformers")
    sources = layout.module()
    lines = sum(layout.code_lines(sources[name]) for name in layout.core(sources))
    lead = photographs["stage2_cider"] - photographs["stage1_cider"]
    said = [
        f"**Drawn scenes**, the bridge that ships: {scenes['stage2_things_seen']:.0f} % of captions have every colour "
        f"and shape right if training had such pairs, {scenes['stage2_things_unseen']:.0f} % if not; "
        f"another picture's caption {scenes['shuffled_things']:.0f} %.",
        "**Questions that the bridge was never trained on**, answered right: "
        + ", ".join(f"{kind} {scenes[f'ask_{kind}_own']:.0f} %" for kind in ASKED) + "; shown a wrong picture "
        + ", ".join(f"{scenes[f'ask_{kind}_another']:.0f}" for kind in ASKED)
        + f" % (validation). On the test split, the mean of {len(runs)} seeds: "
        + ", ".join(f"{fmean(run[f'ask_{kind}_own'] for run in runs):.0f}" for kind in ASKED) + " %.",
        f"**Photographs** (Flickr8k), {photographs['minutes_stage1'] + photographs['minutes_stage2']:.0f} minutes of "
        f"training without a GPU: CIDEr-D {photographs['stage2_cider']:.0f}, another picture's caption "
        f"{photographs['shuffled_cider']:.0f}. The Q-Former alone reaches {photographs['stage1_cider']:.0f}: the "
        f"language model's lead {'may be' if abs(lead) < 2 * photographs['stage2_lead_sd'] else 'is not'} chance.",
        f"**Same numbers** as transformers or plain loops: {len(rows_of('parity')) - 1} kinds of "
        f"comparison, largest difference {largest:.0e}.",
        f"**Speed**: a stage-1 step is {float(step[4]):.1f} times as fast as one of transformers' models, texts padded "
        "to 32, with equal gradients.",
        f"**Small**: the model, both stages, decoding: {lines} lines of code.",
        "**Official weights** were never loaded, nor several GPUs used, where this was written. Their names, shapes "
        "and layouts are checked."]
    return "\n".join(textwrap.fill(f"- {line}", 100, subsequent_indent="  ") for line in said)


def with_minutes(table: str, known: dict[str, guide.Lesson]) -> str:
    """The README's table of lessons with the minutes of each: reading, and its exercises."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    lessons = {re.match(r"\[(\d\d)", row[0])[1]: row[:2] for row in rows if row[0].startswith("[")}
    minutes = {number: [one.reading, sum(asked.minutes for asked in one.exercises)] for number, one in known.items()}
    both = [*map(sum, zip(*minutes.values(), strict=True))]
    return markdown(rows[0], *([*lessons[number], *each] for number, each in minutes.items()),
                    ["all", f"{sum(both) / 60:.0f} h", *both])


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
    """Write what there is to write; 2 when a page has no place for it."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        write_layout()
        put_takes()
        put(with_minutes(read("course"), guide.lessons()), "course")
        put(headlines(read_json(SHIPPED / "results-val.json"), read_json(MEASURED / "laptop.json"), *seeds().values()),
            "summary")
        write_pictures()
        results = write_results()
    except ValueError as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    print("what is where, minutes, summary; " + (f"results of {'; '.join(results)}" if results else
          "no runs/*/results-*.json, so the results stay as they are (make course makes some)"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("minblip2.course.readme", main))
