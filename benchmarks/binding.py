"""What does it take to bind? python -m benchmarks.binding [--look-back 0 5] [--steps 3000] [--seeds 0]

Trains the language model of the scenes with so many readers of its first block (0: none), for so many steps, under each
seed, tells it in captions of scenes that are drawn for this alone, and asks. Each model is a line of
benchmarks/results/binding.jsonl, percentages by kind of question; relations left and right, above and below are told
apart. `--through RUN` also trains a stage 2 on each model, from the image encoder and stage 1 of a finished run, and
asks about validation pictures. Lines that are there are not made again, nor models under runs/binding trained again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.ablations import add, borrow, known
from benchmarks.provenance import commit, machine
from minblip2.course import language
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.scene_captions import write_caption
from minblip2.data.scene_dataset import load_scenes
from minblip2.data.scene_questions import KINDS, ask_all, one_of_each
from minblip2.data.scenes import Scene, draw_scenes
from minblip2.data.tokenizer import Tokenizer
from minblip2.evaluation.asking import TELLING, evaluate_questions
from minblip2.evaluation.tables import markdown
from minblip2.lm.opt import OPT
from minblip2.training import experts
from minblip2.training.binding import LOOK_BACK
from minblip2.training.bridge import train_bridge
from minblip2.training.recipes import SCENES, build_scenes
from minblip2.training.records import read_record

RESULTS = Path(__file__).parent / "results" / "binding.jsonl"
SIDES = {"left, right": ("left of", "right of"), "above, below": ("above", "below")}


def ask(scene: Scene, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Kind, question and answer: one question of each kind, and all relations under the name of their direction."""
    for question in one_of_each(scene, rng):
        if question.kind != "relation":
            yield question.kind, question.text, question.answer
    for question in ask_all(scene, rng):
        for side, words in SIDES.items():
            if any(f" {word} the " in question.text for word in words):
                yield side, question.text, question.answer


def told(lm: OPT, tokenizer: Tokenizer, scenes: Sequence[Scene], seed: int = 0) -> dict[str, float]:
    """Percent of questions that the model answers rightly once captions have told it all of a scene, by kind."""
    rng, asked = random.Random(seed), []
    for scene in scenes:
        story = language.row_of(tokenizer, [write_caption(scene, kind, rng) for kind in TELLING])
        asked += [(kind, [*story, *tokenizer.token_ids(f"question {question} answer")], answer)
                  for kind, question, answer in ask(scene, rng)]
    right: dict[str, list[bool]] = {}
    for start in range(0, len(asked), 200):
        some = asked[start:start + 200]
        said = language.written(lm, tokenizer, [context for _, context, _ in some])
        for (kind, _, answer), text in zip(some, said, strict=True):
            right.setdefault(kind, []).append(text == answer)
    return {kind: round(100 * sum(some) / len(some), 1) for kind, some in right.items()}


def asked(lm: OPT, run: Path, out: Path) -> dict[str, float]:
    """Percent of the questions about validation pictures that it answers rightly through a bridge, by kind."""
    record = read_record(run)
    borrow(out, {part: run / part for part in ("vit", "lm", "stage1", "cache")})
    recipe = replace(record.recipe, build=lambda *settings: replace(build_scenes(*settings), lm=lm))
    bridge, val = train_bridge(recipe, record.data, None, out), CocoCaptions(record.data, "val")
    features = torch.from_numpy(np.array(bridge.features(val, out / "cache")))
    found = evaluate_questions(bridge.blip2, features, load_scenes(record.data, "val"))
    return {kind: round(found[f"ask_{kind}_own"], 1) for kind in KINDS}


def main() -> None:
    """Write the lines that are missing, and print them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--look-back", type=int, nargs="+", default=[LOOK_BACK])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--through", type=Path, metavar="RUN", help="a finished run of the scenes; its seed alone")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=SCENES.experts["lm"].steps)
    parser.add_argument("--out", type=Path, default=Path("runs/binding"), help="where the models are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines (default: those of the repository)")
    options = parser.parse_args()
    recipe, scenes = SCENES.experts["lm"], [scene for _, _, scene in draw_scenes(options.scenes, "binding")]
    hold = max(0, recipe.hold + options.steps - recipe.steps)  # the rate falls over as many steps at the end
    seeds = [read_record(options.through).recipe.stage2.seed] if options.through else options.seeds
    for look_back in options.look_back:
        for seed in seeds:
            one = {"look_back": look_back, "seed": seed, "steps": options.steps}
            if any(line | one == line and ("asked" in line or not options.through) for line in known(options.results)):
                continue
            folder = options.out / f"readers{look_back}-seed{seed}-steps{options.steps}"
            config = replace(recipe, seed=seed, steps=options.steps, hold=hold)
            lm, tokenizer = experts.train_lm(folder, config, look_back=look_back)
            line = one | {"commit": commit(), "machine": machine(), "told": told(lm.cpu(), tokenizer, scenes)}
            if options.through:
                line["asked"] = asked(lm, options.through, folder.with_name(f"{folder.name}-bridge"))
            add(options.results, line)
    lines = known(options.results)
    print(markdown(["readers", "steps", "seed", *lines[0]["told"]],
                   *([*(str(one[name]) for name in ("look_back", "steps", "seed")),
                      *(f"{value:.1f}" for value in one["told"].values())] for one in lines)))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.binding", main))
