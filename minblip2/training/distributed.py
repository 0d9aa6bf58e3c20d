"""A batch spread over processes that torchrun has started, and what they tell each other.

One rule: every process computes the loss of the whole batch. What came from others is a constant to it; its own part
carries a gradient, `size` times as large, because DistributedDataParallel divides the sum of all gradients by `size`.
So the sum is what one process with the whole batch would get, and the backward pass of a gather sends nothing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, cached_property

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from .. import UserError
from ..qformer import ImageKV
from ..stage1 import OneProcess, Stage1


def launched() -> tuple[int, int]:
    """The number of this process and how many torchrun has started: (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rank_and_size() -> tuple[int, int]:
    """The number of this process in the group that is open, and how many are in it: (0, 1) without a group."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


# --- one batch, many processes ----------------------------------------------------------------------------------------


def gather_rows(rows: Tensor, held: list[int]) -> Tensor:
    """All processes' rows (n ...) of this one's (b ...); held: how many each has. Other axes must agree everywhere."""
    rank, size = dist.get_rank(), len(held)
    padded = torch.cat([rows.detach(), rows.new_zeros(max(held) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in held]
    dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, held, strict=True)]
    parts[rank] = rows.view_as(rows)  # a tensor of its own: what else is made of the rows keeps its gradient
    if rows.requires_grad:
        parts[rank].register_hook(lambda gradient: size * gradient)
    return torch.cat(parts)


class ManyProcesses(OneProcess):
    """`rows` (b ...) of a batch are here; `held` says how many each process has, `own` where these are in the whole."""

    def __init__(self, rows: Tensor):
        (self.rank, self.size), self.rows = rank_and_size(), rows

    @cached_property
    def held(self) -> list[int]:
        """How many rows each process has."""
        return gather_rows(torch.tensor([len(self.rows)], device=self.rows.device), [1] * self.size).tolist()

    @property
    def own(self) -> slice:
        """Where the rows that are here stand in the whole batch."""
        return slice(sum(self.held[:self.rank]), sum(self.held[:self.rank + 1]))

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch's rows (n ...) of those that are here (b ...)."""
        return gather_rows(rows, self.held)

    def mean(self, value: Tensor, count: int) -> Tensor:
        """The mean over the whole batch of a scalar that is the mean over `count` things here."""
        pair = torch.stack([value, value.new_tensor(count)])
        values, counts = gather_rows(rearrange(pair, "n -> 1 n"), [1] * self.size).unbind(dim=1)
        return (values * counts).sum() / counts.sum()

    def bring(self, model: Stage1, image: Tensor, image_kv: ImageKV, texts: tuple[Tensor, Tensor],
              negatives: tuple[Tensor, Tensor]) -> tuple[ImageKV, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Own pairs, then the wrong images and texts for them; texts (n t) and negatives (n) are the whole batch's.

        Of the wrong images the frozen features (b v image_width) travel and are projected here: they are smaller than
        keys and values, and need no gradient from afar. Process 0 has drawn: rounding may differ from device to device.
        """
        for draw in negatives:
            dist.broadcast(draw, 0)
        wrong_image, wrong_text = negatives
        wrong_kv = model.image_kv(self.fetch(image, wrong_image))
        both = ImageKV(tuple((torch.cat([own[0], wrong[0]]), torch.cat([own[1], wrong[1]]))
                             for own, wrong in zip(image_kv.layers, wrong_kv.layers, strict=True)))
        ids, mask = (torch.cat([part[self.own], part[wrong_text[self.own]]]) for part in texts)
        later = torch.arange(len(image), 2 * len(image), device=image.device)
        return both, ids, mask, (later, later)

    def fetch(self, rows: Tensor, wanted: Tensor) -> Tensor:
        """Of each row of the batch the one that it asks for, (b ...) of this process's rows; no others travel.

        wanted (n): which row each one of the whole batch asks for, the same on every process.
        """
        holder = torch.repeat_interleave(torch.tensor(self.held, device=wanted.device))[wanted]
        asked, holders = wanted.split(self.held), holder.split(self.held)
        sent = [some[who == self.rank] - self.own.start for some, who in zip(asked, holders, strict=True)]
        mine, got = holders[self.rank], torch.empty_like(rows)
        dist.all_to_all_single(got, rows[torch.cat(sent)], mine.bincount(minlength=self.size).tolist(),
                               [len(some) for some in sent])
        return got[mine.argsort(stable=True).argsort()]  # they came in the order of their holders


def batch_ranks(rows: Tensor) -> OneProcess:
    """Who holds the batch of which `rows` (b ...) are here."""
    return ManyProcesses(rows) if rank_and_size()[1] > 1 else OneProcess()


# --- beginning and end ------------------------------------------------------------------------------------------------


_number = itertools.count()  # all processes come by the same places in the same order


@cache
def _store() -> dist.Store:
    """Where processes leave notes for each other, before and after there is a group."""
    return next(dist.rendezvous("env://"))[0]


@contextmanager
def prepare_once() -> Iterator[None]:
    """Process 0 does what stands inside; the others wait, for days if need be, then do it too and find it done."""
    (rank, size), done = launched(), f"done {next(_number)}"
    if rank:
        _store().wait([done], timedelta(days=7))
    yield
    if size > 1 and rank == 0:
        _store().set(done, "")


@contextmanager
def process_group() -> Iterator[None]:
    """While open, processes started by torchrun form a group; one alone stays as it is.

    Raises UserError when another process has ended and this one cannot go on.
    """
    rank, size = launched()
    if size == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=rank, world_size=size,
                            store=dist.PrefixStore(f"group {next(_number)}", _store()))
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError("another process of this run has ended, so this one stops: see what torchrun says of it, "
                            "then run the same command again, with as many processes as you like; it goes on from the "
                            f"last checkpoint ({str(error).splitlines()[0]})") from None
        raise
    finally:
        dist.destroy_process_group()


def take_device() -> None:
    """Let this process compute on a GPU of its own, where there are any."""
    if torch.cuda.is_available() and launched()[1] > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def first_to_speak() -> bool:
    """Whether this process is to print an error: it is the first that asks."""
    return launched()[1] == 1 or _store().add("said", 1) == 1
