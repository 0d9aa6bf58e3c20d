"""A BLIP-2 of the official architecture, but small enough to be trained in seconds: lesson 16 and its bonus notebook.

It learns eight drawn scenes by heart, all of it, the image encoder and the language model too. That is not how BLIP-2
is trained; it is how one gets a language model that says something within seconds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from .. import UserError
from ..data.files import write_json
from ..data.scene_captions import write_captions
from ..data.scenes import draw_scenes
from ..data.tokenizer import Tokenizer
from ..data.transforms import Transform
from ..lm.opt import OPT, OPTConfig
from ..lm.t5 import T5, T5Config
from ..qformer import QFormer, QFormerConfig
from ..stage1 import Stage1
from ..stage2 import Stage2
from ..training import budget
from ..vit import EVA_G, ViT
from ..weights.blip2 import Blip2
from ..weights.keymap import spell_out
from ..weights.names import EVA, STAGE1
from ..weights.official import load_blip2
from .flow import Box, flow
from .lesson import ROOT
from .viz import FORBIDDEN, IMAGE, INK, QUERY, QUIET, TEXT, WRONG, draw_box

SIZES = dict(width=48, layers=2, heads=3, mlp_width=96)
PIXELS = 56
ROUNDING = 3e-6  # how far logits move, at most, when float32 adds up in another order: with a margin


@dataclass(frozen=True)
class EightScenes:
    """Eight pictures (`pixels`: b c h w) with their captions, as text and as ids.

    `given` (b 1) is the id that starts a text, `text` (b t) what is to be learned, True in `text_mask` (b t).
    """

    images: list[Image.Image]
    captions: list[str]
    backend: tokenizers.Tokenizer
    words: Tokenizer
    transform: Transform
    pixels: Tensor
    given: Tensor
    text: Tensor
    text_mask: Tensor


def eight_scenes() -> EightScenes:
    """Draw eight scenes, write their captions, and make a byte-level tokenizer of them, laid out as OPT's."""
    drawn = list(draw_scenes(8, "lesson 16"))
    images = [image for _, image, _ in drawn]
    captions = [write_captions(scene, random)[0] for random, _, scene in drawn]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator([f"{caption}\n" for caption in captions], trainers.BpeTrainer(
        vocab_size=180, special_tokens=["<s>", "<pad>", "</s>", "<image>"], initial_alphabet=["Ċ"],
        show_progress=False))
    start, pad, line_end = (backend.token_to_id(token) for token in ("</s>", "<pad>", "Ċ"))
    words, transform = Tokenizer(backend, [start], line_end, pad), Transform(size=PIXELS)
    ids, mask = words.pad([words.encode(caption) for caption in captions])
    return EightScenes(images, captions, backend, words, transform,
                       torch.stack([transform(image) for image in images]), ids[:, :1], ids[:, 1:], mask[:, 1:])


