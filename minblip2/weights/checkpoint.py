"""Checkpoint files: tensors are read one at a time, matched by name, and every single one is accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import UserError
from .keymap import Naming, Stacked, spell_out, translate


class HubConfig(dict):
    """A model's settings; reading one that is not there raises a UserError that names it."""

    def __missing__(self, key: str):
        raise UserError(f"this model's config.json lacks {key!r}: fetch it again")


def read_config(folder: str | Path) -> HubConfig:
    """The `config.json` of a hub folder. Raises UserError when it is missing or not JSON."""
    path = Path(folder) / "config.json"
    try:
        return HubConfig(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: give the folder of a downloaded model") from None
    except (TypeError, ValueError) as error:  # no object, no JSON, no UTF-8
        raise UserError(f"{path} is not JSON ({error}): fetch it again") from None


@dataclass
class Checkpoint:
    """Named tensors: their shapes, and a way to read each of them once."""

    source: str
    shapes: dict[str, tuple[int, ...]]
    tensors: Iterable[tuple[str, Tensor]]


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a hub folder: the one, or those of its index. Raises UserError when one is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no .safetensors file: fetch the weights in that format")
        return files
    try:
        files = sorted({folder / Path(name).name
                        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{index} is not an index of weights ({error!r}): fetch it again") from None
    for path in files:
        if not path.exists():
            raise UserError(f"{path} is missing, though {index.name} names it: fetch it as well")
    return files


def open_hub(folder: str | Path) -> Checkpoint:
    """The safetensors files of a hub folder, in one piece or sharded. Raises UserError when they cannot be read."""
    where: dict[str, Path] = {}
    shapes = {}
    for path in shards(Path(folder)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    where[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error}): fetch it again") from None

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, path in where.items():
            # Opened for each tensor alone: what was read before is unmapped and no longer counts as memory.
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)

    return Checkpoint(str(folder), shapes, tensors())


def open_lavis(path: str | Path) -> Checkpoint:
    """A LAVIS checkpoint: a pickled dict with "model". Only tensors are unpickled, never code.

    Raises UserError when the file is missing, cannot be read so, or holds no "model".
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a hub folder or a LAVIS .pth file") from None
    except Exception as error:  # a damaged pickle raises almost anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): fetch it again") from None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f'{path} holds no "model" made of tensors: give a checkpoint that LAVIS saved')
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Checkpoint(str(path), shapes, ((name, state.pop(name)) for name in shapes))


def layers_of(names: Iterable[str]) -> int:
    """How many numbered layers these names of ours speak of."""
    return 1 + max((int(i) for name in names for i in re.findall(r"blocks\.(\d+)", name)), default=0)


def load_into(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], key_map: Naming, source: str,
              optional: tuple[str, ...] = ()) -> None:
    """Put translated tensors into `module`, which may be on the meta device and says of which dtype it wants them.

    What is `optional` keeps its value when the file lacks it. A table of embeddings may have one row more here than in
    the file, which keeps its values. Raises UserError naming any tensor that is unknown, missing or of the wrong shape.
    """
    wanted = module.state_dict()
    filled: dict[str, Tensor] = {}
    for name, tensor in tensors:
        # the original BERT files still call a LayerNorm's parameters gamma and beta
        name = re.sub("LayerNorm.gamma$", "LayerNorm.weight", re.sub("LayerNorm.beta$", "LayerNorm.bias", name))
        name = name.removeprefix(key_map.prefix)
        targets = translate(name, key_map.tensors)
        if not targets or any(target not in wanted for target in targets):
            if any(name == known or name.startswith(known + ".") for known in key_map.ignored):
                continue
            raise UserError(f"{source} holds {name}, which this architecture does not have: weights and settings "
                            "do not belong together")
        parts = tensor.chunk(len(targets)) if isinstance(targets, Stacked) else [tensor] * len(targets)
        for target, part in zip(targets, parts, strict=True):
            here = wanted[target]
            grown = target in ("token_embedding.weight", "lm_head.bias") and here.shape[0] == part.shape[0] + 1
            if (1, *part.shape) == here.shape or (1, 1, *part.shape) == here.shape:  # a batch axis that files leave out
                part = part.reshape(here.shape)
            if here.shape != part.shape and not grown:
                raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, but {target} needs "
                                f"{tuple(here.shape)}: weights and config.json disagree")
            # Always a copy: the file can be closed, and what two modules share in it may grow apart here.
            part = part.to(here.dtype, copy=True)
            filled[target] = torch.cat([part, here[-1:]]) if grown else part
    missing = [name for name in wanted if name not in filled and not name.startswith(optional or ("\0",))]
    if missing:
        known = spell_out(key_map.tensors, layers_of(wanted))
        first = next((key_map.prefix + name for name, ours in known if missing[0] in ours), missing[0])
        raise UserError(f"{source} lacks the weights of {first} ({len(missing)} tensors in all): fetch it again")
    module.load_state_dict(filled, strict=False, assign=True)


def export_tensors(module: nn.Module, key_map: Naming) -> dict[str, Tensor]:
    """The tensors of `module` under their names. Raises UserError for one that has no place there."""
    state = module.state_dict()
    used: set[str] = set()
    found = {}
    for name, ours in spell_out(key_map.tensors, layers_of(state)):
        if all(one in state for one in ours):
            used |= set(ours)
            found[key_map.prefix + name] = torch.cat([state[one] for one in ours]) if ours[1:] else state[ours[0]]
    if left := [name for name in state if name not in used]:
        raise UserError(f"the other layout has no place for {left[0]} ({len(left)} tensors in all): this "
                        "architecture cannot be written in it")
    return found
