"""What lesson 17 and its bonus notebook draw, start and look up: spread batches, ledgers, and BLIP-2's relatives."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import masks
from ..lm.protocol import LanguageModel
from ..stage1 import Stage1
from .flow import Box, flow
from .lesson import ROOT
from .viz import FORBIDDEN, IMAGE, INK, PAPER, QUERY, QUIET, TEXT, WRONG

LOOKS = ((IMAGE, ""), (QUERY, ".."), (TEXT, "//"), (FORBIDDEN, ""), (WRONG, "xx"))

# model, arXiv number, what is frozen, what is trained, how many numbers that is, the bridge, the data; a name in
# braces stands for a number that the lesson computes
RELATIVES: tuple[tuple[str, ...], ...] = (
    ("CLIP", "2103.00020", "nothing", "both encoders", "not stated as a sum", "a dot product", "400 M pairs"),
    ("Frozen", "2106.13884", "the language model (7 B)", "the image encoder",
     "40 M (from BLIP-2's Table 2)", "linear: 2 tokens", "CC3M, 3 M pairs"),
    ("ALBEF", "2107.07651", "nothing", "ViT-B/16, BERT-base", "85.8 M + 123.7 M",
     "cross-attention in the upper half of BERT", "4.0 M or 14.1 M images"),
    ("OFA", "2202.03052", "not stated", "one encoder-decoder", "180 M (Base) to 930 M (Huge)",
     "none: one vocabulary for words, places and images", "20 M pairs, also images and text alone"),
    ("Flamingo-80B", "2204.14198", "NFNet-F6, Chinchilla (70 B)", "resampler, gated cross-attention", "10.2 B",
     "64 tokens, read by new layers inside the language model", "2.1 B pairs, 43 M web pages, 27 M videos"),
    ("M3AE", "2205.14204", "nothing", "one encoder, one decoder", "not stated",
     "none: patches and words in one encoder", "CC12M, 12 M pairs"),
    ("BEiT-3", "2208.10442", "not stated", "one Multiway transformer", "1.9 B",
     "none: shared attention, a feed-forward for each kind", "21 M pairs, 14 M images, 160 GB of text"),
    ("**BLIP-2**", "2301.12597", "ViT-g, OPT or FlanT5", "Q-Former, projection",
     "{stage1}, then {stage2}", "Q-Former: 32 tokens", "129 M images"),
    ("LLaVA", "2304.08485", "CLIP ViT-L; at first Vicuna too", "linear layer; then Vicuna too",
     "{linear}, then {vicuna}", "linear: 256 tokens", "595 K pairs, then 158 K instructions"),
    ("MiniGPT-4", "2304.10592", "ViT-g, **BLIP-2's Q-Former**, Vicuna", "linear layer", "{minigpt4}",
     "Q-Former and linear: 32 tokens", "5 M pairs, then 3.5 K descriptions"),
    ("InstructBLIP", "2305.06500", "ViT-g, FlanT5 or Vicuna", "Q-Former", "188 M",
     "Q-Former that reads the instruction as well: 32 tokens", "BLIP-2's, then 13 data sets as instructions"),
    ("Idefics-80B", "2306.16527", "OpenCLIP ViT-H, LLaMA (65 B)", "resampler, gated cross-attention",
     "{idefics} without the resampler", "as Flamingo", "OBELICS, 141 M web pages; pairs; Wikipedia"),
    ("Qwen-VL", "2308.12966", "at first Qwen-7B", "ViT-bigG and adapter; then all",
     "1.9 B + {qwen}, then 9.6 B", "one cross-attention layer: 256 tokens", "1.4 B pairs, then several tasks"),
    ("LLaVA-1.5", "2310.03744", "CLIP ViT-L at 336 px; at first Vicuna too", "MLP; then Vicuna too",
     "{mlp}, then {vicuna}", "MLP: 576 tokens", "558 K pairs, then 665 K instructions"),
)
RELATIVES_HEADER = ("", "frozen", "trained", "how many numbers", "bridge", "data")

SOURCES = (("COCO", 113e3, "people wrote five captions for each"), ("Visual Genome", 100e3, "people described regions"),
           ("SBU", 860e3, "written by users of Flickr"), ("CC3M", 3e6, "alt texts, cleaned"),
           ("CC12M", 10e6, "alt texts, cleaned less"), ("LAION, a part", 115e6, "alt texts that CLIP finds fitting"))
SETTINGS = (("steps", "250,000", "80,000", "10 epochs each, of COCO and Visual Genome"),
            ("batch", "2,320 (ViT-L), 1,680 (ViT-g)", "1,920 (OPT), 1,520 (FlanT5)", "16 × 100; 16 × 64"),
            ("AdamW", "β 0.9 and 0.98, decay 0.05", "the same", "β 0.9 and 0.999"),
            ("rate", "cosine from 1e-4, 2,000 steps warm-up", "the same, down to 5e-5",
             "by epoch; 5,000 and 2,000 steps warm-up"),
            ("images", "224 pixels, random crops, mirrored", "the same", "the same; RandAugment for Visual Genome"),
            ("time, largest models", "less than 6 days", "less than 3 days (FlanT5-XXL)", "not stated"))


def relatives(counts: Mapping[str, int]) -> list[list[str]]:
    """The rows of the table of relatives, by year, with the numbers that a lesson has counted in bold."""
    short = {name: f"**{count / 1e9:.1f} B**" if count >= 1e9 else f"**{count / 1e6:.0f} M**"
             for name, count in counts.items()}
    return [[f"[{name}](https://arxiv.org/abs/{number}), 20{number[:2]}", *(cell.format(**short) for cell in cells)]
            for name, number, *cells in RELATIVES]


# --- what is counted --------------------------------------------------------------------------------------------------


def giga(run: Callable[[], object]) -> float:
    """10⁹ multiply-adds of what `run` computes, on the meta device, where nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9  # a multiplication with its addition counts as one


