"""Checkpoint files: tensors are read one at a time, matched by name, and every single one is accounted for."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import UserError
from ..data.files import read_json
from .keymap import Fused, KeyMap, spell_out, translate
from .names import COPIES

NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # all others are quantised
# what quantisers add to a matrix: bitsandbytes (first line), GPTQ and AWQ, and those of fp8
QUANTISED = re.compile(r".*(\.SCB|\.weight_format|\.absmax|\.quant_map|\.nested_\w+|\.quant_state\..+|"
                       r"\.qweight|\.qzeros|\.scales|\.g_idx|_scale|_scale_inv|_zero_point|_packed)")
UNQUANTISED = "fetch the model's own weights, in float32, float16 or bfloat16"


class HubConfig(dict):
    """A model's settings; reading one that is not there raises a UserError that names it."""

    def __missing__(self, key: str):
        raise UserError(f"this model's config.json lacks {key!r}: fetch it again")


def require_folder(folder: str | Path) -> None:
    """Raise UserError where there is no such folder of a model."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: fetch a model with `python data/download.py weights NAME`")


def read_config(folder: str | Path) -> HubConfig:
    """The `config.json` of a hub folder. Raises UserError when it is missing, no JSON, or of what cannot be loaded."""
    folder = Path(folder)
    path = folder / "config.json"
    if (adapter := folder / "adapter_config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserError(f"{folder} holds an adapter (LoRA or the like) of {base}, not a whole model: merge it "
                        "in PEFT with merge_and_unload(), save that with save_pretrained, and give its folder")
    if not path.is_file():
        below = sorted(below for depth in ("*", "*/*", "*/*/*") for below in folder.glob(f"{depth}/config.json"))
        raise UserError(f"{folder} has no config.json: give the folder of a downloaded model" + (
            f", as {below[0].parent} below it" if below else ""))
    hub = HubConfig(read_json(path))
    if quantised := hub.get("quantization_config"):
        method = quantised.get("quant_method", "quantised") if isinstance(quantised, dict) else "quantised"
        raise UserError(f"{folder} holds quantised weights ({method}), which are not read here: {UNQUANTISED}")
    return hub


def section(hub: HubConfig, key: str) -> HubConfig:
    """The settings of a part of a model; none where it is not there, or null. Raises UserError for anything else."""
    part = hub.get(key)
    if part is not None and not isinstance(part, dict):
        raise UserError(f"this model's config.json has {key} = {str(part)[:40]!r}, not an object with settings: fetch "
                        "it again")
    return HubConfig(part or {})


def setting(hub: HubConfig, key: str) -> Any:
    """A setting that is what its name says: a count, a number, a text, or yes or no. Raises UserError if it is not."""
    value = hub[key]
    if value is None and key in ("num_decoder_layers", "word_embed_proj_dim"):  # as many as in the encoder, as wide
        return None
    if key.startswith(("do_", "tie_")):
        kind, fits = "true or false", isinstance(value, bool)
    elif key in ("hidden_act", "activation_function", "feed_forward_proj", "dense_act_fn"):
        kind, fits = "a name", isinstance(value, str)
    elif "eps" in key or key in ("rope_theta", "mlp_ratio"):
        kind, fits = "a number above 0", isinstance(value, int | float) and 0 < value < math.inf
    elif key == "hidden_dropout_prob":
        kind, fits = "a share from 0, below 1", isinstance(value, int | float) and 0 <= value < 1
    else:
        kind, fits = "a whole number above 0", isinstance(value, int) and 0 < value < 2**31
    if not fits or (isinstance(value, bool) and kind != "true or false"):
        raise UserError(f"this model's config.json has {key} = {str(value)[:40]!r}, which is not {kind}: fetch it "
                        "again")
    return value


@dataclass
class Checkpoint:
    """Named tensors: their shapes, and a way to read each of them once."""

    source: str
    shapes: dict[str, tuple[int, ...]]
    tensors: Iterable[tuple[str, Tensor]]


def shards(folder: Path) -> list[Path]:
    """The files with a hub folder's weights: the one, or those of its index; safetensors before pickles.

    Raises UserError when there are none, or one is missing.
    """
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = whole.with_name(f"{whole.name}.index.json")
        if whole.exists():
            return [whole]
        if index.exists():
            try:
                files = sorted({folder / Path(name).name for name in read_json(index)["weight_map"].values()})
            except (AttributeError, KeyError, TypeError) as error:
                raise UserError(f"{index} is not an index of weights ({error!r}): fetch it again") from None
            for path in files:
                if not path.exists():
                    raise UserError(f"{path} is missing, though {index.name} names it: fetch it as well")
            return files
        if others := sorted(folder.glob("*.safetensors" if whole.suffix == ".safetensors" else "pytorch_model*.bin")):
            return others
    raise UserError(f"{folder} has no .safetensors file, and no pytorch_model.bin: fetch the model's weights as well")


def open_hub(folder: str | Path) -> Checkpoint:
    """The weights of a hub folder, in one piece or in several. Raises UserError when they cannot be read."""
    return open_files(str(folder), shards(Path(folder)))


def open_files(source: str, files: list[Path]) -> Checkpoint:
    """The weights in some files of a hub folder, all safetensors or all pickles. Raises UserError as `open_hub`."""
    if files[0].suffix == ".bin":
        state: dict[str, Tensor] = {}
        for path in files:
            state |= open_pickle(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return Checkpoint(source, shapes, ((name, state.pop(name)) for name in shapes))
    where: dict[str, Path] = {}
    shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    where[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): fetch it again") from None

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, path in where.items():
            # Opened for each tensor alone: what was read before is unmapped and no longer counts as memory.
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)

    return Checkpoint(source, shapes, tensors())


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pytorch_model.bin, by name. Raises UserError as `unpickled`, and when it holds anything else."""
    content = unpickled(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path} holds more than named tensors: fetch the weights as .safetensors")
    return dict(content)