def learn_by_heart(scenes: EightScenes, steps: int = 240) -> Blip2:
    """Train all of a small BLIP-2 on the eight scenes; it comes back in evaluation mode, its frozen parts frozen."""
    torch.manual_seed(0)
    vit = ViT(replace(EVA_G, image_size=PIXELS, **SIZES))
    qformer = QFormer(QFormerConfig(**SIZES, num_queries=8, image_width=SIZES["width"], vocab_size=10,
                                    max_positions=8, dropout=0.0))
    lm = OPT(OPTConfig(vocab_size=len(scenes.words) + 4, max_positions=64, **SIZES))  # spare ids, as on the hub
    stage2 = Stage2(nn.LayerNorm(SIZES["width"], eps=vit.config.eps), qformer, lm)
    lm.requires_grad_(True)
    optimiser = torch.optim.AdamW([*vit.parameters(), *stage2.parameters()], lr=3e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = stage2(vit(scenes.pixels), scenes.given, torch.ones_like(scenes.given, dtype=torch.bool), scenes.text,
                      scenes.text_mask).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    lm.requires_grad_(False)
    vit.eval().requires_grad_(False)
    return Blip2(vit=vit, stage2=stage2.eval(), transform=scenes.transform, tokenizer=scenes.words)


def save_stage1(stage1: Stage1, folder: Path) -> None:
    """Write what a stage 1 has a place for in transformers' `Blip2ForImageTextRetrieval`: no LM head, no temperature.

    The folder's settings tell of EVA's encoder, whose weights are not in it.
    """
    state, config = stage1.state_dict(), stage1.qformer.config
    used = {theirs: state[ours[0]].clone() for theirs, ours in spell_out(STAGE1.tensors, layers=config.layers)
            if all(name in state for name in ours)}
    folder.mkdir()
    save_file(used, folder / "model.safetensors", {"format": "pt"})
    vision = {theirs: getattr(EVA_G, ours) for theirs, ours in EVA.settings.items()}
    sizes = dict(num_attention_heads=config.heads, hidden_size=config.width, num_hidden_layers=config.layers,
                 intermediate_size=config.mlp_width, encoder_hidden_size=config.image_width)
    write_json(folder / "config.json", dict(model_type="blip-2", vision_config=vision, qformer_config=sizes))


def official_language_models() -> dict[str, nn.Module]:
    """The frozen language models of four published BLIP-2s, by the name of the hub folder, on the meta device."""
    def flan_t5(width: int, mlp_width: int, heads: int) -> T5:
        return T5(T5Config(vocab_size=32128, width=width, layers=24, heads=heads, head_width=64, mlp_width=mlp_width,
                           gated=True, tied=False, scaled=False, activation="gelu"))

    with torch.device("meta"):
        return {"blip2-opt-2.7b": OPT(OPTConfig(vocab_size=50304, width=2560, layers=32, heads=32, mlp_width=10240)),
                "blip2-opt-6.7b": OPT(OPTConfig(vocab_size=50304, width=4096, layers=32, heads=32, mlp_width=16384)),
                "blip2-flan-t5-xl": flan_t5(2048, 5120, 32), "blip2-flan-t5-xxl": flan_t5(4096, 10240, 64)}


def fetched(needs: Mapping[str, Mapping[int, float]]) -> dict[str, Blip2]:
    """The official models that were fetched and fit into memory; of the others it is printed why they are left out.

    needs: name -> bytes of a frozen number -> bytes of the model.
    """
    parts = Path(os.environ.get("MINBLIP2_PARTS", ROOT / "data" / "parts"))
    device = budget.best_device()
    free, value = budget.free_memory(device), budget.compute_dtype(device).itemsize
    found = {}
    for name in ("blip2-opt-2.7b", "blip2-flan-t5-xl"):
        if not any((parts / name).glob("*.safetensors")):
            print(f"{name}: not there; fetch it with: python data/download.py weights {name}")
        elif free and needs[name][value] > 0.9 * free:
            print(f"{name}: there, but it needs {needs[name][value] / 1e9:.0f} GB of memory")
        else:
            found[name] = Blip2.from_folder(parts / name)
    return found


def path_of_a_file() -> Figure:
    """How lesson 16 proves that two implementations are one model: one folder, two readers, the same logits."""
    boxes: dict[str, Box] = {
        "folder": (0, 9, 16, 6, "one hub folder:\nnames, weights", None),
        "ours": (36, 18, 19, 6, "our modules", QUERY),
        "input": (36, 9, 19, 6, "eight images\nwith captions", None),
        "theirs": (36, 0, 19, 6, "transformers' class", TEXT),
        "same": (73, 9, 16, 6, "the same logits?\nδ, section 3", IMAGE)}
    arrows = (("folder", "ours"), ("folder", "theirs"), ("input", "ours"), ("input", "theirs"), ("ours", "same"),
              ("theirs", "same"))
    return flow(boxes, arrows, notes=((11, 19.5, "by the table of\nnames, section 1"), (16, 3, "by its own names"),
                                      (66, 19, "logits"), (66, 5, "logits")))


def stacked() -> Figure:
    """Three heads' queries, keys and values in one stacked matrix, and what three converters take for which."""
    right = [f"{role}{head}" for role in "qkv" for head in "₁₂₃"]
    readings = {"in EVA's file, and cut right": right,
                "taken for [k ; q ; v]": right[3:6] + right[:3] + right[6:],
                "cut head by head": [right[3 * head + role] for role in range(3) for head in range(3)]}
    colours = {"q": QUERY, "k": TEXT, "v": IMAGE}
    figure = Figure(figsize=(8.8, 2.3))
    panel = figure.add_axes((0, 0, 1, 1), xlim=(0, 88), ylim=(0, 23))
    panel.axis("off")
    for line, reading in enumerate(readings):
        panel.text(1, 15.5 - 6 * line, reading, va="center", fontsize=9)
    for role, (name, x) in enumerate({"used as queries": 32, "used as keys": 51, "used as values": 70}.items()):
        panel.text(x + 6, 20.5, name, ha="center", va="center", fontsize=9, color=QUIET)
        for line, parts in enumerate(readings.values()):
            y = 13.5 - 6 * line
            for head, part in enumerate(parts[3 * role:3 * role + 3]):
                wrong = part[0] != "qkv"[role]
                draw_box(panel, (x + 4.4 * head, y, 4, 4), part, colours[part[0]], tint=0.3, rounding=0.3,
                         edge=WRONG if wrong else colours[part[0]], line=2.2 if wrong else 1,
                         dash=(0, (2, 1)) if wrong else "-")
    panel.text(1, 20.5, "dashed: in the wrong place", va="center", fontsize=9, color=WRONG)
    return figure


def memory(models: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Bytes of each model's image encoder, bridge and language model, stacked, beside the sizes of common cards."""
    figure = Figure(figsize=(8.8, 1.1 + 0.36 * len(models)), layout="constrained")
    panel = figure.subplots()
    lines, left = list(range(len(models)))[::-1], [0.0] * len(models)
    for part, colour, sizes in zip(("image encoder, frozen", "bridge", "language model, frozen"), (IMAGE, QUERY, TEXT),
                                   zip(*models.values(), strict=True), strict=True):
        gigabytes = [size / 1e9 for size in sizes]
        panel.barh(lines, gigabytes, left=left, height=0.62, color=colour, label=part)
        left = [start + more for start, more in zip(left, gigabytes, strict=True)]
    for card in (8, 16, 24):
        panel.axvline(card, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=3)
        panel.text(card, 1.01, f"{card} GB card", transform=panel.get_xaxis_transform(), ha="center", va="bottom",
                   fontsize=8.5, color=QUIET)
    panel.set(yticks=lines, yticklabels=list(models), xlabel="GB in bfloat16 (the bridge in float32)",
              xlim=(0, max(left) * 1.04), ylim=(-0.5, len(models) - 0.5))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def refusal(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """What is said when the weights of a hub folder are changed and loaded; AssertionError if they are loaded."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    with tempfile.TemporaryDirectory() as work:
        shutil.copy(folder / "config.json", work)
        save_file(tensors, Path(work) / "model.safetensors", {"format": "pt"})
        try:
            load_blip2(work)
        except UserError as error:
            return str(error).replace(work, "...")
    raise AssertionError("a spoiled file was loaded")


def traps(rows: Sequence[tuple[str, float, int]], captions: int) -> Figure:
    """Silent mistakes (name, how far the logits move, captions as before), as two meters read them.

    Left the logits, on a logarithmic axis with a grey band for what rounding does in float32; right the captions, one
    mark for each.
    """
    rows = sorted(rows, key=lambda row: row[1])
    figure = Figure(figsize=(9.2, 0.9 + 0.32 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1.6))
    left.axvspan(1e-7, ROUNDING, color=FORBIDDEN, zorder=0)
    left.text(1.3e-7, len(rows) - 0.55, "rounding", va="center", fontsize=8.5, color=QUIET)
    for line, (_, moved, kept) in enumerate(rows):
        colour = TEXT if kept == captions else WRONG
        left.plot([1e-7, moved], [line, line], color=colour, linewidth=1.4, linestyle="-")
        left.plot(moved, line, marker="o" if kept == captions else "X", markersize=9, linestyle="", color=colour)
        right.plot(range(kept), [line] * kept, marker="o", markersize=8, linestyle="", color=TEXT)
        right.plot(range(kept, captions), [line] * (captions - kept), marker="x", markersize=8, linestyle="",
                   color=WRONG, markeredgewidth=2)
        right.text(captions - 0.2, line, f"{kept} of {captions}", va="center", fontsize=9)
    left.set(xscale="log", xlim=(1e-7, 3), ylim=(-0.6, len(rows) - 0.1), xlabel="logits move by δ",
             title="meter 1: logits", yticks=range(len(rows)), yticklabels=[name for name, *_ in rows])
    left.set_xticks([1e-7, 1e-5, 1e-3, 0.1, 1], ["1e-7", "1e-5", "0.001", "0.1", "1"])
    left.minorticks_off()
    right.set(xlim=(-0.7, captions + 1.6), title="meter 2: captions", xticks=[], xlabel="● as before   ✗ another one")
    right.tick_params(left=False)
    for side in ("left", "bottom"):
        right.spines[side].set_visible(False)
    return figure