def stage1_pass(stage1: Stage1, visual: int, words: int) -> None:
    """The passes of ITC, ITG and ITM over one pair, on the meta device."""
    ids, mask = torch.empty(1, words, dtype=torch.long), torch.empty(1, words, dtype=torch.bool)
    config, cache = stage1.qformer.config, stage1.qformer.new_cache()
    image_kv = stage1.image_kv(torch.empty(1, visual, config.image_width))
    stage1.embed_image(image_kv, cache), stage1.embed_text(ids, mask)
    rows = masks.multimodal_causal(config.num_queries, mask)[:, :, config.num_queries:]
    stage1.qformer.lm_logits(stage1.qformer(text_ids=ids, mask=rows, cache=cache).text[:, :-1])
    stage1.itm_triples(image_kv, ids, mask, (torch.zeros(1, dtype=torch.long),) * 2)


def language_pass(lm: LanguageModel, visual: int, words: int) -> None:
    """A caption of so many tokens behind `visual` ones, a quarter of it given, on the meta device."""
    given, ids = visual + words // 4, torch.empty(1, words - words // 4, dtype=torch.long)
    lm.lm_logits(lm.teacher_forcing(torch.empty(1, given, lm.width), torch.empty(1, given, dtype=torch.bool),
                                    lm.embed(ids), ids.bool()))


def prefill(lm: LanguageModel, tokens: int) -> None:
    """A decoder-only language model reads so many tokens of an image, on the meta device."""
    real = torch.empty(1, tokens, dtype=torch.bool)
    lm(torch.empty(1, tokens, lm.width), masks.causal(real), masks.token_positions(real))


def kept_by(lm: LanguageModel, trained: bool) -> int:
    """Bytes that a copy of a language model keeps for the gradient of 16 texts of 48 tokens, its weights aside."""
    kept, lm = {}, copy.deepcopy(lm).cpu().requires_grad_(trained)

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    real = torch.ones(16, 48, dtype=torch.bool)
    embeds = lm.embed(torch.ones(16, 48, dtype=torch.long)).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = lm(embeds, masks.causal(real), masks.token_positions(real))  # alive until all is counted
    assert states.requires_grad, "the gradient should pass"
    weights = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def torchrun(folder: Path, program: str, *words: object, processes: int = 2, restarts: int = 2
             ) -> subprocess.CompletedProcess:
    """Run a program, given as text, in so many processes on the CPU that form a group; `folder` keeps the file.

    Now and then one of them aborts while gloo shuts down; all are then started again, at most `restarts` times.
    """
    path = folder / "program.py"
    path.write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               f"--max-restarts={restarts}", path]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run([str(word) for word in (*command, *words)], capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
                                            "CUDA_VISIBLE_DEVICES": ""})  # NCCL would want a GPU for each process


# --- what is drawn ----------------------------------------------------------------------------------------------------


