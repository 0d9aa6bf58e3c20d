"""What lesson 17 and its bonus notebook draw, start and look up: spread batches, ledgers, and BLIP-2's relatives."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from .. import masks
from ..data.batches import PairBatches
from ..data.coco import CocoCaptions
from ..lm.llama import Llama, LlamaConfig
from ..lm.protocol import LanguageModel
from ..qformer import QFormerConfig
from ..stage1 import Stage1
from ..training import budget
from ..training.bridge import Bridge
from ..vit import CLIP_L, ViT
from .flow import Box, flow
from .lesson import ROOT
from .viz import FORBIDDEN, IMAGE, INK, PAPER, QUERY, QUIET, TEXT, WRONG

LOOKS = ((IMAGE, ""), (QUERY, ".."), (TEXT, "//"), (FORBIDDEN, ""), (WRONG, "xx"))

# model, arXiv number, what is frozen, what is trained, how many parameters that is, the bridge, the data; a name in
# braces stands for a number that `counted` computes. Read in the papers and the official repositories, November 2026.
RELATIVES: tuple[tuple[str, ...], ...] = (
    ("CLIP", "2103.00020", "nothing", "both encoders", "not stated as a sum", "a dot product", "400 M pairs"),
    ("Frozen", "2106.13884", "the language model (7 B)", "NF-ResNet-50 and a linear layer",
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
    ("InstructBLIP", "2305.06500", "ViT-g, FlanT5 or Vicuna", "Q-Former, projection", "{instruct}",
     "Q-Former that reads the instruction as well: 32 tokens", "BLIP-2's, then 13 data sets as instructions"),
    ("Idefics-80B", "2306.16527", "OpenCLIP ViT-H, LLaMA (65 B)", "resampler, gated cross-attention",
     "{idefics} without the resampler", "as Flamingo", "OBELICS, 141 M web pages; pairs; Wikipedia"),
    ("Qwen-VL", "2308.12966", "at first Qwen-7B", "ViT-bigG and adapter; then all",
     "1.9 B + {qwen}, then 9.6 B", "one cross-attention layer: 256 tokens", "1.4 B pairs, then several tasks"),
    ("LLaVA-1.5", "2310.03744", "CLIP ViT-L at 336 px; at first Vicuna too", "MLP; then Vicuna too",
     "{mlp}, then {vicuna}", "MLP: 576 tokens", "558 K pairs, then 665 K instructions"),
)
RELATIVES_HEADER = ("", "frozen", "trained", "parameters", "bridge", "data")

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


def relatives(counts: Mapping[str, int], *names: str) -> list[list[str]]:
    """The rows of the table of relatives, all or of these names, by year; numbers that were counted are bold."""
    short = {name: f"**{count / 1e9:.1f} B**" if count >= 1e9 else f"**{count / 1e6:.0f} M**"
             for name, count in counts.items()}
    return [[f"[{name}](https://arxiv.org/abs/{number}), 20{number[:2]}", *(cell.format(**short) for cell in cells)]
            for name, number, *cells in RELATIVES if not names or name.strip("*") in names]


# --- what is counted --------------------------------------------------------------------------------------------------


def giga(run: Callable[[], object]) -> float:
    """10⁹ multiply-adds of what `run` computes, on the meta device, where nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9  # a multiplication with its addition counts as one


def released() -> dict[str, nn.Module]:
    """What BLIP-2's relatives train, from their released configurations, on the meta device."""
    with torch.device("meta"):
        return {"linear": nn.Linear(1024, 4096),  # LLaVA, from CLIP ViT-L into Vicuna-7B
                "mlp": nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 4096)),  # LLaVA-1.5
                "vicuna": Llama(LlamaConfig(32_000, 4096, 32, 32, 32, 11_008, tied=False)),  # Vicuna-7B
                "minigpt4": nn.Linear(768, 5120),  # into Vicuna-13B
                "qwen": nn.ModuleList([nn.Embedding(256, 4096), nn.Linear(1664, 4096, bias=False),
                                       nn.MultiheadAttention(4096, 32)])}  # its queries, and one cross-attention


