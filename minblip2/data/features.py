"""What a frozen encoder makes of pictures, computed once and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import UserError
from .files import one_at_a_time, write_json
from .pictures import load_image
from .progress import progress_bar
from .transforms import Transform
from .workers import prefetch

PROCESSES_FROM = 256  # pictures: below, threads are done before processes have started


def weights_checksum(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of a module's state: equal before and after if frozen is frozen."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def feature_cache(encode: Callable[[Tensor], Tensor], transform: Transform, paths: Sequence[str | Path],
                  folder: str | Path, key: str, batch_size: int = 32, workers: int | None = None, progress: bool = True
                  ) -> np.memmap:
    """What a frozen encoder makes of pictures, computed once and kept on disk. Returns (n v e) float16, memory-mapped.

    encode: images (b c h w) float32 -> (b v e); `key` names the encoder, by its weights and settings. The file's name
    hashes key, transform and each picture's name, size and date. A killed build goes on where it stopped; a finished
    file is used only if its note agrees and its length is right. `workers` processes, or threads if few are
    missing, decode and resize pictures (default: one for each core) while others are encoded. Of several that ask for
    the same features at once, one builds, and the others wait and read.
    Raises UserError for a picture that cannot be read, features that float16 cannot hold, and a disk too small.
    """
    if not paths:
        raise UserError("there are no pictures to encode: the list of paths is empty")
    try:
        listing = [(Path(path).name, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in paths]
    except OSError as error:
        raise UserError(f"image {error.filename} cannot be read ({error.strerror}): replace or remove it") from error
    identity = {"version": 1, "key": key, "transform": repr(transform), "pictures": _hash(listing)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / f"features-{_hash(identity)[:16]}.npy"

    def finished() -> np.memmap | None:
        array, done = _trusted(complete, complete.with_suffix(".json"), identity) or (None, 0)
        return array if done == len(paths) else None

    def waiting() -> None:
        if progress:
            print(f"another process is computing the features in {folder}: waiting for it", flush=True)

    if (ready := finished()) is not None:
        return ready
    with one_at_a_time(complete.with_suffix(".lock"), waiting):
        if (ready := finished()) is None:  # still not, now that nobody else is building
            _build(encode, transform, paths, complete, identity, batch_size, workers, progress)
            ready = np.load(complete, mmap_mode="r")
    return ready


def _build(encode: Callable[[Tensor], Tensor], transform: Transform, paths: Sequence[str | Path], complete: Path,
           identity: dict, batch_size: int, workers: int | None, progress: bool) -> None:
    """Compute the features that are still missing, and put the finished file in its place: see `feature_cache`."""
    part, note, folder = complete.with_suffix(".npy.part"), complete.with_suffix(".json"), complete.parent

    def write_note(done: int, shape: tuple[int, ...]) -> None:
        write_json(note, {**identity, "shape": list(shape), "done": done})

    array, done = _trusted(part, note, identity, "r+") or (None, 0)

    def write(array: np.memmap, start: int, features: np.ndarray) -> None:
        array[start:start + len(features)] = features
        array.flush()  # the counter may only ever say less than what is on disk
        write_note(start + len(features), array.shape)

    with (progress_bar(total=len(paths), initial=done, desc="encode", unit="image", hidden=not progress) as bar,
          ThreadPoolExecutor(1) as writer):
        rest = prefetch(functools.partial(pixels_of, transform), paths[done:], workers or os.cpu_count() or 1,
                        2 * batch_size, processes=len(paths) - done >= PROCESSES_FROM)
        written = writer.submit(int)  # nothing yet
        while batch := list(itertools.islice(rest, batch_size)):
            features = encode(transform.normalise(np.stack(batch))).to("cpu", torch.float16)
            shape = (len(paths), *features.shape[1:])
            if features.ndim != 3 or len(features) != len(batch) or (array is not None and array.shape != shape):
                raise UserError(f"the encoder made {tuple(features.shape)} of {len(batch)} images: make it (b v e)")
            if not features.isfinite().all():
                raise UserError(f"the encoder gave values that float16 cannot hold between {paths[done]} and "
                                f"{paths[done + len(batch) - 1]}: use another layer or scale them")
            if array is None:
                needed, free = 2 * math.prod(shape), shutil.disk_usage(folder).free
                if needed > free:  # writing to a mapped file on a full disk kills the process without a word
                    raise UserError(f"the features need {needed:.1e} bytes in {folder} but {free:.1e} are free: "
                                    "make room, use fewer images or choose another folder")
                write_note(0, shape)  # first: the note of an earlier file must not vouch for the empty new one
                array = np.lib.format.open_memmap(part, "w+", np.float16, shape)
                _reserve(part)
            written.result()  # one batch at a time: after a write that failed, the counter must not go on
            written = writer.submit(write, array, done, features.numpy())
            done += len(batch)
            bar.update(len(batch))
        written.result()
    del array  # Windows does not rename a file that is mapped
    os.replace(part, complete)


def pixels_of(transform: Transform, path: str | Path) -> np.ndarray:
    """What the encoder will see of a picture, (h w c) uint8: a quarter of the bytes of what `normalise` makes of it."""
    return np.array(transform.crop_and_resize(load_image(path)))


def _reserve(path: Path) -> None:
    """Take the disk's blocks now, where the system can: others may fill the disk while the features are computed."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                path.unlink()
                raise UserError(f"the features cannot be kept in {path.parent} ({error.strerror}): make room, use "
                                "fewer images or choose another folder") from error


def _trusted(file: Path, note: Path, identity: dict, mode: str = "r") -> tuple[np.memmap, int] | None:
    """The mapped features (n v e) and how many are done, if note, shape and byte size agree; otherwise None."""
    try:
        record = json.loads(note.read_text(encoding="utf-8"))
        array = np.load(file, mmap_mode=mode)
        agrees = all(record[name] == value for name, value in identity.items()) and list(array.shape) == record["shape"]
        if agrees and array.dtype == np.float16 and file.stat().st_size == array.offset + array.nbytes:
            return array, record["done"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        pass  # absent or garbled: not trusted, so built again
    return None


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
