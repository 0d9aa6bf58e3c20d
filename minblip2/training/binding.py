"""What makes a small language model learn to bind within minutes: a quiet start, and readers of its first block.

To look up what stood beside a word, a later block must know at each token which ones stood before it. A head that sees
the token before is what it takes; by itself, it forms late or never in models this small.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lm.opt import OPT

LOOK_BACK = 3  # tokens: in "what shape is the red thing answer" the word to look up stands two before the last


@torch.no_grad()
def quiet_start(model: OPT) -> None:
    """Start with words as long as what a block adds, and with positions that a head can shift.

    As PyTorch starts its layers, each branch adds several times a word's own embedding, and nothing is copied.
    Positions are sines of 2 down to .02 radians a token: to see the token before, a head needs one rotation of them.
    """
    nn.init.normal_(model.token_embedding.weight, std=0.05)
    positions, width = model.position_embedding.weight.shape
    angles = torch.arange(positions)[:, None] * torch.logspace(math.log10(2), math.log10(0.02), width // 2)
    model.position_embedding.weight.copy_(0.07 * torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))
    for block in model.blocks:
        for last in (block.attention.out, block.mlp.down):
            last.weight.mul_(0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


class LookBack(nn.Module):
    """A language model, and linear readers of its first block's states that are thrown away after training: which
    token stood one before, two before, three before?"""

    def __init__(self, lm: OPT):
        super().__init__()
        self.lm = lm
        self.readers = nn.ModuleList(nn.Linear(lm.width, lm.vocab_size) for _ in range(LOOK_BACK))

    def forward(self, ids: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """The readers' losses, summed, on the first block's states (b t e) of ids (b t) with mask (b t)."""
        losses = []
        for back, reader in enumerate(self.readers, start=1):
            there = mask[:, back:]
            losses.append(F.cross_entropy(reader(states[:, back:][there]).float(), ids[:, :-back][there]))
        return sum(losses)
