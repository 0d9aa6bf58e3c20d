"""Sixteen photographs and what the laptop bridge says of them: python -m minblip2.course.photographs runs/laptop

Lesson 15 asks a bridge under runs/laptop. Where there is none, and in the outputs that are in git, it shows what one
run said, which this command has written to data/photographs/said.json with the run's checksum and the date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ..data.coco import CocoCaptions
from ..data.entry import run_command
from ..data.files import read_json, write_json
from ..data.pictures import load_image
from ..data.transforms import Transform
from ..evaluation.metrics import split_words
from ..training.bridge import Bridge, load_bridge
from ..training.loop import read_log
from ..training.records import recorded_data
from ..training.shipping import finished, run_checksum
from ..vit import to_grid
from . import figures, viz
from .lesson import ROOT, folded
from .maps import grey_out

FOLDER, RUN = ROOT / "data" / "photographs", ROOT / "runs" / "laptop"
KEPT = FOLDER / "said.json"
POINTS = 50  # of each curve
CUT = 26  # patches: a tenth of them
DINO = Transform(mode="crop", resize_to=256)  # what the laptop recipe's encoder sees of a picture
ASKED: dict[int, tuple[str, str]] = {  # COCO's id -> a question, and the words that name the subject
    129648: ("what is the boy riding?", "skateboard skateboarder skateboarding skateboarders"),
    377575: ("what animal is this?", "dog dogs poodle puppy"),
    214753: ("what are the people riding?", "horse horses horseback"),
    126107: ("what is in the sky?", "bird birds gull seagull"),
    174375: ("what is the man playing?", "tennis"),
    165518: ("what is the man riding?", "motorcycle motorbike motorcyclist bike"),
    519208: ("what animal is this?", "elephant elephants"),
    358083: ("what animal is this?", "cat cats kitten"),
    196393: ("what animals are these?", "cat cats kitten bird birds"),
    160012: ("what is on the table?", "pizza pizzas"),
    99053: ("what is in the bowl?", "noodles noodle pasta"),
    62554: ("what is on the plate?", "broccoli vegetable vegetables"),
    423617: ("what is on the street?", "bus buses taxi car cars"),
    516008: ("what is on the desk?", "laptop computer"),
    525891: ("what does the sign say?", "stop"),
    475678: ("what are these?", "suitcase suitcases luggage"),
}
EITHER = {196393: "cat or bird", 423617: "bus or car"}  # where several things are the subject
QUESTIONS, LONGEST = [question for question, _ in ASKED.values()], 20  # ids of an answer
AS_PAPER = "Question: {} Answer:"


def photographs() -> CocoCaptions:
    """The photographs that ship, with our captions and their credits."""
    return CocoCaptions(FOLDER, "val")


def laptop_bridge() -> Bridge | None:
    """The bridge under runs/laptop; None where there is none, and where outputs are made that others will see."""
    return load_bridge(RUN) if finished(RUN) and not os.environ.get("MINBLIP2_DRAWN_ONLY") else None


def kept() -> dict[str, Any]:
    """What one run of the laptop recipe said of the photographs."""
    return read_json(KEPT)


def source(bridge: Bridge | None) -> str:
    """Where the answers are from, in words."""
    if bridge:
        return "the bridge under runs/laptop, here and now"
    said = kept()
    return (f"a run of the laptop recipe on {said['pictures']:,} photographs with {said['texts']:,} captions; what it "
            f"said on {said['date']} is read from a file (checksum of the run: {said['checksum'][:12]})")


def subject(number: int) -> str:
    """The first word that names the subject of a photograph, or two, if either will do."""
    image, (_, words) = list(ASKED.items())[number]
    return EITHER.get(image, words.split()[0])


def show_credits() -> None:
    """Display whose the photographs are."""
    folded("Whose photographs these are", ["", "photograph", "source, licence"],
           *[[number, record.captions[0], record.credit] for number, record in enumerate(photographs().images, 1)])


def named(texts: Sequence[str]) -> list[bool]:
    """Whether each photograph's text holds a word that names its subject."""
    return [bool(set(split_words(text)) & set(words.split()))
            for text, (_, words) in zip(texts, ASKED.values(), strict=True)]


def marked(texts: Sequence[str]) -> list[str]:
    """Each photograph's text behind ✓ or ✗: whether it names the subject."""
    return [f"{'✓' if right else '✗'} {text}" for right, text in zip(named(texts), texts, strict=True)]


def sheet(captions: Sequence[str], **others: Sequence[str]) -> Figure:
    """All photographs, cut as the encoder sees them, with their captions, marked, and others': name -> texts."""
    data = photographs()
    texts = [{f"{number}": caption} | {name: some[number - 1] for name, some in others.items()}
             for number, caption in enumerate(marked(captions), start=1)]
    return figures.caption_sheet([DINO.crop_and_resize(load_image(path)) for path in data.paths], texts)


def show_said() -> None:
    """Display the photographs with what the run that is kept said of them, and whose they are."""
    said = kept()
    viz.show(sheet(said["captions"]), "Sixteen photographs, each with the caption of a bridge trained without a GPU; "
             f"{sum(named(said['captions']))} captions name the subject.", photographs=True)
    show_credits()