def spread_flow() -> Figure:
    """Lesson 17: a batch in two parts, the loss of the whole on each process, and one gradient."""
    boxes: dict[str, Box] = {"batch": (0, 9, 12, 7, "batch of\nB pairs", None)}
    for name, y in (("0", 16), ("1", 2)):
        boxes |= {f"part {name}": (18, y, 12, 6, f"part of\nprocess {name}", IMAGE),
                  f"model {name}": (35, y, 11, 6, "copy of\nStage1", QUERY),
                  f"loss {name}": (69, y, 14, 6, "ITC, ITM, ITG of\nthe whole batch", TEXT),
                  f"own {name}": (89, y, 13, 6, "own gradient,\ntimes W", QUERY)}
    boxes |= {"gather": (51, 9, 12, 7, "gather:\nall vectors,\neverywhere", None),
              "mean": (108, 9, 9, 7, "mean\nover W", None)}
    arrows = [(start.format(name), end.format(name)) for name in "01" for start, end in (
        ("batch", "part {}"), ("part {}", "model {}"), ("model {}", "gather"), ("gather", "loss {}"),
        ("loss {}", "own {}"), ("own {}", "mean"))]
    return flow(boxes, arrows, unit=0.08)


def pair_matrices() -> Figure:
    """The similarities of eight pairs as process 0 of two sees them, in three designs.

    A number counts the gradients that an entry gives to own vectors: of its image and of its caption, by each of the
    two cross-entropies.
    """
    looks = {4: (IMAGE, "4 gradients"), 2: (QUERY, "2"), 1: (TEXT, "1"), 0: (PAPER, "0: a constant"),
             None: (FORBIDDEN, "×: not there")}
    designs = {"each alone": lambda mine, yours: 4 if mine and yours else None,
               "gathered without gradient": lambda mine, yours: mine + yours or None,
               "gathered with gradient": lambda mine, yours: 2 * (mine + yours)}
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    for panel, (title, kind) in zip(figure.subplots(1, 3), designs.items(), strict=True):
        for row, column in itertools.product(range(8), range(8)):
            count = kind(row < 4, column < 4)
            panel.add_patch(Rectangle((column, row), 1, 1, facecolor=looks[count][0], edgecolor=QUIET, linewidth=0.6))
            panel.text(column + 0.5, row + 0.5, "×" if count is None else count, ha="center", va="center", fontsize=9,
                       color=PAPER if count == 1 else INK)
        panel.set(xlim=(0, 8), ylim=(8, 0), aspect="equal", title=title, xlabel="caption", ylabel="image",
                  xticks=[0, 4, 8], yticks=[0, 4, 8])
    figure.legend(handles=[Patch(facecolor=colour, edgecolor=QUIET, label=label) for colour, label in looks.values()],
                  loc="outside lower center", ncols=len(looks))
    return figure


def gradient_lengths(ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """How long a gradient is against the right one: panel -> design -> what it is the gradient of -> ratio."""
    figure = Figure(figsize=(9.2, 3.3), layout="constrained")
    for panel, (title, designs) in zip(figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0], ratios.items(),
                                       strict=True):
        groups = list(next(iter(designs.values())))
        for place, (group, (colour, hatch)) in enumerate(zip(groups, LOOKS, strict=False)):
            panel.barh(np.arange(len(designs)) + 0.27 * (place - 1), [some[group] for some in designs.values()], 0.25,
                       color=colour, hatch=hatch, edgecolor=PAPER, label=group)
        panel.axvline(1, color=INK, linewidth=1.2, linestyle="--")
        panel.set(title=title, xlabel="length, one process = 1", ylim=(len(designs) - 0.4, -0.6))
        panel.set_yticks(range(len(designs)), list(designs))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return figure


def stacked(rows: Mapping[str, Mapping[str, float]], label: str, marks: Sequence[tuple[float, str]] = ()) -> Figure:
    """One bar for each row, made of its parts; `marks` are dashed lines with their names."""
    figure = Figure(figsize=(9.2, 1.35 + 0.36 * len(rows)), layout="constrained")
    panel, left = figure.subplots(), np.zeros(len(rows))
    for part, (colour, hatch) in zip(next(iter(rows.values())), LOOKS, strict=False):
        values = np.array([some[part] for some in rows.values()])
        panel.barh(list(rows), values, left=left, color=colour, hatch=hatch, edgecolor=PAPER, label=part)
        left += values
    for place, name in marks:
        panel.axvline(place, color=INK, linewidth=1.2, linestyle="--")
        panel.annotate(name, (place, -0.65), (3, 0), textcoords="offset points", fontsize=9)
    panel.set(xlabel=label, ylim=(len(rows) - 0.4, -1 if marks else -0.6))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS))
    return figure
