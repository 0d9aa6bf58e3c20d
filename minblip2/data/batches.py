"""Batches of pictures and captions for both stages: by length, and a pure function of seed and step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from .. import UserError
from .workers import prefetch


@dataclass
class Batch:
    """image_features (b v e) float32, text_ids (b t) long, text_mask (b t) boolean (True = not padding), image_ids (b)
    long.
    """

    image_features: Tensor
    text_ids: Tensor
    text_mask: Tensor
    image_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; from pinned memory it is copied while the device computes."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin(self) -> Batch:
        """The same batch in memory that a CUDA GPU may read by itself; without one, as it is."""
        if not torch.cuda.is_available():
            return self
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


class PairBatches:
    """Batches of (picture, caption) pairs of similar length; batch(step) depends on nothing but seed and step.

    views: one array (n v e) or more, each with one row per picture, of which a pair draws one; image_ids (n): the data
    set's ids; pairs_image and pairs_ids: row and token ids of each pair. `keep_tokens` visual tokens, drawn anew for
    each batch (the first always stays), stand for the whole image: cheaper, and another view each time (arXiv
    2212.00794). An epoch visits every pair once, but for the remainder that fills no batch; every batch has two
    pictures or more, so that each pair has an admissible negative. Of `processes` that share a batch, each calls for
    its own part of it, all of them as long as the whole's longest text. Raises UserError when the data cannot give
    that.
    """

    def __init__(self, views: Sequence[np.ndarray], pairs_image: Sequence[int], pairs_ids: Sequence[Sequence[int]],
                 image_ids: Sequence[int], batch_size: int, seed: int, pad_id: int,
                 keep_tokens: int | None = None, rank: int = 0, processes: int = 1):
        self.keep_tokens, self.rank, self.processes = keep_tokens, rank, processes
        self.views, self.pairs_ids, self.batch_size, self.pad_id = views, pairs_ids, batch_size, pad_id
        self.seed = seed % 2**63  # numpy takes no negative seed
        self.rows, self.image_ids = np.asarray(pairs_image, dtype=np.int64), np.asarray(image_ids, dtype=np.int64)
        self.lengths = np.array([len(ids) for ids in pairs_ids], dtype=np.int64)
        n = len(pairs_ids)
        images = {len(view) for view in views}
        if len(self.rows) != n or images != {len(self.image_ids)}:
            raise UserError(f"{len(self.rows)} picture rows for {n} captions, {sorted(images)} features for "
                            f"{len(self.image_ids)} image ids: each two must be equally many")
        if batch_size < 2 or n < batch_size:
            raise UserError(f"batch size is {batch_size} for {n} pairs: choose at least 2, at most all pairs")
        if batch_size < processes:
            raise UserError(f"a batch of {batch_size} pairs cannot be spread over {processes} processes: "
                            "start fewer, or choose a larger batch size")
        if self.rows.min() < 0 or self.rows.max() >= len(self.image_ids) or not self.lengths.all():
            raise UserError(f"a pair has no tokens or a picture row outside 0..{len(self.image_ids) - 1}: "
                            "rebuild the pairs")
        if keep_tokens is not None and not 1 <= keep_tokens <= views[0].shape[1]:
            raise UserError(f"keep_tokens is {keep_tokens} of {views[0].shape[1]} visual tokens: choose at least 1, at "
                            f"most all")
        self.images = self.image_ids[self.rows]
        most = np.unique(self.images, return_counts=True)[1].max()
        if n - most < len(self):  # each batch needs one pair of another picture than the most frequent
            raise UserError(f"one picture has {most} of the {n} pairs, too many for {len(self)} batches of "
                            f"{batch_size} with two pictures each: give more pictures or a larger batch size")
        self._epoch: tuple[int, np.ndarray] | None = None  # one attribute, set in one step: threads may share it

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.rows) // self.batch_size

    def plan(self, epoch: int) -> np.ndarray:
        """Which pairs form each batch of an epoch: (batches batch_size) indices."""
        random, used = np.random.default_rng([self.seed, epoch]), len(self) * self.batch_size
        order = random.permutation(len(self.rows))
        for start in range(0, used, 16 * self.batch_size):
            window = order[start:min(start + 16 * self.batch_size, used)]
            window[:] = window[self.lengths[window].argsort(kind="stable")]
        images = self.images[order]
        for first in range(0, used, self.batch_size):
            if (other := images != images[first])[first:first + self.batch_size].any():
                continue
            # All of one picture: swap a pair with a batch that keeps a second picture, or with the remainder. If none
            # had one to give, each other batch would hold at most one, and the check in __init__ would have failed.
            kept = other[:used].reshape(-1, self.batch_size).sum(axis=1) > 1
            givers = np.flatnonzero(other & np.append(kept.repeat(self.batch_size), np.ones(len(order) - used, bool)))
            giver = givers[abs(self.lengths[order[givers]] - self.lengths[order[first]]).argmin()]
            for array in (order, images):
                array[[first, giver]] = array[[giver, first]]
        return random.permutation(order[:used].reshape(-1, self.batch_size))

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from the start of training; texts padded to the longest.

        What is drawn is drawn for the whole batch, whatever part of it is ours: so training may go on with more
        processes, or fewer.
        """
        epoch, place = divmod(step, len(self))
        if (known := self._epoch) is None or known[0] != epoch:
            known = self._epoch = epoch, self.plan(epoch)
        pairs = known[1][place]
        ids = torch.full((self.batch_size, int(self.lengths[pairs].max())), self.pad_id)
        for row, pair in zip(ids, pairs, strict=True):
            row[:self.lengths[pair]] = torch.tensor(self.pairs_ids[pair])
        mask = torch.arange(ids.shape[1]) < torch.from_numpy(self.lengths[pairs]).unsqueeze(1)
        random = np.random.default_rng([self.seed, step, 1])
        drawn, tokens = random.integers(len(self.views), size=len(pairs)), np.arange(self.views[0].shape[1])
        if self.keep_tokens is not None:
            tokens = np.append(0, np.sort(random.choice(tokens[1:], size=self.keep_tokens - 1, replace=False)))
        ours = slice(*(len(pairs) * rank // self.processes for rank in (self.rank, self.rank + 1)))
        image = np.stack([self.views[view][row][tokens]
                          for view, row in zip(drawn[ours], self.rows[pairs[ours]], strict=True)])
        return Batch(torch.from_numpy(image.astype(np.float32)), ids[ours], mask[ours],
                     torch.from_numpy(self.images[pairs[ours]]))

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches without end from a step on, the next one prepared in the background."""
        return prefetch(lambda step: self.batch(step).pin(), itertools.count(start), 1, 1)
