"""What the tests of equality share: weights in which nothing is zero, and a difference relative to the scale."""

import os

import torch
from torch import Tensor, nn

from minblip2.qformer import QFormerConfig

TINY = QFormerConfig(width=24, layers=3, heads=3, mlp_width=40, num_queries=4, image_width=20, cross_attention_every=2,
                     vocab_size=50, max_positions=40, dropout=0.0)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fresh random parameters, in place: no weight, bias or scale is zero, one or tiny, so each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight") or "scale" in name:
            noise = 1 + 0.2 * noise
        else:  # biases small enough not to drown the inputs
            noise = noise * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
        parameter.copy_(noise)
    return module.eval()


MEASURED: dict[str, list[float]] = {}  # test -> what it has compared so far; parity_table.py makes a table of it


def note(value: float) -> float:
    """Remember a figure under the test that measured it."""
    MEASURED.setdefault(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0], []).append(value)
    return value


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference as a fraction of the largest value; shapes must agree."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return note(((ours - theirs).abs().max() / theirs.abs().max()).item())


def lengths_mask(lengths: list[int], side: str = "right") -> Tensor:
    """A mask (b t): True for `lengths` tokens of each row, padding on the given side."""
    place = torch.arange(max(lengths)).expand(len(lengths), -1)
    mask = place < torch.tensor(lengths)[:, None]
    return mask if side == "right" else mask.flip(1)
