"""What each part of BLIP-2 is worth, at the size of the scenes: python -m benchmarks.ablations [GROUP ...] [--seeds 0]

Each run changes one thing in the `base`, which is the scenes recipe with fewer steps, on the frozen experts of a
finished run. A run is one line of benchmarks/results/ablations.jsonl: what was changed, under which seed, how long it
took, and what is measured on the validation split. Runs that are there are not run again, and one that was killed goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minblip2 import UserError
from minblip2.attention import FeedForward
from minblip2.course.qformer_lab import separate
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.files import read_json
from minblip2.data.progress import progress_bar
from minblip2.data.scene_dataset import load_scenes
from minblip2.evaluation.scene_scores import evaluate_scenes
from minblip2.qformer import QFormerConfig, QFormerOutput
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2
from minblip2.training.bridge import Bridge, train_bridge
from minblip2.training.recipes import SCENES, Backbones, Recipe, build_scenes
from minblip2.training.records import recorded_data

RESULTS = Path(__file__).parent / "results" / "ablations.jsonl"
# The base on the machine, and with the experts, of the lines of 4, 8 and 32 queries.
AGAIN = RESULTS.with_name("again.jsonl")
# One change on the frozen models that ship, as lesson 14, section 7, makes it; all other lines are of older ones.
ON_SHIPPED = RESULTS.with_name("on_shipped.jsonl")
STEPS = 600  # of each stage, unless a run says otherwise
KEPT = re.compile(r"it[cm]_(i2t|t2i)_r1|stage\d_(things(_seen|_unseen)?|positions|background)|shuffled_things"
                  r"|pointing|binding")


# --- what may be changed ----------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """In a Q-Former's place: every visual token goes to the language model, as it is or by way of an MLP.

    It has the Q-Former's names, so that `Stage2` takes it; what it calls queries are the visual tokens (b v e). The
    MLP has about as many `parameters` as told; with 0 there is none.
    """

    def __init__(self, config: QFormerConfig, parameters: int = 0):
        super().__init__()
        self.config = replace(config, width=config.image_width, num_queries=0)
        hidden = parameters // (2 * config.image_width + 1)  # two matrices and a bias for each hidden channel
        self.mlp = FeedForward(config.image_width, hidden) if hidden else nn.Identity()

    def query_branch(self) -> Patches:
        """There is no text branch to leave behind."""
        return self

    def project_image(self, image_features: Tensor) -> Tensor:
        """Normalised image features (b v e), as they are."""
        return image_features

    def forward(self, image_features: Tensor) -> QFormerOutput:
        """Visual tokens (b v e) for the language model, and no text."""
        return QFormerOutput(self.mlp(image_features), image_features[:, :0])


class RandomNegatives(Stage1):
    """Matching's wrong images and texts are any others of the batch, not the most similar ones."""

    def sample_negatives(self, itc_logits: Tensor, same_image: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Stage1`, from equal chances."""
        return super().sample_negatives(torch.zeros_like(itc_logits), same_image)


class SeparateSelfAttention(Stage1):
    """A second, fresh self-attention for the text in every block (lesson 05, section 7)."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        separate(self)


@dataclass(frozen=True)
class Ablation(Recipe):
    """A recipe with one change. It takes its experts and cached features from the run in `experts_of`.

    `model` is what stage 1 trains; `from_bert` starts it from BERT where there is one; `patches` puts visual tokens in
    the queries' place, "linear" straight to the projection, "mlp" by way of an MLP of as many parameters as the
    Q-Former; `frozen` lets stage 2 train the projection only.
    """

    experts_of: Path = Path("runs/scenes")
    model: type[Stage1] = Stage1
    from_bert: bool = True
    patches: str | None = None
    frozen: bool = False

    def new_stage1(self, backbones: Backbones, kind: type[Stage1] | None = None) -> Stage1:
        """As in `Recipe`, of this kind of model."""
        return super().new_stage1(backbones if self.from_bert else replace(backbones, bert=None), kind or self.model)

    def new_stage2(self, backbones: Backbones, stage1: Stage1) -> Stage2:
        """As in `Recipe`, with this kind of bridge."""
        if self.patches is None:
            stage2 = super().new_stage2(backbones, stage1)
        else:
            torch.manual_seed(self.stage2.seed)
            hidden = size(stage1.qformer.query_branch()) if self.patches == "mlp" else 0
            stage2 = Stage2(stage1.vision_norm, Patches(backbones.qformer, hidden), backbones.lm,
                            len(backbones.lm_tokenizer))
        if self.frozen:
            for part in (stage2.vision_norm, stage2.qformer):
                part.requires_grad_(False)
        return stage2


def size(*modules: nn.Module) -> int:
    """How many parameters these have."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def build(recipe: Ablation, data: Path, parts: Path | None, out: Path, resume: bool = True) -> Backbones:
    """The experts of another run, under its own seed, whatever this one's is."""
    experts = SCENES.with_seed(read_json(recipe.experts_of / "run.json")["seed"]).experts
    return build_scenes(replace(recipe, experts=experts), data, parts, recipe.experts_of)


Change = Callable[[Ablation], Ablation]


def steps(first: float = 1.0, second: float = 1.0) -> Change:
    """So many times the steps of each stage."""
    return lambda base: replace(base, stage1=replace(base.stage1, steps=round(first * base.stage1.steps)),
                                stage2=replace(base.stage2, steps=round(second * base.stage2.steps)))


def having(first: float = 1.0, **changes) -> Change:
    """Other settings of `Ablation`, and so many times the steps of stage 1."""
    return lambda base: replace(steps(first)(base), **changes)


def sizes(**changes: int) -> Change:
    """Another Q-Former."""
    return lambda base: replace(base, qformer=base.qformer | changes)


def faster(gain: int) -> Change:
    """Stage 2's projection, which starts from nothing, learns so many times as fast as the rest."""
    return lambda base: replace(base, stage2=replace(base.stage2, new_params="projection", lr_scale=gain))


def weights(itc: float, itm: float, itg: float) -> Change:
    """The recipe's weights times these."""
    return lambda base: replace(base, loss_weights=tuple(
        own * other for own, other in zip(base.loss_weights, (itc, itm, itg), strict=True)))


# A step of stage 1 takes at most as long as this many of stage 2: see the seconds of the base.
STAGE1_COST = 3
SHORT = 1 / 6  # of the steps
BASE = "base"
GROUPS: dict[str, dict[str, Change]] = {
    "stage 1": {
        BASE: steps(),
        "no stage 1": steps(0),
        "no stage 1, equal compute": steps(0, 1 + STAGE1_COST),
        "Q-Former frozen in stage 2": having(frozen=True),
        "no stage 1, Q-Former frozen": having(0, frozen=True),
        "a short stage 2": steps(1, SHORT),
        "no stage 1, a short stage 2": steps(0, SHORT),
    },
    "bridge": {
        BASE: steps(),
        "no stage 1": steps(0),
        "linear layer": having(0, patches="linear"),
        "MLP": having(0, patches="mlp"),
    },
    "losses": {
        BASE: steps(),
        "without ITC": weights(0, 1, 1),
        "without ITM": weights(1, 0, 1),
        "without ITG": weights(1, 1, 0),
    },
    "negatives": {BASE: steps(), "random negatives": having(model=RandomNegatives)},
    "self-attention": {BASE: steps(), "separate self-attention": having(model=SeparateSelfAttention)},
    "rates": {BASE: steps(), "projection 10 times as fast": faster(10)},
    "queries": {BASE: steps(), "1 query": sizes(num_queries=1), "4 queries": sizes(num_queries=4),
                "8 queries": sizes(num_queries=8), "32 queries": sizes(num_queries=32)},
}


# --- running them -----------------------------------------------------------------------------------------------------


def base(number: int, experts_of: Path) -> Ablation:
    """The scenes recipe with this many steps in each stage, the second of which starts as the paper's does."""
    recipe = Ablation(**vars(SCENES), experts_of=experts_of)
    return replace(recipe, build=build, warm_start=1.0, stage1=replace(recipe.stage1, steps=number),
                   stage2=replace(recipe.stage2, steps=number))


def wanted(groups: list[str], seeds: Iterable[int]) -> Iterator[tuple[str, Change, int]]:
    """Name, change and seed of each run, none twice; all of one seed before the next."""
    changes = {name: change for group in groups for name, change in GROUPS[group].items()}
    return ((name, change, seed) for seed in seeds for name, change in changes.items())


def known(path: Path) -> list[dict]:
    """The lines that are there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add(path: Path, line: dict) -> None:
    """Put a line behind those that are there."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def seconds(folder: Path, steps: int) -> float:
    """What so many steps took; where a run was resumed, at the pace of its last part."""
    record = read_json(folder / "seconds.json")
    return record["seconds"] * steps / max(1, steps - record["from_step"])


def measure_scenes(bridge: Bridge, data: CocoCaptions, features: np.memmap) -> dict[str, float]:
    """Percentages on drawn scenes."""
    found = evaluate_scenes(bridge, data, load_scenes(data.root, "val"), features, whole=False)
    return {key: value for key, value in found.items() if KEPT.fullmatch(key)}


def borrow(out: Path, folders: Mapping[str, Path]) -> None:
    """Let a run use folders of others as its own, under these names; those that are not there yet are made."""
    out.mkdir(parents=True, exist_ok=True)
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        if not (out / name).exists():
            (out / name).symlink_to(folder.resolve(), target_is_directory=True)


def run(recipe: Ablation, name: str, data: Path, out: Path) -> dict:
    """Train and measure one: the line to keep. Runs that differ in stage 2 only share their stage 1."""
    alike = repr((recipe.name, recipe.model.__name__, recipe.from_bert, recipe.stage1, sorted(recipe.qformer.items()),
                  recipe.loss_weights))
    stage1 = out.parent / f"stage1-{hashlib.sha256(alike.encode()).hexdigest()[:12]}"
    borrow(out, {"cache": recipe.experts_of / "cache", "stage1": stage1})
    bridge = train_bridge(recipe, data, None, out)
    val = CocoCaptions(data, "val")
    features, stage2 = bridge.features(val, out / "cache"), bridge.stage2
    found = measure_scenes(bridge, val, features)
    with torch.no_grad():
        first = torch.from_numpy(np.array(features[:1], dtype=np.float32))
        tokens = stage2.soft_prompt(first.to(bridge.device)).shape[1]
    counts = {"stage1": recipe.stage1.steps, "stage2": recipe.stage2.steps}
    return {"name": name, "seed": recipe.stage1.seed, "steps": list(counts.values()),
            "seconds": [round(seconds(out / stage, count), 1) for stage, count in counts.items()],
            "parameters": size(stage2.vision_norm, stage2.qformer, stage2.projection),
            "soft_tokens": tokens, "torch": torch.__version__, "machine": platform.machine(),
            "results": {key: round(value, 3) for key, value in found.items()}}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"among {', '.join(GROUPS)} (default: all of them)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="split among processes, one each")
    parser.add_argument("--experts-of", type=Path, default=Path("runs/scenes"), help="a finished run of the scenes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines (default: those of the repository)")
    options = parser.parse_args()
    if strange := [group for group in options.groups if group not in GROUPS]:
        raise UserError(f"there is no group {strange[0]!r}: choose among {', '.join(GROUPS)}")
    start, data = base(STEPS, options.experts_of), recorded_data(options.experts_of)
    done = {(line["name"], line["seed"]) for line in known(options.results)}
    runs = list(wanted(options.groups or list(GROUPS), options.seeds))
    with progress_bar(runs, desc="ablations", unit="run") as bar:
        for name, change, seed in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            if (name, seed) in done:
                continue
            recipe = change(start).with_seed(seed)
            folder = f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"
            add(options.results, run(recipe, name, data, options.experts_of.parent / "ablations" / folder))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.ablations", main))