def unpickled(path: Path) -> object:
    """What a pickle holds. Only tensors are unpickled, never code; pages are read when needed.

    Raises UserError when it is damaged.
    """
    try:
        with open(path, "rb") as file:
            mapped = file.read(4) == b"PK\3\4"  # an older format can only be read whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged, or holds more than tensors, such as code, which is never run: fetch it "
                        "again, or as .safetensors") from None
    except Exception as error:  # a damaged archive raises almost anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): fetch it again") from None


def open_lavis(path: str | Path) -> Checkpoint:
    """A LAVIS checkpoint: a pickled dict with "model". Only tensors are unpickled, never code.

    Raises UserError when the file is missing, cannot be read so, or holds no "model".
    """
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: give a hub folder or a LAVIS .pth file")
    content = unpickled(Path(path))
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f'{path} holds no "model" made of tensors: give a checkpoint that LAVIS saved')
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Checkpoint(str(path), shapes, ((name, state.pop(name)) for name in shapes))


def layers_of(names: Iterable[str]) -> int:
    """How many numbered layers these names of ours speak of."""
    return 1 + max((int(i) for name in names for i in re.findall(r"blocks\.(\d+)", name)), default=0)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or no number; found without a copy, where `isfinite` makes three. True on meta."""
    return tensor.is_meta or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def load_into(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], key_map: KeyMap, source: str,
              optional: tuple[str, ...] = ()) -> None:
    """Put translated tensors into `module`, which may be on the meta device and says of which dtype it wants them.

    What is `optional` keeps its value when the file lacks it, and so does the row that a `grown` tensor has more.
    Raises UserError naming any tensor that is unknown, missing or of the wrong shape.
    """
    wanted = module.state_dict()
    words = next((name for name in wanted if name.endswith("token_embedding.weight")), "")
    filled: dict[str, Tensor] = {}
    copy = ""  # another name of the word embeddings
    for name, tensor in tensors:
        # the original BERT files still call a LayerNorm's parameters gamma and beta
        name = re.sub("LayerNorm.gamma$", "LayerNorm.weight", re.sub("LayerNorm.beta$", "LayerNorm.bias", name))
        name = name.removeprefix(key_map.prefix)
        targets = translate(name, key_map.tensors)
        if not targets or any(target not in wanted for target in targets):
            targets = ()
            if words and key_map.ignored.get(name.removesuffix(".weight")) in COPIES:
                targets, copy = (words,), name
        if not targets:
            if key_map.leaves_aside(name):
                continue
            if QUANTISED.fullmatch(name):
                raise UserError(f"{source} holds {name}, which belongs to quantised weights: {UNQUANTISED}")
            raise UserError(f"{source} holds {name}, which this architecture does not have: weights and settings "
                            "do not belong together")
        if tensor.dtype not in NUMBERS:
            raise UserError(f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}, so these weights are "
                            f"quantised: {UNQUANTISED}")
        if not is_finite(tensor):
            raise UserError(f"{source}: {name} holds values that are no finite numbers: the training that wrote it "
                            "failed, or the file is damaged; fetch another")
        parts = tensor.chunk(len(targets)) if isinstance(targets, Fused) else [tensor] * len(targets)
        for target, part in zip(targets, parts, strict=True):
            here = wanted[target]
            grown = target in key_map.grown and here.shape[0] == part.shape[0] + 1
            if (1, *part.shape) == here.shape or (1, 1, *part.shape) == here.shape:  # a batch axis that files leave out
                part = part.reshape(here.shape)
            if here.shape != part.shape and not grown:
                raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, but {target} needs "
                                f"{tuple(here.shape)}: weights and config.json disagree")
            if target == words and words in filled:  # some files hold both, some a copy alone
                if not part.is_meta and not torch.equal(filled[words][:len(part)], part.to(here.dtype)):
                    raise UserError(f"{source}: {copy} is not a copy of the word embeddings, as which it is read: only "
                                    "a T5, and a Llama with tie_word_embeddings = false in config.json, may have a "
                                    "head of their own")
                continue
            # Always a copy: the file can be closed, and what two modules share in it may grow apart here.
            part = part.to(here.dtype, copy=True)
            filled[target] = torch.cat([part, here[-1:]]) if grown else part
    missing = [name for name in wanted if name not in filled and not name.startswith(optional or ("\0",))]
    if missing:
        known = spell_out(key_map.tensors, layers_of(wanted))
        first = next((key_map.prefix + name for name, ours in known if missing[0] in ours), missing[0])
        raise UserError(f"{source} lacks the weights of {first} (tensors in all: {len(missing)}): fetch it again")
    module.load_state_dict(filled, strict=False, assign=True)


def export_tensors(module: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """The tensors of `module` under their names. Raises UserError for one that has no place there."""
    state = module.state_dict()
    used: set[str] = set()
    found = {}
    for name, ours in spell_out(key_map.tensors, layers_of(state)):
        if all(one in state for one in ours):
            used |= set(ours)
            found[key_map.prefix + name] = torch.cat([state[one] for one in ours]) if ours[1:] else state[ours[0]]
    if left := [name for name in state if name not in used]:
        raise UserError(f"the other layout has no place for {left[0]} (tensors in all: {len(left)}): this "
                        "architecture cannot be written in it")
    return found
