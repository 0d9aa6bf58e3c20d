"""One training loop for everything that is trained here: both stages, and the small experts of the scenes."""

from __future__ import annotations

import contextlib
import gzip
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

from .. import UserError
from ..data.files import write_beside, write_json
from ..data.progress import progress_bar
from ..device import autocast, best_device
from ..lm.protocol import Blocks
from .distributed import over_processes, rank_and_size


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    learning_rate rises linearly over `warmup` steps, stays for `hold` more, then falls along a cosine to
    `min_lr_ratio` times itself. A step adds the gradients of `grad_accum` batches. `precision` is "float32",
    "bfloat16" (autocast), or "auto": bfloat16 where the device computes in it. Parameters whose names begin with
    `new_params` are newly initialised among trained ones: their learning rate is multiplied by `lr_scale`.
    Checkpoints are written every `checkpoint_every` steps. How it is computed, not what: `compile` runs the model
    through torch.compile, `checkpoint_blocks` makes the blocks of the frozen language model keep less for the
    backward pass and compute it again (see `lm.protocol`). Raises UserError for counts below 1.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 50
    hold: int = 0
    min_lr_ratio: float = 0.02
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    grad_clip: float = 1.0
    grad_accum: int = 1
    precision: str = "auto"
    new_params: str | None = None
    lr_scale: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    compile: bool = False
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be 1 or more")


Losses = Callable[[nn.Module, Any], Mapping[str, Tensor]]


class Batches(Protocol):
    """Where batches come from: `iterate(start)` gives those from number `start` on, always the same."""

    def iterate(self, start: int) -> Iterator[Any]: ...


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step, counted from 0: linear warm-up, then half a cosine (paper §3.4)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    top = config.warmup + config.hold
    progress = max(0, step - top) / max(1, config.steps - top)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Trainable parameters in groups: only matrices decay, not biases, norms and temperature."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            is_new = config.new_params is not None and name.startswith(config.new_params)
            groups.setdefault((decay, config.lr_scale if is_new else 1.0), []).append(parameter)
    return [{"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), parameters in groups.items()]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: parameters that require a gradient, and buffers outside frozen modules."""
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    frozen_modules = {name.rpartition(".")[0] for name, does in trains.items() if not does}
    return {name: tensor.detach() for name, tensor in model.state_dict().items()
            if trains.get(name, name.rpartition(".")[0] not in frozen_modules)}


def save_weights(model: nn.Module, path: Path, fingerprint: str) -> None:
    """Write what was trained to safetensors, with the fingerprint of its settings."""
    state = {name: tensor.cpu().contiguous() for name, tensor in trained_state(model).items()}
    write_beside(path, lambda partial: save_file(state, partial, metadata={"fingerprint": fingerprint}))


def load_weights(model: nn.Module, path: Path, fingerprint: str | None = None) -> None:
    """Read what `save_weights` wrote. Raises UserError when it belongs to other settings or another model."""
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get("fingerprint")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and train again") from None
    if fingerprint is not None and record != fingerprint:
        raise UserError(f"{path} was trained with other settings: choose another --out folder, or remove {path.parent}")
    wanted = trained_state(model)
    for name in wanted.keys() | state.keys():
        here, there = (tuple(s[name].shape) if name in s else "nothing" for s in (wanted, state))
        if here != there:
            raise UserError(f"{path} holds {there} for {name} where the model has {here}: it belongs to another recipe")
    model.load_state_dict(state, strict=False)


def read_log(path: str | Path) -> list[dict]:
    """The records of a JSON-lines training log, or of the same packed by gzip beside it, as the bridge that ships has
    it; a last line that a kill cut short is left out.
    """
    path, packed = Path(path), Path(f"{path}.gz")
    found = gzip.decompress(packed.read_bytes()) if packed.exists() and not path.exists() else path.read_bytes()
    try:
        return [json.loads(line) for line in found.decode().split("\n")[:-1]]  # what follows the last one is unfinished
    except ValueError as error:
        raise UserError(f"{path} is no log of a training ({error}): remove its folder and train again") from None


def run_fingerprint(config: TrainConfig, settings: Mapping[str, Any] | None = None) -> str:
    """What identifies a run's result: its settings, but for two that say how it is computed."""
    chosen = {key: value for key, value in asdict(config).items() if key not in ("compile", "checkpoint_blocks")}
    return json.dumps({"train": chosen, **(settings or {})}, sort_keys=True, default=str)


def checkpoint_blocks(model: nn.Module) -> None:
    """Checkpoint the blocks of the language models in `model` from now on: see `lm.protocol.Blocks`."""
    for part in model.modules():
        if isinstance(part, Blocks):
            part.checkpointed = True


class Trainer:
    """A model, its optimiser, and how one step of training goes; `train` adds files around it."""

    def __init__(self, model: nn.Module, losses: Losses, config: TrainConfig, device: torch.device,
                 name: str = "train"):
        self.model, self.losses, self.config, self.device, self.name = model.to(device), losses, config, device, name
        self.optimiser = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas,
                                           lr=config.learning_rate, fused=True)
        self.rank, self.processes = rank_and_size()
        if config.checkpoint_blocks:
            checkpoint_blocks(model)
        called = over_processes(model)
        if config.compile:
            called.compile(dynamic=True)  # one program for texts of every length
        # Frozen parameters take no part: the wrapper adds up the gradients of those that have one.
        self.called = DistributedDataParallel(called) if self.processes > 1 else called

    def step(self, number: int, batches: Iterator[Any]) -> dict[str, float]:
        """Step `number` of training, counted from 0, on the next `grad_accum` batches; returns what is logged of it.

        Raises UserError, and changes nothing, when the loss or its gradient is not finite.
        """
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + number + 500_009 * self.rank)  # dropout is each process's own
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(number, config) * group["lr_scale"]
        self.optimiser.zero_grad()
        sums: dict[str, Tensor] = {}
        image_ids: list[Tensor] = []
        for part in range(config.grad_accum):
            batch = next(batches).to(self.device)
            last = self.processes == 1 or part == config.grad_accum - 1  # only then gradients are added up
            with contextlib.nullcontext() if last else self.called.no_sync(), autocast(self.device, config.precision):
                output = self.losses(self.called, batch)
            (output["loss"] / config.grad_accum).backward()
            for key, value in output.items():
                sums[key] = sums.get(key, 0.0) + value.detach().float() / config.grad_accum
            image_ids.append(getattr(batch, "image_ids", torch.empty(0)))
        trained = (p for p in self.model.parameters() if p.requires_grad)  # a frozen part may keep an old gradient
        sums["gradient"] = nn.utils.clip_grad_norm_(trained, config.grad_clip)
        # The host waits for the device here.
        record = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        for key in ("loss", "gradient"):
            if not math.isfinite(record[key]):
                raise UserError(f"the {key} of {self.name} is {record[key]} at step {number + 1}, on images "
                                f"{torch.cat(image_ids).tolist()}: lower the learning rate")
        self.optimiser.step()
        return {"step": number + 1, "lr": learning_rate(number, config), **record}


