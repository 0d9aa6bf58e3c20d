"""Loading never holds two copies of a model: its peak memory is measured in a process of its own."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from minblip2.lm.opt import OPT, OPTConfig
from minblip2.qformer import QFormer, QFormerConfig
from minblip2.stage2 import Stage2
from minblip2.vit import EVA_G, ViT
from minblip2.weights import export

from .parity import note

LOAD = """
import sys
from minblip2.weights.official import load_blip2

def memory(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))

before = memory("VmRSS")
model = load_blip2(sys.argv[1])
print(memory("VmHWM"), before)  # not getrusage: its peak would begin with that of the process that started this one
"""


def save_zeros(tensors, path, metadata):
    """A safetensors file of the same names and shapes that holds only zeros, and so needs no time and no disk."""
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=[begin, end])
    header = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_memory_of_loading_stays_below_1_3_times_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "save_file", save_zeros)
    with torch.device("meta"):
        qformer = QFormer(QFormerConfig(layers=3))
        stage2 = Stage2(torch.nn.LayerNorm(1408), qformer, OPT(OPTConfig(width=1536, layers=5, mlp_width=6144)))
        vit = ViT(replace(EVA_G, layers=5))
    export.save_pretrained(tmp_path, vit.to_empty(device="cpu"), stage2.to_empty(device="cpu"), image_token=50271)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 1.4e9 < size < 1.6e9
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True,
                          encoding="utf-8")
    peak, before = map(int, done.stdout.split())
    note(peak / size)
    print(f"{size / 1e9:.2f} GB of files, peak {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB before")
    assert peak < 1.3 * size
