"""What does it take to bind? python -m benchmarks.binding [--look-back 0 5] [--steps 3000] [--seeds 0]

Trains the language model of the scenes with so many readers of its first block (0: none), for so many steps, under each
seed, tells it in captions of scenes that are drawn for this alone, and asks. Each model is a line of
benchmarks/results/binding.jsonl, percentages by kind of question; relations left and right, above and below are told
apart. Lines that are there are not made again; finished models under runs/binding are not trained again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.ablations import add, known
from benchmarks.provenance import commit, machine
from minblip2.course import language
from minblip2.data.entry import run_command
from minblip2.data.scene_captions import write_caption
from minblip2.data.scene_questions import ask_all, one_of_each
from minblip2.data.scenes import Scene, draw_scenes
from minblip2.data.tokenizer import Tokenizer
from minblip2.evaluation.asking import TELLING
from minblip2.evaluation.tables import markdown
from minblip2.lm.opt import OPT
from minblip2.training import experts
from minblip2.training.binding import LOOK_BACK
from minblip2.training.recipes import SCENES

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


def main() -> None:
    """Write the lines that are missing, and print them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--look-back", type=int, nargs="+", default=[LOOK_BACK])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=SCENES.experts["lm"].steps)
    parser.add_argument("--out", type=Path, default=Path("runs/binding"), help="where the models are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines (default: those of the repository)")
    options = parser.parse_args()
    recipe, scenes = SCENES.experts["lm"], [scene for _, _, scene in draw_scenes(options.scenes, "binding")]
    hold = max(0, recipe.hold + options.steps - recipe.steps)  # the rate falls over as many steps at the end
    for look_back in options.look_back:
        for seed in options.seeds:
            one = {"look_back": look_back, "seed": seed, "steps": options.steps}
            if any(line | one == line for line in known(options.results)):
                continue
            lm, tokenizer = experts.train_lm(options.out / "-".join(f"{name}{value}" for name, value in one.items()),
                                             replace(recipe, seed=seed, steps=options.steps, hold=hold),
                                             look_back=look_back)
            add(options.results, one | {"commit": commit(), "machine": machine(),
                                        "told": told(lm.cpu(), tokenizer, scenes)})
    lines = known(options.results)
    print(markdown(["readers", "steps", "seed", *lines[0]["told"]],
                   *([*(str(one[name]) for name in ("look_back", "steps", "seed")),
                      *(f"{value:.1f}" for value in one["told"].values())] for one in lines)))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.binding", main))
