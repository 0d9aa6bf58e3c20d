"""A batch spread over processes that torchrun has started, and what they tell each other.

One rule: every process computes the loss of the whole batch. What came from others is a constant to it; its own part
carries a gradient, `size` times as large, because DistributedDataParallel divides the sum of all gradients by `size`.
So the sum is what one process with the whole batch would get, and the backward pass of a gather sends nothing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import UserError
from ..qformer import ImageKV
from ..stage1 import Stage1, Stage1Output
from ..stage2 import Stage2, Stage2Output


def env_rank_and_size() -> tuple[int, int]:
    """The number of this process and how many torchrun has started: (0, 1) without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # others leave a RANK and a WORLD_SIZE behind, and nobody to talk to
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def rank_and_size() -> tuple[int, int]:
    """The number of this process in the group that is open, and how many are in it: (0, 1) without a group."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


# --- one batch, many processes ----------------------------------------------------------------------------------------


def gather_rows(rows: Tensor, rows_per_rank: list[int]) -> Tensor:
    """All processes' rows (n ...) of this one's (b ...). Other axes must agree everywhere."""
    rank, size = dist.get_rank(), len(rows_per_rank)
    padded = torch.cat([rows.detach(), rows.new_zeros(max(rows_per_rank) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in rows_per_rank]
    dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, rows_per_rank, strict=True)]
    parts[rank] = rows.view_as(rows)  # a tensor of its own: what else is made of the rows keeps its gradient
    if rows.requires_grad:
        parts[rank].register_hook(lambda gradient: size * gradient)
    return torch.cat(parts)


class DistributedBatch:
    """`rows` (b ...) of a batch are in this process; `rows_per_rank` says how many are in each."""

    def __init__(self, rows: Tensor):
        (self.rank, self.size), self.rows = rank_and_size(), rows

    @cached_property
    def rows_per_rank(self) -> list[int]:
        """How many rows each process has."""
        return gather_rows(torch.tensor([len(self.rows)], device=self.rows.device), [1] * self.size).tolist()

    @property
    def local_rows(self) -> slice:
        """Where the rows that are here stand in the whole batch."""
        return slice(sum(self.rows_per_rank[:self.rank]), sum(self.rows_per_rank[:self.rank + 1]))

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch's rows (n ...) of those that are here (b ...)."""
        return gather_rows(rows, self.rows_per_rank)

    def fetch_rows(self, rows: Tensor, wanted: Tensor) -> Tensor:
        """Of each row of the batch the one that it asks for, (b ...) of this process's rows; no others travel.

        wanted (n): which row each one of the whole batch asks for, the same on every process.
        """
        holder = torch.repeat_interleave(torch.tensor(self.rows_per_rank, device=wanted.device))[wanted]
        asked, holders = wanted.split(self.rows_per_rank), holder.split(self.rows_per_rank)
        sent = [some[who == self.rank] - self.local_rows.start for some, who in zip(asked, holders, strict=True)]
        mine, got = holders[self.rank], torch.empty_like(rows)
        dist.all_to_all_single(got, rows[torch.cat(sent)], mine.bincount(minlength=self.size).tolist(),
                               [len(some) for some in sent])
        return got[mine.argsort(stable=True).argsort()]  # they came in the order of their holders


def batch_mean(value: Tensor, count: int) -> Tensor:
    """The mean over the whole batch of a scalar that is the mean over `count` things of this process's part."""
    size = rank_and_size()[1]
    if size == 1:
        return value
    pair = torch.stack([value, value.new_tensor(count)])
    values, counts = gather_rows(rearrange(pair, "n -> 1 n"), [1] * size).unbind(dim=1)
    return (values * counts).sum() / counts.sum()


