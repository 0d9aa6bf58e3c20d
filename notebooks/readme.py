"""The results table and the picture, from what runs left behind: python notebooks/readme.py puts them into README.md.

Every runs/NAME/results-SPLIT.json is a column; NAME-seed1, NAME-seed2, ... are further seeds of NAME and share its
column, as mean ± standard deviation. A run that is not here, but whose figures are kept in benchmarks/results/NAME.json
(`python -m benchmarks.provenance runs/NAME`), is a column, too, and where those are from is told below the table.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minblip2.data.files import read_json, write_beside
from minblip2.evaluation.measure import LABELS
from minblip2.training.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
UNDER_PICTURE = "<!-- picture -->", "<!-- /picture -->"


def columns(runs: Path, names: str = r".*") -> dict[str, list[dict[str, float]]]:
    """Column title -> the results of its seeds, of the runs whose names match in full."""
    found = defaultdict(list)
    for path in sorted(runs.glob("*/results-*.json")):
        name = re.sub(r"-seed\d+$", "", path.parent.name)
        if re.fullmatch(names, name):
            found[f"{name}, {path.stem.removeprefix('results-')}"].append(read_json(path))
    return {f"{title} ({len(seeds)} seeds)" if len(seeds) > 1 else title: seeds for title, seeds in found.items()}


def kept(results: Path = ROOT / "benchmarks" / "results", names: tuple[str, ...] = tuple(RECIPES)
         ) -> dict[str, dict[str, Any]]:
    """Recipe -> its figures with their provenance, of those that are kept with the code."""
    return {name: read_json(results / f"{name}.json") for name in names if (results / f"{name}.json").exists()}


def provenance(results: dict[str, dict[str, Any]]) -> str:
    """Where kept figures are from, a sentence for each recipe."""
    return "\n".join(f"*{name}: {output['data']}; {output['minutes_stage1']:.0f} minutes of stage 1 and "
                     f"{output['minutes_stage2']:.0f} of stage 2 on {output['machine']}; commit {output['commit']}.*"
                     for name, output in results.items())


def cell(values: list[float]) -> str:
    """One figure, or mean ± standard deviation of several."""
    if not values:
        return ""
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:  # a count
        return str(values[0])
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The columns side by side, in Markdown, padded so that it can be read as it is."""
    lines = [["", *found]]
    for key, label in LABELS.items():
        cells = [cell([seed[key] for seed in seeds if key in seed]) for seeds in found.values()]
        if any(cells):
            lines.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join("| " + " | ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in
                     zip(line[1:], widths[1:], strict=True))]) + " |" for line in lines)


def fill(text: str, content: str, begin: str = BEGIN, end: str = END, file: str = "README.md") -> str:
    """The text with `content` between the markers. Raises ValueError unless each marker is there once, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{file} needs {begin} and, below it, {end}, each once: put them where that belongs")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def put(content: str, begin: str = BEGIN, end: str = END, file: Path = ROOT / "README.md") -> None:
    """Put `content` into a Markdown file between the markers. Raises ValueError as `fill`."""
    filled = fill(file.read_text(encoding="utf-8"), content, begin, end, file.name)
    write_beside(file, lambda partial: partial.write_text(filled, encoding="utf-8"))


def under_picture(right: Sequence[bool], prompt: str) -> str:
    """What stands below the picture: how many of its captions name every thing of their scene, and nothing else."""
    return (f'*The first {len(right)} scenes of the validation split, not chosen, captioned after the prompt '
            f'"{prompt}":\n{sum(right)} of the {len(right)} captions are right in every colour and shape. How good '
            "they are on the whole, and what\nfails, is under [Results](#results).*")


def picture(run: Path, count: int = 8) -> tuple[bytes, str]:
    """The first pictures of the validation split as PNG, captioned by a trained bridge; and what to write below it."""
    from minblip2.course import figures, viz
    from minblip2.data.coco import CocoCaptions
    from minblip2.data.pictures import load_image
    from minblip2.data.scene_captions import judge
    from minblip2.data.scene_dataset import load_scenes
    from minblip2.evaluation.scene_scores import QUESTIONS, ask
    from minblip2.training.bridge import load_bridge

    bridge, data = load_bridge(run), read_json(run / "run.json")["data"]
    images = [load_image(record.path) for record in CocoCaptions(data, "val", limit=count).images]
    prompt = QUESTIONS["things"]
    captions = ask(bridge, bridge.encode_images(images), prompt)
    truths = load_scenes(data, "val")[:count]
    right = [bool(judge(caption, truth)["things"]) for caption, truth in zip(captions, truths, strict=True)]
    return viz.png(figures.caption_sheet(images, [[caption] for caption in captions])), under_picture(right, prompt)


def main() -> int:
    """Write the table into README.md and the picture; 2 when there is nothing to write or nowhere to write it."""
    found, output = columns(ROOT / "runs"), kept()
    try:
        if not found:
            raise ValueError("no runs/*/results-*.json: run make course first")
        found = {f"{name}, val": [figures] for name, figures in output.items() if f"{name}, val" not in found} | found
        recipes = sorted({name.split(",")[0] for name in found}, key=lambda name: (name != "scenes", name))
        tables = [table({name: some for name, some in sorted(found.items()) if name.split(",")[0] == recipe})
                  for recipe in recipes]  # one for each: what is measured on drawings is not what is on photographs
        put("\n\n".join([*tables, *([provenance(output)] if output else [])]))
        if (ROOT / "runs" / "scenes" / "stage2" / "model.safetensors").exists():
            figure = ROOT / "notebooks" / "figures" / "bridge.png"
            figure.parent.mkdir(exist_ok=True)
            drawn, sentence = picture(ROOT / "runs" / "scenes")
            put(sentence, *UNDER_PICTURE)
            write_beside(figure, lambda partial: partial.write_bytes(drawn))
    except ValueError as error:
        print(f"readme.py: {error}", file=sys.stderr)
        return 2
    print(f"README.md: results of {'; '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
