"""Does stage 1 earn its place, at equal seconds? python -m benchmarks.earns [--seeds 0]

In the ablations the captions are all true, there are thousands of them, and the image encoder was taught colours and
shapes. Each of the `SETTINGS` here takes one of these away. In each, the `ARMS` train for equally many seconds on the
frozen experts of a finished run: stage 1 and then stage 2 for half of them each, or stage 2 alone for all of them. A
third arm is not equal: stage 2 alone for half of them shows what stage 1 adds to as many steps of stage 2. What a step
of each stage takes is measured before the first run, and the steps of all runs follow from that. Seconds are the
processor's, not the clock's: others may use the machine. A run is one line of benchmarks/results/earns.jsonl; runs that
are there are not run again. `--seconds 20 40 160` trains for shorter and longer.

`--photographs FOLDER --parts FOLDER` asks the same of the recipe `laptop` with its pretrained models, and of a Q-Former
that does not start from BERT. Its lines are in benchmarks/results/earns_photographs.jsonl.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from benchmarks.ablations import Ablation, add, base, borrow, known
from minblip2.data.batches import Batch
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.files import read_json, write_json
from minblip2.data.progress import progress_bar
from minblip2.data.scene_dataset import load_scenes
from minblip2.data.scene_questions import KINDS
from minblip2.data.scenes import Scene
from minblip2.data.tokenizer import normalize_caption
from minblip2.device import autocast
from minblip2.evaluation import metrics
from minblip2.evaluation.asking import evaluate_questions
from minblip2.evaluation.measure import caption_scores
from minblip2.evaluation.scene_scores import QUESTIONS, longest_captions, scene_accuracy, write_after
from minblip2.training.bridge import Bridge
from minblip2.training.experts import TINY_VIT, ImageBatch, SceneImages
from minblip2.training.loop import TrainConfig, train
from minblip2.training.recipes import LAPTOP, SCENES, default_data
from minblip2.training.stages import prompt_and_target, stage1_losses, stage2_losses
from minblip2.vit import ViT

RESULTS = Path(__file__).parent / "results" / "earns.jsonl"
OF_PHOTOGRAPHS = RESULTS.with_name("earns_photographs.jsonl")
SECONDS, LONGER = 80.0, 600.0  # of training in each run, of scenes and of photographs
PHOTOGRAPHS = "photographs"
PACE = 60  # steps of each stage by which their seconds are measured
ASKED = 250  # validation pictures about which questions are asked
ANSWERED = ("own", "another", "guess")  # columns of what is asked that are kept
MASKED = TrainConfig(steps=1000, learning_rate=2e-3)
T = TypeVar("T")


# --- what both arms are given -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """So large a share of the training captions is `wrong`; so many `images` have captions (None: all); the image
    encoder was never given a label if it is `unlabelled`.
    """

    wrong: float = 0.0
    images: int | None = None
    unlabelled: bool = False

    def split(self, data: Path, seed: int) -> CocoCaptions:
        """The training split as both stages see it."""
        split = CocoCaptions(data, "train", limit=self.images)
        split.pairs = with_wrong_captions(split.pairs, self.wrong, seed)
        return split


def with_wrong_captions(pairs: list[tuple[int, str]], share: float, seed: int) -> list[tuple[int, str]]:
    """Pairs of (image, caption) in which this share of the captions is that of another image; a function of `seed`."""
    rng, mixed = random.Random(f"{seed} wrong captions"), list(pairs)
    for place in rng.sample(range(len(pairs)), round(share * len(pairs))):
        image, other = pairs[place][0], rng.choice(pairs)
        while other[0] == image:
            other = rng.choice(pairs)
        mixed[place] = image, other[1]
    return mixed


def once(folder: Path, training: Callable[[bool], T]) -> tuple[T, float]:
    """Train into a folder, or load what is there: what `training` gives, told whether it may go on, and the processor's
    seconds that it took. Nothing goes on halfway."""
    path = folder / "cpu.json"
    finished, began = path.exists(), time.process_time()
    trained = training(finished)
    if not finished:
        write_json(path, {"seconds": time.process_time() - began})
    return trained, read_json(path)["seconds"]


class MaskedPatches(nn.Module):
    """The tiny ViT with a linear head that paints the patches which it is not shown (arXiv 2111.09886)."""

    def __init__(self, share: float = 0.5):
        super().__init__()
        self.vit, self.share = ViT(TINY_VIT), share
        self.paint = nn.Linear(TINY_VIT.width, 3 * TINY_VIT.patch_size**2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What it paints and what was there (b v p), and which patches were masked (b v), of images (b c h w)."""
        side, grid = TINY_VIT.patch_size, TINY_VIT.grid
        masked = torch.rand(len(pixels), grid, grid) < self.share
        hidden = repeat(masked, "b gh gw -> b 1 (gh i) (gw j)", i=side, j=side)
        there = rearrange(pixels, "b c (gh i) (gw j) -> b (gh gw) (c i j)", i=side, j=side)
        return self.paint(self.vit(pixels.masked_fill(hidden, 0.0))), there, rearrange(masked, "b gh gw -> b (gh gw)")


