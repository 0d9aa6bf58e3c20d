"""How far back must the readers of the first block look? python -m benchmarks.binding [--look-back 4 5] [--seeds 0]

Trains the language model of the scenes with so many readers (0: none) under each seed, tells it in captions of scenes
that are drawn for this alone, and asks. Each model is a line of benchmarks/results/binding.jsonl, percentages by kind
of question; relations left and right, above and below are told apart. Lines that are there are not made again;
finished models under runs/binding are not trained again.
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
    scenes = [scene for _, _, scene in draw_scenes(options.scenes, "binding")]
    for look_back in options.look_back:
        for seed in options.seeds:
            if any((one["look_back"], one["seed"]) == (look_back, seed) for one in known(options.results)):
                continue
            config = replace(SCENES.experts["lm"], seed=seed, steps=options.steps)
            lm, tokenizer = experts.train_lm(options.out / f"back{look_back}-seed{seed}", config, look_back=look_back)
            add(options.results, {"look_back": look_back, "seed": seed, "steps": config.steps, "commit": commit(),
                                  "machine": machine(), "told": told(lm.cpu(), tokenizer, scenes)})
    lines = known(options.results)
    print(markdown(["looks back", "seed", *lines[0]["told"]],
                   *([str(one["look_back"]), str(one["seed"]), *(f"{value:.1f}" for value in one["told"].values())]
                     for one in lines)))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.binding", main))