def counted(lm_width: int = 4096) -> dict[str, int]:
    """How many parameters BLIP-2 and its relatives train, for the table of relatives."""
    counts = {name: budget.parameters(model) for name, model in released().items()}
    config = QFormerConfig()
    with torch.device("meta"):
        stage1 = Stage1(config, 256)
    counts["stage1"], counts["stage2"] = budget.trained_parameters(config, 256, lm_width)
    counts["instruct"] = (budget.parameters(stage1.qformer) - budget.parameters(stage1.qformer.lm_head)
                          + budget.parameters(stage1.vision_norm) + (config.width + 1) * lm_width)
    attention, feed_forward = 2 * 8192**2 + 2 * 1280 * 8192, 3 * 8192 * 22_016  # from Idefics's config.json
    return counts | {"idefics": 80 // 4 * (attention + feed_forward)}


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


def small_batch(bridge: Bridge, split: CocoCaptions, cache: Path, size: int) -> list[Tensor]:
    """Drawn pairs of the scenes: image features, ids and mask of the captions, image ids."""
    features, tokenizer = bridge.features(split, cache)[:400].copy(), bridge.backbones.tokenizer
    pairs = [(row, tokenizer.encode(text)) for row, text in split.pairs if row < 400]
    drawn = PairBatches([features], [row for row, _ in pairs], [ids for _, ids in pairs],
                        [record.id for record in split.images[:400]], size, 0, tokenizer.pad_id).batch(0)
    return [drawn.image_features, drawn.text_ids, drawn.text_mask, drawn.image_ids]


def gradients(model: nn.Module, names: Mapping[str, str], *losses: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of the sum of these losses, of the parameters with these names."""
    model.zero_grad()
    for loss in losses:
        loss().backward()
    return {group: model.get_parameter(name).grad.clone() for group, name in names.items()}


def against_true(found: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
                 ) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
    """Gradients by state, design and group, against the design "true": ratios of lengths, and cosines.

    Cosines are those of the first group.
    """
    ratios, cosines = {}, {}
    for state, designs in found.items():
        true, first = designs["true"], next(iter(designs["true"]))
        others = {name: some for name, some in designs.items() if name != "true"}
        ratios[state] = {name: {group: (one.norm() / true[group].norm()).item() for group, one in some.items()}
                         for name, some in others.items()}
        cosines[state] = {name: cosine_similarity(some[first].flatten(), true[first].flatten(), dim=0).item()
                          for name, some in others.items()}
    return ratios, cosines


def until_read() -> dict[tuple[str, str, int], dict[str, float]]:
    """10⁹ multiply-adds until Vicuna-7B has read what CLIP ViT-L saw at 336 pixels, through a Q-Former or an MLP.

    By bridge, image (one, or five tiles), and tokens; on the meta device.
    """
    models = released()
    with torch.device("meta"):
        clip, reader = ViT(replace(CLIP_L, image_size=336)), Stage1(QFormerConfig(image_width=1024))
    sees = giga(lambda: clip(torch.empty(1, 3, 336, 336)))
    bridges = (("Q-Former", 32, giga(lambda: reader.qformer(reader.image_kv(torch.empty(1, 577, 1024))))),
               ("MLP", 576, giga(lambda: models["mlp"](torch.empty(576, 1024)))))
    costs = {}
    for (tiles, where), (name, tokens, cost) in itertools.product(((1, "one image"), (5, "five tiles")), bridges):
        reading = giga(lambda read=tiles * tokens: prefill(models["vicuna"], read))
        costs[name, where, tiles * tokens] = {"ViT": tiles * sees, "bridge": tiles * cost,
                                              "language model reads it": reading}
    return costs


# one step of stage 1 on a part of the batch: files of the model and batch, and of what process 0 found
WORKER = '''
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from minblip2.training.distributed import DistributedStage1, process_group, rank_and_size

def main(task, found):  # a function, so that nothing holds the group when Python ends
    model, batch = torch.load(task, weights_only=False)
    with process_group(torch.device("cpu")):
        rank, size = rank_and_size()
        part = [x[len(x) * rank // size:len(x) * (rank + 1) // size] for x in batch]
        torch.manual_seed(rank)
        wrapped = DistributedDataParallel(DistributedStage1(model))
        out = wrapped(*part)
        out.loss.backward()
        if rank == 0:
            losses = {key: getattr(out, key).item() for key in ("loss", "itc", "itm", "itg")}
            torch.save((losses, [p.grad for p in model.parameters()]), found)
main(*sys.argv[1:])
'''


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
               "whole loss, own part alive": lambda mine, yours: 2 * (mine + yours)}
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    for panel, (title, kind) in zip(figure.subplots(1, 3), designs.items(), strict=True):
        for row, column in itertools.product(range(8), range(8)):
            count = kind(row < 4, column < 4)
            panel.add_patch(Rectangle((column, row), 1, 1, facecolor=looks[count][0], edgecolor=QUIET, linewidth=0.6))
            panel.text(column + 0.5, row + 0.5, "×" if count is None else count, ha="center", va="center", fontsize=9,
                       color=PAPER if count == 1 else INK)
        panel.set(xlim=(-0.05, 8.05), ylim=(8.05, -0.05), aspect="equal", title=title, xlabel="caption", ylabel="image",
                  xticks=[0, 4, 8], yticks=[0, 4, 8])
    figure.legend(handles=[Patch(facecolor=colour, edgecolor=QUIET, label=label) for colour, label in looks.values()],
                  loc="outside lower center", ncols=len(looks))
    return figure


def gradient_lengths(ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """How long a gradient is against the right one: panel -> design -> what it is the gradient of -> ratio.

    Each is a mark, joined to the right length by a line, on a logarithmic axis.
    """
    figure = Figure(figsize=(9.2, 3.3), layout="constrained")
    for panel, (title, designs) in zip(figure.subplots(1, len(ratios), sharex=True, sharey=True, squeeze=False)[0],
                                       ratios.items(), strict=True):
        groups = list(next(iter(designs.values())))
        for place, (group, (colour, _), mark) in enumerate(zip(groups, LOOKS, "os^", strict=False)):
            values, heights = [some[group] for some in designs.values()], np.arange(len(designs)) + 0.25 * (place - 1)
            panel.hlines(heights, 1, values, color=colour, linewidth=2)
            panel.plot(values, heights, color=colour, marker=mark, linestyle="", label=group)
        panel.axvline(1, color=INK, linewidth=1.2, linestyle="--")
        panel.set(title=title, xscale="log", xlabel="length of the gradient; one process = 1 (log)",
                  ylim=(len(designs) - 0.4, -0.6))
        panel.set_xticks(ticks := (0.5, 1, 2, 5, 10, 20, 50, 100), [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_yticks(range(len(designs)), list(designs))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return figure


def stacked(rows: Mapping[str, Mapping[str, float]], label: str, marks: Sequence[tuple[float, str]] = ()) -> Figure:
    """One bar for each row, made of its parts, with its sum; `marks` are dashed lines with their names."""
    figure = Figure(figsize=(9.2, 1.35 + 0.36 * len(rows)), layout="constrained")
    panel, left = figure.subplots(), np.zeros(len(rows))
    for part, (colour, hatch) in zip(next(iter(rows.values())), LOOKS, strict=False):
        values = np.array([some[part] for some in rows.values()])
        panel.barh(list(rows), values, left=left, color=colour, hatch=hatch, edgecolor=PAPER, label=part)
        left += values
    for line, value in enumerate(left):
        panel.annotate(f"{value:,.0f}", (value, line), (4, 0), textcoords="offset points", va="center", fontsize=9)
    for place, name in marks:
        panel.axvline(place, color=INK, linewidth=1.2, linestyle="--")
        panel.annotate(name, (place, -0.65), (3, 0), textcoords="offset points", fontsize=9)
    panel.set(xlabel=label, xlim=(0, 1.1 * left.max()), ylim=(len(rows) - 0.4, -1 if marks else -0.6))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS))
    return figure
