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
from .viz import FORBIDDEN, IMAGE, QUERY, TEXT, WRONG

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
    vision = {theirs: getattr(EVA_G, ours) for theirs, ours in EVA.settings.items()} | {"layer_norm_eps": 1e-5}
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
    """How lesson 16 proves that two implementations are one model: one file, two readers, the same logits."""
    boxes: dict[str, Box] = {
        "file": (0, 0, 13, 6, "a file:\nnames, numbers", None),
        "ours": (29, 0, 13, 6, "our modules", QUERY),
        "hub": (53, 0, 17, 6, "a file in the\nofficial layout", None),
        "theirs": (80, 0, 13, 6, "transformers'\nclass", TEXT),
        "same": (34, 10.5, 54, 4.5, "the same logits?", IMAGE)}
    return flow(boxes, (("file", "ours", "table of names"), ("ours", "hub", "export"), ("hub", "theirs", "load"),
                        ("ours", "same", "logits"), ("theirs", "same", "logits")))


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
    """Silent mistakes (name, how far the logits move, captions as before) as dots on a logarithmic axis.

    A grey band has what rounding does in float32.
    """
    rows = sorted(rows, key=lambda row: row[1])
    figure = Figure(figsize=(8.8, 1.2 + 0.32 * len(rows)), layout="constrained")
    panel = figure.subplots()
    panel.axvspan(1e-7, ROUNDING, color=FORBIDDEN, label="rounding")
    for line, (_, moved, kept) in enumerate(rows):
        same = kept == captions
        panel.plot(moved, line, marker="o" if same else "X", markersize=9, linestyle="", color=TEXT if same else WRONG,
                   label="all captions as before" if same else "some captions changed")
        panel.text(moved * 1.5, line, f"{kept} of {captions} captions as before", va="center", fontsize=9)
    panel.set(xscale="log", xlim=(1e-7, 200), ylim=(-0.6, len(rows) - 0.4), xlabel="logits move by δ",
              yticks=range(len(rows)), yticklabels=[name for name, *_ in rows])
    ticks = [10.0**power for power in range(-7, 1)]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    legend = {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend))
    return figure
