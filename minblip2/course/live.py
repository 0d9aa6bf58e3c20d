"""The live page of the site: the bridge that ships as ONNX, the words it knows, and onnxruntime-web beside them.

A page in a browser draws scenes and lets the bridge caption them, with nothing sent anywhere. What runs models there
comes from npm, at the version of `RUNTIME`; whoever has no npm gets a site without this page.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from ..data.files import write_json
from ..data.scenes import BACKGROUNDS, COLOURS, HOLE, OUTLINES, SHAPES, SIDE, SIZES
from ..data.tokenizer import Tokenizer
from ..evaluation.scene_scores import QUESTIONS
from ..training.bridge import Bridge, load_bridge
from ..training.shipping import working_copy
from ..weights.blip2 import CAPTION
from ..weights.onnx import export_onnx
from .lesson import ROOT

RUNTIME = "onnxruntime-web@1.23.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs")


def words_of(tokenizer: Tokenizer) -> dict[str, object]:
    """What a page needs of a tokenizer whose vocabulary is whole words."""
    words = [tokenizer.backend.id_to_token(i) for i in range(tokenizer.backend.get_vocab_size())]
    return dict(words=words, bos=tokenizer.bos_ids, end=tokenizer.eos_id, unknown=words.index("[UNK]"))


def page_data(bridge: Bridge) -> dict[str, object]:
    """All numbers and words that the page takes from Python."""
    backbones, qformer = bridge.backbones, bridge.stage2.qformer
    return dict(
        side=SIDE, colours=COLOURS, backgrounds=BACKGROUNDS, sizes=SIZES, shapes=SHAPES, hole=HOLE,
        outlines={name: corners for name, corners in OUTLINES.items() if corners},
        mean=backbones.transform.mean, std=backbones.transform.std, queries=qformer.config.num_queries,
        blocks=[i + 1 for i, block in enumerate(qformer.blocks) if block.cross_attention is not None],
        prompt=QUESTIONS["things"], question=bridge.recipe.question, longest=CAPTION["max_length"],
        lm=words_of(backbones.lm_tokenizer), qformer=words_of(backbones.tokenizer))


def fetch_runtime(folder: Path) -> None:
    """Put onnxruntime-web into a folder. Raises CalledProcessError when npm cannot fetch it."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix",
                        temporary, RUNTIME], check=True)
        for name in RUNTIME_FILES:
            shutil.copyfile(Path(temporary) / "node_modules" / "onnxruntime-web" / "dist" / name, folder / name)


def build_live(page: Path, folder: Path) -> bool:
    """Complete a folder with the live page from the files of `page`; False, and nothing done, without npm."""
    if shutil.which("npm") is None:
        return False
    shutil.copytree(page, folder, dirs_exist_ok=True)
    bridge = load_bridge(working_copy(ROOT))
    export_onnx(bridge.backbones.encoder, bridge.stage1, bridge.stage2, folder)
    write_json(folder / "data.json", page_data(bridge))
    fetch_runtime(folder)
    return True