def painting_loss(model: MaskedPatches, batch: ImageBatch) -> dict[str, Tensor]:
    """The mean squared error of the masked patches, in which all that counts is pixels: no label is read."""
    painted, there, masked = model(batch.pixels)
    return {"loss": F.mse_loss(painted.float()[masked], there[masked])}


def unlabelled_vit(folder: Path, config: TrainConfig = MASKED) -> ViT:
    """Train the tiny ViT on masked pictures, or load it from `folder`; returned frozen."""
    torch.manual_seed(config.seed)
    model, batches = MaskedPatches(), SceneImages(config.batch_size, config.seed)
    once(folder, lambda resume: train(model, painting_loss, batches, config, folder, {"vit": TINY_VIT},
                                      name="ViT from masked pictures", resume=resume))
    # The stem's batch norms have seen masked pictures only: their statistics are those of whole ones from here on.
    norms = [part for part in model.vit.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.vit.train()
    with torch.no_grad():
        for _, batch in zip(range(20), SceneImages(32, config.seed, scenes=640).iterate(), strict=False):
            model.vit(batch.pixels)
    return model.vit.requires_grad_(False).eval()


@torch.no_grad()
def readable(vit: ViT, scenes: int = 320) -> dict[str, float]:
    """How often a linear map reads colour and shape off a covered patch, in percent, on pictures not fitted to."""
    batches, found = SceneImages(scenes, 1, 2 * scenes).iterate(), {}
    (x, known), (new, truth) = ((F.pad(vit(batch.pixels), (0, 1), value=1.0).flatten(0, 1),
                                 batch.labels.flatten(0, 2).long()) for batch in (next(batches), next(batches)))
    x, known, new, truth = x[known[:, 0] >= 0], known[known[:, 0] >= 0], new[truth[:, 0] >= 0], truth[truth[:, 0] >= 0]
    for place, name in enumerate(("colour", "shape")):
        targets = x.T @ F.one_hot(known[:, place]).float()
        weights = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1]), targets)
        found[name] = 100 * float(((new @ weights).argmax(dim=1) == truth[:, place]).float().mean())
    return found


SETTINGS = {
    "plain": Setting(),
    "300 pictures with captions": Setting(images=300),
    "half of the captions wrong": Setting(wrong=0.5),
    "an encoder without labels": Setting(unlabelled=True),
}


# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """Each stage gets this share of the seconds; stage 2 starts from so much of stage 1: see `Recipe.warm_start`.

    Without `from_bert` the Q-Former starts from nothing, even where there is a BERT.
    """

    stage1: float
    stage2: float
    warm_start: float = 1.0
    from_bert: bool = True

    def steps(self, rates: tuple[float, float], seconds: float) -> tuple[int, int]:
        """Of each stage, where a step of each takes so long as `rates` says."""
        return round(self.stage1 * seconds / rates[0]), round(self.stage2 * seconds / rates[1])


BOTH, ALONE = "stage 1 and stage 2", "stage 2 alone"
HALF, AS_PAPER = "stage 2 alone, half the seconds", "stage 1 and stage 2 from all of it"
NOT_FROM_BERT = ", not from BERT"
QUARTER, THREE_QUARTERS = "stage 1 and stage 2 from a quarter of it", "stage 1 and stage 2 from three quarters of it"
ON_SCENES = {BOTH: Arm(0.5, 0.5, 0.5), ALONE: Arm(0.0, 1.0), HALF: Arm(0.0, 0.5), AS_PAPER: Arm(0.5, 0.5),
             QUARTER: Arm(0.5, 0.5, 0.25), THREE_QUARTERS: Arm(0.5, 0.5, 0.75)}
# HALF takes the steps of stage 2 that BOTH takes: what stage 1 is worth if its own seconds cost nothing.
ON_PHOTOGRAPHS = {name + start: replace(ON_SCENES[name], from_bert=not start)
                  for start in ("", NOT_FROM_BERT) for name in (AS_PAPER, ALONE)}
ARMS = ON_SCENES | ON_PHOTOGRAPHS


# --- running them -----------------------------------------------------------------------------------------------------


def train_stages(recipe: Ablation, setting: Setting, data: Path, parts: Path | None, encoder: ViT | None, cache: Path,
                 stage1: Path, stage2: Path) -> tuple[Bridge, list[float]]:
    """A bridge trained on a setting, and the processor's seconds of its stages."""
    backbones = recipe.build(recipe, data, parts, recipe.experts_of)
    bridge = Bridge(recipe, backbones if encoder is None else replace(backbones, encoder=encoder),
                    recipe.new_stage1(backbones))
    split = setting.split(data, recipe.stage1.seed)
    features = bridge.features(split, cache)
    pairs = bridge.stage1_pairs(split, [features])
    losses = partial(stage1_losses, loss_weights=recipe.loss_weights)
    spent = [once(stage1, lambda resume: train(
        bridge.stage1, losses, pairs, recipe.stage1, stage1, bridge.stage1_settings(split), "stage 1", resume,
        bridge.device))[1]]
    bridge.stage1.eval()
    bridge.init_stage2(features)
    pairs = bridge.stage2_pairs(split, [features])
    losses = partial(stage2_losses, tokenizer=backbones.lm_tokenizer, prompt=recipe.prompt)
    spent.append(once(stage2, lambda resume: train(
        bridge.stage2, losses, pairs, recipe.stage2, stage2, bridge.stage2_settings(split), "stage 2", resume,
        bridge.device))[1])
    bridge.stage2.eval()
    return bridge, spent


def with_steps(recipe: Ablation, counts: tuple[int, int], warm_start: float = 1.0) -> Ablation:
    """The same for so many steps of each stage, all in one go."""
    stages = {name: replace(getattr(recipe, name), steps=steps, checkpoint_every=10**9)
              for name, steps in zip(("stage1", "stage2"), counts, strict=True)}
    return replace(recipe, warm_start=warm_start, **stages)


def paces(recipe: Ablation, data: Path, parts: Path | None, out: Path, lines: Sequence[dict]) -> tuple[float, float]:
    """The processor's seconds of a step of each stage, for all runs to go by: those that the lines went by, or, before
    there is a line, measured and kept in `out`."""
    path = out / f"rates-{recipe.name}.json"
    if not lines and not path.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            spent = train_stages(with_steps(recipe, (PACE, PACE)), Setting(), data, parts, None, out / "cache",
                                 Path(folder) / "stage1", Path(folder) / "stage2")[1]
        write_json(path, {"rates": [seconds / PACE for seconds in spent]})
    first, second = lines[0]["rates"] if lines else read_json(path)["rates"]
    return first, second


def answers(bridge: Bridge, features: Tensor, truths: Sequence[Scene]) -> dict[str, float]:
    """Percent of the questions of `evaluate_questions` answered rightly, by kind and the mean of all kinds: of the own
    picture, of another one, and by the commonest answer of each kind."""
    asked = evaluate_questions(bridge.blip2, features, truths)
    found = {f"ask_{kind}_{column}": asked[f"ask_{kind}_{column}"] for column in ANSWERED for kind in KINDS}
    return found | {f"ask_{column}": float(np.mean([found[f"ask_{kind}_{column}"] for kind in KINDS]))
                    for column in ANSWERED}


