"""Everything that could end a run late, asked before it begins: folders, splits, pictures, frozen models, batches."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import UserError
from ..data.batches import PairBatches
from ..data.coco import CocoCaptions
from ..data.features import PROCESSES_FROM
from ..data.files import read_json, write_json
from ..data.pictures import check_image, load_image
from ..data.progress import progress_bar
from ..data.scene_dataset import load_scenes
from ..data.tokenizer import Tokenizer, gap_behind, normalize_caption
from ..data.workers import prefetch
from ..device import best_device, compute_dtype
from ..qformer import QFormer
from ..weights import names, official, pretrained
from ..weights.checkpoint import load_into, open_hub, read_config
from .distributed import env_rank_and_size, rank_and_size
from .recipes import Recipe, default_data, find_part, find_parts, transform_for
from .records import is_begun, read_record
from .stages import room_for_words

SHOWN = 5  # broken pictures that are named; of more, only the number is told


def check_folder(out: Path) -> None:
    """Raise UserError where no run can be kept in `out`, as it is, or stands below, a file."""
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"--out {out} cannot be made, for {path} is a file: name another folder")
            return


def check_precision(recipe: Recipe) -> None:
    """Raise UserError for a precision that training does not have."""
    check_trainable(compute_dtype(best_device(recipe.device)))


def check_trainable(frozen: torch.dtype) -> None:
    """Raise UserError where gradients do not come through frozen parts of this dtype."""
    if frozen == torch.float16:
        raise UserError("training in float16 needs scaled gradients, which this loop does not have: choose bfloat16 or "
                        "float32 (a finished bridge's frozen language model can be in float16)")


def check_own_gpu() -> None:
    """Raise UserError where torchrun has started more processes on this machine than it has GPUs."""
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if env_rank_and_size()[1] > 1 and number >= count:
        raise UserError(f"process {number + 1} on this machine has no GPU of its own, for there are {count}: start as "
                        f"many with --nproc-per-node {count}, or compute with --device cpu")


def check_settings(recipe: Recipe, out: Path) -> None:
    """Raise UserError where `out` holds a run of another recipe, or one to go on from with another seed or batch size.
    """
    if not (out / "run.json").exists():
        return
    there = read_record(out).recipe
    compared = [("--recipe", there.name, recipe.name)]
    if is_begun(out):
        compared += [("--seed", there.stage1.seed, recipe.stage1.seed),
                     ("--batch-size", there.stage1.batch_size, recipe.stage1.batch_size),
                     ("--batch-size", there.stage2.batch_size, recipe.stage2.batch_size)]
    for option, was, asked in compared:
        if was != asked:
            raise UserError(f"{out} holds a run with {option} {was}, not {asked}: name another folder with --out, or "
                            "train anew with --restart")


def check_same_data(data: Path, out: Path) -> None:
    """Raise UserError where the run in `out` would go on with other captions than those it was trained on.

    Only what is still there can be compared: data may move.
    """
    was = read_record(out).data if is_begun(out) else None
    if was is None or not was.exists() or was.samefile(data):
        return
    try:
        trained = CocoCaptions(was, "train").pairs
    except UserError:  # something is left there, but not the data
        return
    if trained != CocoCaptions(data, "train").pairs:
        raise UserError(f"{out} holds a run that is trained on {was}, not on {data}: name another folder with --out, "
                        "or train anew with --restart")


def foreign_group() -> str | None:
    """What is to be said where the environment speaks of several processes that torchrun has not started."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ or size in ("", "1"):
        return None
    return (f"WORLD_SIZE={size} is in the environment, but torchrun has not started this process, so it trains alone: "
            "for several start it with `torchrun --nproc-per-node N -m minblip2 train ...`")


# --- pictures ---------------------------------------------------------------------------------------------------------


def why_broken(path: Path, decode: bool = True) -> str | None:
    """What is wrong with a picture, if anything; without `decode` only its header is read."""
    try:
        load_image(path) if decode else check_image(path, decode=False)
    except UserError as error:
        return str(error)
    return None