class DistributedStage1(nn.Module):
    """`Stage1` on a batch that is spread over processes: the losses, on each of them, are the whole batch's.

    The same three losses of the same model as in `Stage1.forward`, with what ITC compares gathered and hard negatives
    fetched from wherever they are.
    """

    def __init__(self, stage1: Stage1):
        super().__init__()
        self.stage1 = stage1

    def forward(self, image_features: Tensor, text_ids: Tensor, text_mask: Tensor, image_ids: Tensor | None = None,
                negatives: tuple[Tensor, Tensor] | None = None) -> Stage1Output:
        """As `Stage1.forward` with this process's part (b ...); negatives (n) are the whole batch's.

        Losses and itc_logits (n n) are the whole batch's, the other logits this process's.
        """
        stage1, batch = self.stage1, DistributedBatch(image_features)
        pairs = torch.arange(sum(batch.rows_per_rank), device=text_ids.device)
        image_ids = pairs if image_ids is None else batch.gather(image_ids)
        same_image = rearrange(image_ids, "b -> b 1") == rearrange(image_ids, "n -> 1 n")
        image_kv, cache = stage1.image_kv(image_features), stage1.qformer.new_cache()

        image_embeds, text_embeds = stage1.embed_image(image_kv, cache), stage1.embed_text(text_ids, text_mask)
        cosine = stage1.similarity(batch.gather(image_embeds), batch.gather(text_embeds))
        itc_logits = cosine.float() / stage1.temperature
        itc = stage1.itc_loss(itc_logits, same_image)

        itg, word_logits = stage1.itg_loss(text_ids, text_mask, cache)
        itg = batch_mean(itg, len(word_logits))

        negatives = stage1.sample_negatives(itc_logits, same_image) if negatives is None else negatives
        pairs = self.with_negatives(batch, image_features, image_kv, text_ids, text_mask, negatives)
        itm_logits, itm_labels = stage1.itm_triples(*pairs)
        itm = batch_mean(F.cross_entropy(itm_logits.float(), itm_labels), len(image_features))
        return Stage1Output(itc + itm + itg, itc, itm, itg, itc_logits, itm_logits, itm_labels, word_logits,
                            stage1.temperature)

    def with_negatives(self, batch: DistributedBatch, image_features: Tensor, image_kv: ImageKV, text_ids: Tensor,
                       text_mask: Tensor, negatives: tuple[Tensor, Tensor]
                       ) -> tuple[ImageKV, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What `itm_triples` takes: own pairs (b), behind them their wrong images and texts (b), and where those are.

        Of the wrong images the frozen features (b v image_width) travel and are projected here: they are smaller than
        keys and values, and need no gradient from afar. Process 0 has drawn: rounding may differ from device to device.
        """
        for draw in negatives:
            dist.broadcast(draw, 0)
        wrong_image, wrong_text = negatives
        wrong_kv = self.stage1.image_kv(batch.fetch_rows(image_features, wrong_image))
        both = ImageKV(None if own is None else (torch.cat([own[0], wrong[0]]), torch.cat([own[1], wrong[1]]))
                       for own, wrong in zip(image_kv, wrong_kv, strict=True))
        ids, mask = (torch.cat([part, batch.gather(part)[wrong_text[batch.local_rows]]])
                     for part in (text_ids, text_mask))
        behind = torch.arange(len(text_ids), 2 * len(text_ids), device=text_ids.device)
        return both, ids, mask, (behind, behind)


class DistributedStage2(nn.Module):
    """`Stage2` on a batch that is spread over processes: the loss, on each of them, is the whole batch's."""

    def __init__(self, stage2: Stage2):
        super().__init__()
        self.stage2 = stage2

    def forward(self, *inputs: Tensor) -> Stage2Output:
        """As `Stage2.forward`, with this process's part of the batch; word_logits are this process's."""
        out = self.stage2(*inputs)
        return Stage2Output(batch_mean(out.loss, len(out.word_logits)), out.word_logits)


def over_processes(model: nn.Module) -> nn.Module:
    """The model as it is called on a batch: itself, or, in a process group, its form for a batch spread over it.

    Raises UserError for a stage with a `forward` of its own, which that form would not call.
    """
    if rank_and_size()[1] > 1:
        for kind, form in ((Stage1, DistributedStage1), (Stage2, DistributedStage2)):
            if isinstance(model, kind):
                if type(model).forward is not kind.forward:
                    raise UserError(f"{type(model).__name__} has a forward of its own, which several processes would "
                                    f"leave out: override parts of {kind.__name__} instead, or train in one process")
                return form(model)
    return model


# --- beginning and end ------------------------------------------------------------------------------------------------


_number = itertools.count()  # all processes come by the same places in the same order


@cache
def _store() -> dist.Store:
    """Where processes leave notes for each other, before and after there is a group.

    Raises UserError when nobody has answered there for two minutes.
    """
    where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        return next(dist.rendezvous("env://", timeout=timedelta(minutes=2)))[0]
    except (RuntimeError, ValueError) as error:
        raise UserError(f"this process waited two minutes at {where} for the others of its run, in vain: see what "
                        f"torchrun says of them, then start all of them again ({str(error).splitlines()[0]})") from None


@contextmanager
def prepare_once() -> Iterator[None]:
    """Process 0 does what stands inside; the others wait, for days if need be, then do it too and find it done."""
    (rank, size), done = env_rank_and_size(), f"done {next(_number)}"
    if rank:
        _store().wait([done], timedelta(days=7))
    yield
    if size > 1 and rank == 0:
        _store().set(done, "")


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """While open, processes started by torchrun form a group that computes on such a device; one alone stays as it is.

    Raises UserError when another process has ended and this one cannot go on.
    """
    rank, size = env_rank_and_size()
    if size == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size,
                            store=dist.PrefixStore(f"group {next(_number)}", _store()))
    try:
        yield
    except Exception as error:
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error):
            raise UserError("another process of this run has ended, so this one stops: see what torchrun says of it, "
                            "then run the same command again, with as many processes as you like; it goes on from the "
                            f"last checkpoint ({str(error).splitlines()[0]})") from None
        is_first_to_report()  # asked before the others can notice that this one leaves: the cause is told, no sequel
        raise
    finally:
        dist.destroy_process_group()
        time.sleep(0.5)  # while Python stands gloo's threads may drop their last tensors (pytorch/pytorch#179291)


def set_local_device() -> None:
    """Let this process compute on a GPU of its own, where there are any."""
    if torch.cuda.is_available() and env_rank_and_size()[1] > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


@cache
def is_first_to_report() -> bool:
    """Whether this process is to print an error: it is the first that asks, and asks once."""
    try:
        return env_rank_and_size()[1] == 1 or _store().add("said", 1) == 1
    except (RuntimeError, UserError):  # those that could be asked have ended
        return True