def measure(bridge: Bridge, data: CocoCaptions, features: np.ndarray) -> dict[str, float]:
    """Percentages on validation pictures: captions, those of another picture, questions by kind, and ITC's recall."""
    truths, seen = load_scenes(data.root, data.split), torch.from_numpy(np.array(features))
    things, places = (write_after(bridge.blip2, seen, QUESTIONS[kind]) for kind in ("things", "positions"))
    unseen = [scene.unseen for scene in truths]
    found = {"things": scene_accuracy(things, truths)["things"],
             "another": scene_accuracy(things[2:] + things[:2], truths)["things"],
             "positions": float(np.nan_to_num(scene_accuracy(places, truths)["positions"]))}  # none may be stated
    for name, side in (("seen", False), ("unseen", True)):
        of_side = [row for row, is_unseen in enumerate(unseen) if is_unseen == side]
        found[f"things_{name}"] = scene_accuracy([things[row] for row in of_side],
                                                 [truths[row] for row in of_side])["things"]
    found |= answers(bridge, seen[:ASKED], truths[:ASKED])
    chosen, own = longest_captions(data, 200)
    cosine = bridge.retriever.similarity(seen[own], chosen)
    return found | {"itc_t2i_r1": metrics.retrieval(cosine, torch.arange(len(own)))["t2i_r1"]}


@torch.no_grad()
def word_loss(bridge: Bridge, image: Tensor, captions: list[str]) -> float:
    """Nats that the language model pays for a piece of a word, given features (b v e) and a caption for each."""
    tokenizer, recipe, total, count = bridge.backbones.lm_tokenizer, bridge.recipe, 0.0, 0
    ids, mask = tokenizer.pad([tokenizer.encode(normalize_caption(text), recipe.prompt, recipe.max_length)
                               for text in captions])
    for rows in torch.arange(len(image)).split(50):
        batch = Batch(image[rows].float(), ids[rows], mask[rows], rows).to(bridge.device)
        with autocast(bridge.device):
            out = bridge.stage2(batch.image_features, *prompt_and_target(batch, tokenizer, recipe.prompt))
        total, count = total + float(out.loss) * len(out.word_logits), count + len(out.word_logits)
    return total / count


def measure_photographs(bridge: Bridge, data: CocoCaptions, features: np.memmap) -> dict[str, float]:
    """Recall by ITC in percent, CIDEr-D x100 of greedy captions and of those of another picture, and the loss of a
    caption beside its own picture and beside another one."""
    image = torch.from_numpy(np.array(features))
    rows, captions = zip(*data.pairs, strict=True)
    recall = metrics.retrieval(bridge.retriever.similarity(image, captions), torch.tensor(rows))
    references, first = [record.captions for record in data.images], [record.captions[0] for record in data.images]
    written = {"stage1": bridge.retriever.caption(image, beams=1),
               "stage2": bridge.blip2.caption(image, beams=1, batch_size=50)}
    return {f"itc_{key}": value for key, value in recall.items()} | {
        f"{stage}_cider": caption_scores(texts, references)["cider"] for stage, texts in written.items()} | {
        "shuffled_cider": caption_scores(written["stage2"][1:] + written["stage2"][:1], references)["cider"],
        "stage2_loss": word_loss(bridge, image, first), "shuffled_loss": word_loss(bridge, image.roll(1, 0), first)}


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub("[^a-z0-9]+", "-", name.lower())


def run(names: tuple[str, str], seed: int, start: Ablation, data: Path, parts: Path | None, out: Path, seconds: float,
        rates: tuple[float, float]) -> dict:
    """Train and measure one arm in one setting: the line to keep. Arms with a stage 1 in common share it."""
    on_photographs = names[0] == PHOTOGRAPHS
    setting, arm = Setting() if on_photographs else SETTINGS[names[0]], ARMS[names[1]]
    counts = arm.steps(rates, seconds)
    encoder = unlabelled_vit(out / "vit-without-labels") if setting.unlabelled else None
    recipe = replace(with_steps(start, counts, arm.warm_start), from_bert=arm.from_bert).with_seed(seed)
    place = f"{slug(names[0])}-{seed}" + "-not-from-bert" * (not arm.from_bert)
    bridge, spent = train_stages(recipe, setting, data, parts, encoder, out / "cache",
                                 out / f"{place}-stage1-{counts[0]}",
                                 out / f"{place}-{slug(names[1])}-{counts[1]}")
    val = CocoCaptions(data, "val")
    found = (measure_photographs if on_photographs else measure)(bridge, val, bridge.features(val, out / "cache"))
    line = {"setting": names[0], "arm": names[1], "seed": seed, "seconds": seconds,
            "rates": [round(rate, 5) for rate in rates],
            "steps": list(counts), "cpu_seconds": [round(value, 1) for value in spent]}
    if encoder is not None:
        line["encoder_seconds"] = round(read_json(out / "vit-without-labels" / "cpu.json")["seconds"], 1)
    if not on_photographs:
        line["readable"] = {name: round(value, 1) for name, value in readable(bridge.backbones.encoder).items()}
    return line | {"torch": torch.__version__, "machine": platform.machine(),
                   "results": {key: round(value, 2) for key, value in found.items()}}