def broken_pictures(paths: Sequence[Path], notes: Path | None = None) -> dict[Path, str]:
    """The pictures that cannot be read, and why. All are decoded, once: `notes` is a folder that remembers them."""
    listing = [(str(path), (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in paths]
    name = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    note = None if notes is None else notes / f"read-{name}.json"
    if note is not None:
        with contextlib.suppress(UserError):
            # Looked at again: a decoder may have come, or the right to read, while size and date are the same.
            return {path: why for path in map(Path, read_json(note)) if (why := why_broken(path)) is not None}
    found = prefetch(why_broken, paths, os.cpu_count() or 1, processes=len(paths) >= PROCESSES_FROM)
    bar = progress_bar(zip(paths, found, strict=True), total=len(paths), desc="read pictures", unit="image",
                       leave=False)
    broken = {path: why for path, why in bar if why is not None}
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {str(path): why for path, why in broken.items()})
    return broken


def open_split(root: Path, split: str, out: Path | None, skip_broken: bool = False) -> CocoCaptions:
    """A split all of whose pictures can be read; those that cannot are left out and counted, to `skip_broken`.

    What has been read is remembered below `out`. Raises UserError naming broken pictures, all at once.
    """
    data = CocoCaptions(root, split)
    if not (broken := broken_pictures(data.paths, None if out is None else out / "cache")):
        return data
    if skip_broken:
        return CocoCaptions(root, split, without=broken.keys())
    more = f" (and {len(broken) - SHOWN} more)" if len(broken) > SHOWN else ""
    first = next(iter(broken.values()))
    raise UserError(f"{len(broken)} of {len(data)} pictures of the split {split!r} cannot be read: "
                    f"{', '.join(str(path) for path in list(broken)[:SHOWN])}{more}; replace them, or add "
                    f"--skip-broken to go without ({first.partition('cannot be read')[2].strip(' (:') or first})")


def seen_before(train: CocoCaptions, measured: CocoCaptions) -> str | None:
    """What is to be said where a split that is measured shares pictures with the one that is trained on."""
    both = set(train.paths) & set(measured.paths)
    if not both or train.split == measured.split:
        return None
    return (f"{len(both):,} of {len(measured):,} pictures of the split {measured.split!r} are trained on as well, as "
            f"{min(both)}: split pictures, not lines, or the figures say nothing of new pictures")


def check_split(recipe: Recipe, root: Path, split: str) -> None:
    """Raise UserError where a recipe cannot be measured on a split: the scenes need the truth about each drawing."""
    if recipe.name != "scenes":
        return
    try:
        load_scenes(root, split)
    except UserError:
        raise UserError(f"{root} holds no drawn scenes with the split {split!r}, and the recipe scenes is for them "
                        "alone: leave --data out, or choose --recipe laptop or gpu for photographs") from None


# --- frozen models ----------------------------------------------------------------------------------------------------


def check_part(recipe: Recipe, parts: Path, role: str) -> None:
    """Ask of one frozen model what its loader will ask, but for the numbers. Raises UserError as the loader does."""
    folder = find_part(recipe, parts, role)
    config, checkpoint = read_config(folder), open_hub(folder)
    shapes = ((name, torch.empty(shape, device="meta")) for name, shape in checkpoint.shapes.items())
    if role == "encoder":
        vit, key_map = pretrained.empty_encoder(folder, config, torch.float32)
        load_into(vit, shapes, key_map, str(folder))
        transform_for(folder, vit.config.image_size)
        return
    tokenizer = Tokenizer.from_folder(folder)
    if role == "lm":
        lm, key_map = pretrained.empty_lm(folder, config, "lm_head.weight" in checkpoint.shapes, torch.float32)
        load_into(lm, shapes, key_map, str(folder))
        if len(tokenizer) > lm.vocab_size:
            raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} ids but the language model only "
                            f"{lm.vocab_size}: take both from the same model folder")
        return
    sizes = official.bert_sizes(folder, config, tokenizer.dec_id, **recipe.qformer)
    with torch.device("meta"):
        qformer = QFormer(sizes)
    load_into(qformer, shapes, names.BERT, str(folder), optional=official.fresh_beside_bert(qformer))


def long_captions(data: CocoCaptions, tokenizer: Tokenizer, prompt: str, max_length: int) -> int:
    """How many captions are longer than `max_length` ids with what stands before and behind them."""
    room = room_for_words(tokenizer, prompt, max_length)
    texts = [gap_behind(prompt) + normalize_caption(caption) for caption in data.texts]
    return sum(len(read.ids) > room for i in range(0, len(texts), 1000)
               for read in tokenizer.backend.encode_batch(texts[i:i + 1000], add_special_tokens=False))


# --- all of it --------------------------------------------------------------------------------------------------------


def check_batches(recipe: Recipe, data: CocoCaptions) -> None:
    """Raise UserError where a stage of the recipe cannot make its batches of a split, naming --batch-size."""
    view = np.broadcast_to(np.float16(0), (len(data), recipe.keep_tokens or 1, 1))  # as many as there will be, unmade
    for config in (recipe.stage1, recipe.stage2):
        try:
            PairBatches([view], data.rows, [[0]] * len(data.pairs), data.ids, config.batch_size, config.seed, 0,
                        recipe.keep_tokens, *rank_and_size())
        except UserError as error:
            raise UserError(f"{error} (--batch-size says how large it is)") from None


def check_run(recipe: Recipe, data: Path | None, parts: Path | None, out: Path, split: str, skip_broken: bool,
              note: Callable[[str], None], resume: bool = True) -> None:
    """Ask everything that training a recipe and measuring it on `split` will ask, before either begins.

    `note` is told what is no error. Scenes that are not there are drawn. To `resume`, a run that is in `out` must be
    this one. Raises UserError for the first trouble.
    """
    check_folder(out)
    check_precision(recipe)
    if resume:
        check_settings(recipe, out)
    data = default_data(recipe, out, data)
    parts = find_parts(recipe, parts)
    for role in recipe.models:
        check_part(recipe, parts, role)
    for one in ("train", split):
        CocoCaptions(data, one)
        check_split(recipe, data, one)
    if resume:
        check_same_data(data, out)
    train = open_split(data, "train", out, skip_broken)
    measured = open_split(data, split, out, skip_broken)
    if said := seen_before(train, measured):
        note(said)
    check_batches(recipe, train)
    for said in cut_captions(recipe, train, parts):
        note(said)


def cut_captions(recipe: Recipe, train: CocoCaptions, parts: Path | None) -> Iterator[str]:
    """What is to be said of captions that are longer than a text may be."""
    for stage, role, prompt in (("stage 1", "bert", ""), ("stage 2", "lm", recipe.prompt)):
        if role in recipe.models:
            tokenizer = Tokenizer.from_folder(parts / recipe.models[role])
            if count := long_captions(train, tokenizer, prompt, recipe.max_length):
                yield (f"{count:,} of {len(train.pairs):,} captions are longer than the {recipe.max_length} ids that "
                       f"{stage} reads, and lose their last words")