def maps_over(maps: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Each photograph, numbered, as the encoder sees it, under its map (gh gw), coloured from 0 to its own maximum."""
    figure, panels = viz.make_panels(len(titles), 4, 2, 2.3)
    for number, (panel, path, values, title) in enumerate(
            zip(panels, photographs().paths, maps, titles, strict=True), start=1):
        figures.lay_over(panel, DINO.crop_and_resize(load_image(path)), values)
        panel.set_title(textwrap.fill(f"{number}: {title}", 28), fontsize=9, weight="normal")
    figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), ax=panels, alpha=0.6, location="bottom", shrink=0.5,
                    aspect=40, label="share of the map's own maximum")
    return figure


def cut_out(bridge: Bridge, features: Tensor, texts: Sequence[str]) -> Tensor:
    """What the odds of a match (nats) lose when CUT patches say what an average patch says: (n 2).

    First for the patches that the map shows brightest, then the mean over ten draws at random. features (n v e) and
    texts (n), pair by pair.
    """
    stage1, first = bridge.stage1.eval(), int(bridge.backbones.class_token)
    nothing = features[:, first:].mean(dim=(0, 1))
    ids, mask = bridge.retriever.text_ids(texts)

    @torch.no_grad()
    def odds(image: Tensor) -> Tensor:
        no_match, match = stage1.itm_logits(stage1.image_kv(image), ids, mask).T
        return match - no_match

    maps, whole = stage1.match_map(features, ids, mask)[:, first:], odds(features)
    generator = torch.Generator().manual_seed(0)
    orders = [maps.argsort(dim=1, descending=True), *(torch.rand(maps.shape, generator=generator).argsort(dim=1)
                                                      for _ in range(10))]
    falls = torch.stack([whole - odds(grey_out(features, order + first, CUT, nothing)) for order in orders], dim=1)
    return torch.stack([falls[:, 0], falls[:, 1:].mean(dim=1)], dim=1)


def thinned(log: Sequence[dict[str, float]], keys: Sequence[str]) -> list[dict[str, float]]:
    """A training log as POINTS means, each in the middle of what it stands for."""
    return [{key: round(float(np.mean([line[key] for line in some])), 4) for key in ("step", *keys)}
            for some in np.array_split(np.array(log, dtype=object), POINTS)]


def curves_of(run: Path) -> dict[str, list[dict[str, float]]]:
    """The losses of both stages of a run, thinned."""
    return {stage: thinned(read_log(run / stage / "log.jsonl"), keys)
            for stage, keys in (("stage1", ("itc", "itm", "itg")), ("stage2", ("loss",)))}


def train_split(run: Path = RUN) -> CocoCaptions:
    """The photographs that a run was trained on."""
    return CocoCaptions(recorded_data(run), "train")


def counted(data: CocoCaptions) -> list[int]:
    """How many captions hold a word that names the subject, for each photograph."""
    texts = [set(split_words(caption)) for caption in data.texts]
    return [sum(bool(words & set(names.split())) for words in texts) for _, names in ASKED.values()]


def say_all(bridge: Bridge, run: Path) -> dict[str, Any]:
    """All that lesson 15 shows of a run, small enough for git."""
    data = photographs()
    images, ours = [load_image(path) for path in data.paths], [record.captions[0] for record in data.images]
    retriever, blip2 = bridge.retriever, bridge.blip2
    features = retriever.encode_images(images)
    maps = torch.stack([retriever.attention_maps(one, [text])[0] for one, text in zip(features, ours, strict=True)])
    return dict(
        captions=blip2.caption(features), alone=retriever.caption(features),
        answers=blip2.ask(features, QUESTIONS, max_length=LONGEST),
        answers_to_another=blip2.ask(features.roll(1, 0), QUESTIONS, max_length=LONGEST),
        answers_as_paper=blip2.ask(features, QUESTIONS, AS_PAPER, max_length=LONGEST),
        cosine=rounded(retriever.similarity(features, ours)), match=rounded(retriever.match(features, ours)),
        temperature=round(bridge.stage1.temperature.item(), 4),
        maps=packed(maps),
        falls=rounded(cut_out(bridge, features, ours)),
        log=curves_of(run), counted=counted(train := train_split(run)), texts=len(train.pairs), pictures=len(train),
        checksum=run_checksum(run), date=datetime.date.today().isoformat(),
    )


def rounded(values: Tensor) -> list[list[float]]:
    """A matrix in three decimals."""
    return [[round(value, 3) for value in row] for row in values.tolist()]


def packed(maps: Tensor) -> list[str]:
    """Maps (n gh gw), none of them empty, in 256 steps from 0 to their own maximum, as text."""
    steps = (255 * maps / maps.amax(dim=(1, 2), keepdim=True)).round().byte()
    return [bytes(one.flatten().tolist()).hex() for one in steps]


def unpacked(maps: Sequence[str]) -> Tensor:
    """The maps (n gh gw) of `packed`, each with the maximum 1."""
    flat = torch.tensor([list(bytes.fromhex(one)) for one in maps]) / 255
    return to_grid(flat, class_token=False)


def main() -> int:
    """Write what a run says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    write_json(KEPT, say_all(load_bridge(run), run))
    print(f"wrote {KEPT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("minblip2.course.photographs", main))