def key(line: dict) -> tuple[str, str, int, float]:
    """Which run a line is of."""
    return line["setting"], line["arm"], line["seed"], line["seconds"]


def differences(lines: Sequence[dict], measure: str, arm: str = BOTH, other: str = ALONE, seconds: float = SECONDS
                ) -> dict[str, list[float]]:
    """What an arm has more than another of a measure, within each seed that both have, by setting."""
    values = {key(line): line["results"][measure] for line in lines}
    pairs = {setting: [(values[setting, arm, seed, seconds], values[setting, other, seed, seconds])
                       for seed in sorted({line["seed"] for line in lines})
                       if {(setting, arm, seed, seconds), (setting, other, seed, seconds)} <= set(values)]
             for setting in (*SETTINGS, PHOTOGRAPHS)}
    return {setting: [one - two for one, two in some] for setting, some in pairs.items() if some}


def spent(lines: Sequence[dict], arm: str, seconds: float = SECONDS) -> list[float]:
    """Seconds of processor time that an arm took in each of the `SETTINGS`, on average over its seeds."""
    return [fmean(sum(line["cpu_seconds"]) for line in lines
                  if (line["setting"], line["arm"], line["seconds"]) == (setting, arm, seconds))
            for setting in SETTINGS]


def by_seconds(lines: Sequence[dict], measure: str, arm: str, setting: str = "plain") -> dict[float, list[float]]:
    """A measure of an arm in a setting for each length of training, shortest first: the values of its seeds."""
    some = sorted((line["seconds"], line["seed"], line["results"][measure]) for line in lines
                  if (line["setting"], line["arm"]) == (setting, arm))
    return {seconds: [value for length, _, value in some if length == seconds] for seconds, *_ in some}


def main() -> None:
    """Run what is missing: all of one seed before the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="(default: all but those that differ by BERT, "
                        "which scenes do not have; on photographs four)")
    parser.add_argument("--seconds", type=float, nargs="+", help="of training, one or several "
                        f"(default: {SECONDS:.0f}; {LONGER:.0f} on photographs)")
    parser.add_argument("--experts-of", type=Path, default=Path("runs/scenes"), help="a finished run of the scenes; "
                        "with --photographs, of the laptop recipe, or where to keep its features")
    parser.add_argument("--data", type=Path, help="the drawn scenes (default: those beside that run)")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="photographs in COCO layout, not scenes")
    parser.add_argument("--parts", type=Path, help="with --photographs: the folder of the recipe's models")
    parser.add_argument("--results", type=Path, help="the lines (default: those of the repository)")
    options = parser.parse_args()
    if options.photographs:
        start, data = Ablation(**vars(LAPTOP), experts_of=options.experts_of), options.photographs
        settings, arms, length, results = [PHOTOGRAPHS], ON_PHOTOGRAPHS, LONGER, OF_PHOTOGRAPHS
    else:
        start, data = base(1, options.experts_of), default_data(SCENES, options.experts_of, options.data)
        settings, arms, length, results = options.settings, ON_SCENES, SECONDS, RESULTS
    out, results = options.experts_of.parent / "earns", options.results or results
    borrow(out, {"cache": options.experts_of / "cache"})
    lines = known(results)
    done, rates = {key(line) for line in lines}, paces(start, data, options.parts, out, lines)
    runs = [(setting, arm, seed, seconds) for seed in options.seeds for seconds in options.seconds or [length]
            for setting in settings for arm in options.arms or arms]
    with progress_bar(runs, desc="earns", unit="run") as bar:
        for one in bar:
            setting, arm, seed, seconds = one
            bar.set_postfix_str(f"{setting}, {arm}, seed {seed}, {seconds:.0f} seconds")
            if one not in done:
                add(results, run((setting, arm), seed, start, data, options.parts, out, seconds, rates))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.earns", main))