def train(model: nn.Module, losses: Losses, batches: Batches, config: TrainConfig, folder: str | Path,
          settings: Mapping[str, Any] | None = None, name: str = "train", resume: bool = True,
          device: torch.device | None = None) -> list[dict]:
    """Train `model` in place; `folder` gets log.jsonl, checkpoint.pt, at the end model.safetensors. Returns the log.

    losses(model, batch) gives named scalars, the one to minimise as "loss". Every step seeds itself from `config.seed`
    and its number, so a run that was killed and resumed is the run that was not. A finished folder is loaded, not
    trained again; with `resume` = False its weights, checkpoint and log go first. In a process group (see
    `distributed`), `batches` gives each process its part, `losses` the loss of the whole, and process 0 writes; a run
    may go on with another number of processes. Without a `device` it trains on the one that MINBLIP2_DEVICE names, or
    on the CPU.
    Raises UserError when the folder belongs to other settings, or when the loss or its gradient is not finite.
    """
    folder, device = Path(folder), device or best_device("cpu")
    fingerprint = run_fingerprint(config, settings)
    final, saved, log = folder / "model.safetensors", folder / "checkpoint.pt", folder / "log.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rank = rank_and_size()[0]
    if not resume and rank == 0:  # killed before its end, the new run must not leave the old one's weights in its place
        for path in (final, saved):
            path.unlink(missing_ok=True)
    if resume and final.exists():
        load_weights(model.to(device), final, fingerprint)
        return read_log(log)

    trainer = Trainer(model, losses, config, device, name)
    first, records = 0, []
    if resume and saved.exists():
        first = load_checkpoint(trainer, saved, fingerprint)
        records = [record for record in read_log(log) if record["step"] <= first]
    if rank == 0:  # what was logged after the last checkpoint will be logged again
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_beside(log, lambda path: path.write_text(lines, encoding="utf-8"))

    model.train()
    source, began = batches.iterate(first * config.grad_accum), time.perf_counter()
    progress = progress_bar(range(first, config.steps), initial=first, total=config.steps, desc=name, unit="step",
                            hidden=rank > 0)
    with open(log if rank == 0 else os.devnull, "a", encoding="utf-8") as log_file, contextlib.closing(source):
        for step in progress:
            record = trainer.step(step, source)
            records.append(record)
            log_file.write(json.dumps(record) + "\n")
            progress.set_postfix(loss=f"{record['loss']:.3f}")
            if record["step"] % config.checkpoint_every == 0 and record["step"] < config.steps and rank == 0:
                log_file.flush()
                save_checkpoint(trainer, record["step"], saved, fingerprint)
    if rank == 0:
        write_json(folder / "seconds.json", {"seconds": time.perf_counter() - began, "from_step": first})
        save_weights(model, final, fingerprint)
        saved.unlink(missing_ok=True)
    return records


def save_checkpoint(trainer: Trainer, step: int, path: Path, fingerprint: str) -> None:
    """Keep what is needed to go on after `step` steps."""
    state = {"step": step, "fingerprint": fingerprint, "model": trained_state(trainer.model),
             "optimiser": trainer.optimiser.state_dict()}
    write_beside(path, lambda partial: torch.save(state, partial))


def load_checkpoint(trainer: Trainer, path: Path, fingerprint: str) -> int:
    """Go on from a checkpoint: the number of steps that it has behind it. Raises UserError when it cannot be used."""
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)
        step, known = state["step"], state["fingerprint"]
    except Exception as error:  # a broken archive makes the reader raise almost anything
        raise UserError(f"{path} cannot be read ({error}): remove it to start again") from None
    if known != fingerprint:
        raise UserError(f"{path} belongs to other settings: choose another --out folder, or remove {path.parent}")
    trainer.model.load_state_dict(state["model"], strict=False)
    trainer.optimiser.load_state_dict(state["optimiser"])
    return step
