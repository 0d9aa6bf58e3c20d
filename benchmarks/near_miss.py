"""Does matching judge captions better if it was trained on near misses? python -m benchmarks.near_miss [RUN]

RUN is a finished run of the scenes recipe. Its stage 1 is trained once more, from the same experts, for as many steps
and under the same seed, but the wrong text of each triple of ITM is the true caption with two colours changed places or
one colour or shape replaced (`near_miss`). Then both stage 1 choose among ten captions that RUN's stage 2 wrote, as in
lesson 11, and among ten that it drew at a high temperature, with many mistakes. Each stage 1 is a line of
benchmarks/results/near_miss.jsonl; so is that of each run in --judges, which judges the same captions. RUN of the lines
that are kept had 1,500 steps of stage 1, fewer than the recipe has now.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablations import Ablation, add, borrow, build, known
from benchmarks.earns import once
from minblip2.course.decoding import judged_pairs
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.files import read_json
from minblip2.data.scene_captions import judge, parse, phrase, swap_colours
from minblip2.data.scene_dataset import load_scenes
from minblip2.data.scenes import COLOURS, HELD_OUT, SHAPES
from minblip2.data.tokenizer import Tokenizer
from minblip2.evaluation.retrieval import evaluate_retrieval
from minblip2.evaluation.scene_scores import QUESTIONS, foil_accuracy, longest_captions, write_after
from minblip2.qformer import ImageKV
from minblip2.stage1 import Stage1
from minblip2.training.bridge import Bridge, load_bridge, train_bridge
from minblip2.training.loop import read_log
from minblip2.training.recipes import SCENES, default_data
from minblip2.training.texts import text_tokenizer

RESULTS = Path(__file__).parent / "results" / "near_miss.jsonl"
WORDS = {word: tuple(kind) for kind in (COLOURS, SHAPES) for word in kind}  # each with all of its kind
PAIR = re.compile(rf"\ban? (small |large )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
TEN = 10  # captions of each picture
OTHERS, NEAR = "other pictures' texts", "near misses"  # what ITM's wrong texts are
WILD = 2.0  # the temperature at which there are many mistakes


def near_miss(caption: str, rng: random.Random) -> str | None:
    """A true caption made false by one change: two colours change places, or one colour or shape is another.

    Where that can be avoided, no held-out pair comes about and none twice: the words alone must not give it away. None
    for a caption that names no thing.
    """
    if rng.random() < 0.5 and (foil := swap_colours(caption)) is not None:
        return foil
    named = parse(caption).things
    changes = []
    for found in PAIR.finditer(caption):
        for place in (2, 3):
            for word in WORDS[found[place]]:
                pair = (word, found[3]) if place == 2 else (found[2], word)
                if word != found[place] and pair not in named:
                    changes.append((pair in HELD_OUT, found, pair))
    if not changes:
        return None
    _, found, (colour, shape) = rng.choice([change for change in changes if not change[0]] or changes)
    size = found[1] or ""
    thing = f"a {size}{colour} {shape}" if size else phrase(colour, shape)
    return caption[:found.start()] + thing + caption[found.end():]


@cache
def tokenizer() -> Tokenizer:
    """Text to ids, as the recipe's stage 1 reads."""
    return text_tokenizer()


