"""What makes a small language model learn to bind within minutes: readers of its first block.

To look up what stood beside a word, a later block must know at each token which ones stood before it. A head that sees
the tokens before is what it takes; by itself, it forms late or never in models this small.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..lm.opt import OPT

LOOK_BACK = 8  # tokens: with five it looks up as much in text, but less through a bridge (benchmarks/binding.py)


class LookBack(nn.Module):
    """A language model, and linear readers of its first block's states that are thrown away after training: which
    token stood one before, two before, and so on up to `look_back` before?"""

    def __init__(self, lm: OPT, look_back: int = LOOK_BACK):
        super().__init__()
        self.lm = lm
        self.readers = nn.ModuleList(nn.Linear(lm.width, lm.vocab_size) for _ in range(look_back))

    def forward(self, ids: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """The readers' losses, summed, on the first block's states (b t e) of ids (b t) with mask (b t)."""
        total = states.new_zeros(())
        for back, reader in enumerate(self.readers, start=1):
            there = mask[:, back:]
            total = total + F.cross_entropy(reader(states[:, back:][there]).float(), ids[:, :-back][there])
        return total
