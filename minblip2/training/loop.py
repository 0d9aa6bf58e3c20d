"""One training loop for everything that is trained here: both stages, and the small experts of the scenes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .. import UserError
from ..data.files import write_beside
from ..device import autocast, best_device
from .distributed import rank_and_size
from .recompute import recompute


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    learning_rate rises linearly over `warmup` steps, then falls along a cosine to `floor` times itself. A step adds
    the gradients of `accumulate` batches. `precision` is "float32", "bfloat16" (autocast), or "auto": bfloat16 where
    the device computes in it. Parameters whose names begin with `fresh` start from nothing among trained ones, and
    learn `gain` times as fast. Checkpoints are written every `checkpoint_every` steps. How it is computed, not what:
    `compile` runs the model through torch.compile, `recompute` lets the blocks of a frozen language model forget what
    they keep for the gradient and compute it again (arXiv 1604.06174).
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 50
    floor: float = 0.02
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "auto"
    fresh: str | None = None
    gain: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    compile: bool = False
    recompute: bool = False


class Batches(Protocol):
    """Where batches come from: `iterate(start)` gives those from number `start` on, always the same."""

    def iterate(self, start: int) -> Iterator[Any]: ...


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step, counted from 0: linear warm-up, then half a cosine (paper §3.4)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (config.floor + (1 - config.floor) * (1 + math.cos(math.pi * progress)) / 2)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Trainable parameters in groups: only matrices decay, not biases, norms and temperature; `gain` as told."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            gain = config.gain if config.fresh is not None and name.startswith(config.fresh) else 1.0
            groups.setdefault((decay, gain), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "gain": gain} for (decay, gain), params in groups.items()]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: parameters that require a gradient, and buffers outside frozen modules."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    frozen_modules = {name.rpartition(".")[0] for name in frozen}
    return {name: tensor.detach() for name, tensor in model.state_dict().items()
            if name not in frozen and name.rpartition(".")[0] not in frozen_modules}


def save_weights(model: nn.Module, path: Path, fingerprint: str) -> None:
    """Write what was trained to safetensors, with the fingerprint of its settings."""
    state = {name: tensor.cpu().contiguous() for name, tensor in trained_state(model).items()}
    write_beside(path, lambda partial: save_file(state, partial, metadata={"fingerprint": fingerprint}))


def load_weights(model: nn.Module, path: Path, fingerprint: str | None = None) -> None:
    """Read what `save_weights` wrote. Raises UserError when it belongs to other settings or another model."""
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get("fingerprint")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and train again") from None
    if fingerprint is not None and told != fingerprint:
        raise UserError(f"{path} was trained with other settings: choose another --out folder, or remove {path.parent}")
    wanted = trained_state(model)
    for name in wanted.keys() | state.keys():
        here, there = (tuple(s[name].shape) if name in s else "nothing" for s in (wanted, state))
        if here != there:
            raise UserError(f"{path} holds {there} for {name} where the model has {here}: it belongs to another recipe")
    model.load_state_dict(state, strict=False)


def read_log(path: str | Path) -> list[dict]:
    """The records of a JSON-lines training log; a last line that a kill cut short is left out."""
    lines = Path(path).read_text().split("\n")[:-1]  # what stands behind the last newline was not finished
    return [json.loads(line) for line in lines]


def train(model: nn.Module, losses: Callable[[nn.Module, Any], Mapping[str, Tensor]], batches: Batches,
          config: TrainConfig, folder: str | Path, settings: Mapping[str, Any] | None = None, name: str = "train",
          resume: bool = True, device: torch.device | None = None) -> list[dict]:
    """Train `model` in place; `folder` gets log.jsonl, checkpoint.pt, at the end model.safetensors. Returns the log.

    losses(model, batch) gives named scalars, the one to minimise as "loss". Every step seeds itself from `config.seed`
    and its number, so a run that was killed and resumed is the run that was not. A finished folder is loaded, not
    trained again. In a process group (see `distributed`), `batches` gives each process its part, `losses` the loss of
    the whole, and process 0 writes; a run may go on with another number of processes.
    Raises UserError when the folder belongs to other settings, or when the loss is not finite.
    """
    folder, device = Path(folder), device or best_device()
    rank, processes = rank_and_size()
    chosen = {key: value for key, value in asdict(config).items() if key not in ("compile", "recompute")}
    fingerprint = json.dumps({"train": chosen, **(settings or {})}, sort_keys=True, default=str)
    final, saved, log = folder / "model.safetensors", folder / "checkpoint.pt", folder / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    model.to(device)
    if resume and final.exists():
        load_weights(model, final, fingerprint)
        return read_log(log)

    optimiser = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas,
                                  lr=config.learning_rate, fused=True)
    first, records = 0, []
    if resume and saved.exists():
        try:
            state = torch.load(saved, map_location=device, weights_only=True)
        except Exception as error:  # a broken archive makes the reader raise almost anything
            raise UserError(f"{saved} cannot be read ({error}): remove it to start again") from None
        if state["fingerprint"] != fingerprint:
            raise UserError(f"{saved} belongs to other settings: choose another --out folder, or remove {folder}")
        model.load_state_dict(state["model"], strict=False)
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
        records = [record for record in read_log(log) if record["step"] <= first]
    if rank == 0:  # what was logged after the last checkpoint will be logged again
        write_beside(log, lambda path: path.write_text("".join(json.dumps(record) + "\n" for record in records)))

    model.train()
    if config.recompute:
        recompute(model)
    if config.compile:
        model.compile(dynamic=True)  # one program for texts of every length
    # Frozen parameters take no part: the wrapper adds up the gradients of those that have one.
    spread = DistributedDataParallel(model) if processes > 1 else model
    source, began = batches.iterate(first * config.accumulate), time.perf_counter()
    progress = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=name, unit="step",
                    disable=rank > 0)
    with open(log if rank == 0 else os.devnull, "a") as log_file, contextlib.closing(source):
        for step in progress:
            torch.manual_seed(config.seed * 1_000_003 + step + 500_009 * rank)  # dropout is each process's own
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, config) * group["gain"]
            optimiser.zero_grad()
            sums: dict[str, Tensor] = {}
            images: list[Tensor] = []
            for part in range(config.accumulate):
                batch = next(source).to(device)
                last = processes == 1 or part == config.accumulate - 1  # only then gradients are added up
                with contextlib.nullcontext() if last else spread.no_sync(), autocast(device, config.precision):
                    parts = losses(spread, batch)
                (parts["loss"] / config.accumulate).backward()
                for key, value in parts.items():
                    sums[key] = sums.get(key, 0.0) + value.detach().float() / config.accumulate
                images.append(getattr(batch, "image_ids", torch.empty(0)))
            sums["gradient"] = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            # The host waits for the device here and nowhere else in a step.
            total = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
            if not math.isfinite(total["loss"]):
                raise UserError(f"the loss of {name} is {total['loss']} at step {step + 1}, on images "
                                f"{torch.cat(images).tolist()}: lower the learning rate")
            optimiser.step()
            record = {"step": step + 1, "rate": learning_rate(step, config), **total}
            records.append(record)
            log_file.write(json.dumps(record) + "\n")
            progress.set_postfix({key: f"{value:.3f}" for key, value in total.items() if key != "gradient"})
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps and rank == 0:
                log_file.flush()
                state = {"step": step + 1, "fingerprint": fingerprint, "model": trained_state(model),
                         "optimiser": optimiser.state_dict()}
                write_beside(saved, lambda path, state=state: torch.save(state, path))
    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps({"seconds": time.perf_counter() - began, "from_step": first}))
        save_weights(model, final, fingerprint)
        saved.unlink(missing_ok=True)
    return records