class NearMisses(Stage1):
    """Matching's wrong text is the true one with one change; its wrong images are drawn as ever."""

    def itm_triples(self, image_kv: ImageKV, text_ids: Tensor, text_mask: Tensor,
                    negatives: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As in `Stage1`: a change keeps the number of words, so near misses have the true texts' mask."""
        rng = random.Random(int(torch.randint(2**31, (1,))))
        wrong = text_ids.clone()
        for row, ids in zip(wrong, text_ids.tolist(), strict=True):
            foil = tokenizer().encode(near_miss(tokenizer().decode(ids), rng))
            row[:len(foil)] = torch.tensor(foil)
        b = len(text_ids)
        return super().itm_triples(image_kv, torch.cat([text_ids, wrong]), torch.cat([text_mask, text_mask]),
                                   (negatives[0], torch.arange(b, 2 * b)))


def ten_captions(bridge: Bridge, features: Tensor, temperature: float | None = None) -> list[list[str]]:
    """Ten lists with a caption of each picture: the first is greedy and the others drawn, or, at a `temperature`, all
    are drawn."""
    generator, prompt = torch.Generator().manual_seed(0), QUESTIONS["things"]
    greedy = [] if temperature else [write_after(bridge.blip2, features, prompt)]
    drawn = [bridge.blip2.caption(features, prompt, batch_size=len(features), top_p=1.0, temperature=temperature,
                                  generator=generator) for _ in range(TEN - len(greedy))]
    return [*greedy, *([f"{prompt} {text}" for text in some] for some in drawn)]


@torch.no_grad()
def judged(bridge: Bridge, ten: list[list[str]], data: CocoCaptions, features: Tensor) -> dict[str, float]:
    """How well this bridge's ITM chooses among the captions of each picture, beside the first and the most frequent of
    them and a perfect judge; and how often it prefers a right caption to a wrong one of the picture. Percent."""
    truths = load_scenes(data.root, data.split)
    texts = sorted({text for some in ten for text in some})
    which = torch.tensor([[texts.index(text) for text in some] for some in zip(*ten, strict=True)])
    fine = torch.tensor([[judge(texts[i], truth)["things"] for i in row]
                         for row, truth in zip(which.tolist(), truths, strict=True)])
    rows = torch.arange(len(features))
    logits = bridge.retriever.pair_logits(features, texts, rows.repeat_interleave(len(ten)), which.flatten())
    scores = {"frequent": (which[:, :, None] == which[:, None]).sum(dim=2),
              "itm": (logits[:, 1] - logits[:, 0]).reshape(which.shape)}
    picked = {name: fine.gather(1, some.argmax(dim=1, keepdim=True))[:, 0] for name, some in scores.items()}
    first, itm = fine[:, 0], picked["itm"]
    found = {name: 100 * float(right.float().mean())
             for name, right in {"first": first, **picked, "any": fine.any(dim=1)}.items()}
    found |= {"mended": int((itm & ~first).sum()), "spoiled": int((first & ~itm).sum())}
    for name, pairs in zip(("bound_wrongly", "not_there"), judged_pairs(ten, truths, scores["itm"]).values(),
                           strict=True):
        found |= {name: 100 * sum(pairs) / max(1, len(pairs)), f"{name}_pairs": len(pairs)}
    return found


def measure(bridge: Bridge, ten: list[list[str]], wild: list[list[str]], data: CocoCaptions, features: Tensor
            ) -> dict[str, float]:
    """This stage 1 as a judge of both kinds of captions, of truth and swapped colours, and in retrieval."""
    chosen, own = longest_captions(data, 200)
    recall = evaluate_retrieval(bridge.retriever, features[own], chosen, list(range(len(chosen))))
    return judged(bridge, ten, data, features) | {
        f"wild_{name}": value for name, value in judged(bridge, wild, data, features).items()} | {
        "binding": foil_accuracy(bridge.retriever, features, data, swap_colours)} | {
        name: recall[name] for name in ("itc_t2i_r1", "itm_t2i_r1", "itm_i2t_r1")}


def pictures(bridge: Bridge, split: CocoCaptions, run: Path) -> Tensor:
    """Image features (n v e) of a split, kept in the run's cache."""
    return torch.from_numpy(bridge.features(split, run / "cache").copy()).float()


def steps_of(run: Path) -> int:
    """How many steps a finished run's stage 1 took."""
    return read_log(run / "stage1" / "log.jsonl")[-1]["step"]


def on_near_misses(run: Path, data: Path, seed: int) -> tuple[Bridge, float]:
    """The recipe's stage 1 on the experts of `run`, trained on near misses, and the processor's seconds it took."""
    recipe = replace(SCENES, stage1=replace(SCENES.stage1, steps=steps_of(run))).with_seed(seed)
    recipe = Ablation(**vars(recipe), experts_of=run, model=NearMisses)
    out = run.parent / f"near-misses-{seed}"
    borrow(out, {"cache": run / "cache"})
    trained, spent = once(out, lambda resume: train_bridge(replace(recipe, build=build), data, None, out, resume,
                                                           stages=1))
    return trained, round(spent, 1)


def main() -> None:
    """Write the lines that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--data", type=Path, help="the drawn scenes (default: those beside the run)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines (default: those of the repository)")
    parser.add_argument("--judges", type=Path, nargs="*", default=[], help="other finished runs of the scenes")
    options = parser.parse_args()
    load = cache(load_bridge)
    bridge, data = load(options.run), default_data(SCENES, options.run, options.data)
    val = CocoCaptions(data, "val")
    done = {(line["name"], line["seed"], line["steps"]) for line in known(options.results)}
    features = pictures(bridge, val, options.run)
    ten, wild = ten_captions(bridge, features), ten_captions(bridge, features, WILD)

    def record(name: str, run: Path, seed: int, judging: Callable[[], tuple[Bridge, float | None]]) -> None:
        """The line of one stage 1, unless it is there, on the features of the experts of `run`."""
        if (name, seed, steps := steps_of(run)) not in done:
            trained, spent = judging()
            found = measure(trained, ten, wild, val, pictures(trained, val, run))
            add(options.results, {"name": name, "seed": seed, "steps": steps, "cpu_seconds": spent, "images": len(val),
                                  "results": {key: round(value, 2) for key, value in found.items()}})

    for run in (options.run, *options.judges):
        record(OTHERS, run, read_json(run / "run.json")["seed"], lambda run=run: (load(run), None))
    for seed in options.seeds:
        record(NEAR, options.run, seed, partial(on_near_misses, options.run, data, seed))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.near_miss", main))
