"""Frozen models from the hub into folders that the loaders read; huggingface_hub resumes, caches and works offline."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import OfflineModeIsEnabled

from fetch import sha256_of
from minblip2 import UserError
from minblip2.data.files import field, read_json, write_beside, write_json
from minblip2.weights.hub import HubModel, find_models

# what the loaders and tokenizers read, at the top of a repository
SETTINGS = re.compile(r"(config|generation_config|preprocessor_config|processor_config|tokenizer|tokenizer_config|"
                      r"special_tokens_map|added_tokens|vocab|model\.safetensors\.index|pytorch_model\.bin\.index)\.json"
                      r"|vocab\.txt|merges\.txt|LICENSE(\.\w+)?")
TENSORS = (re.compile(r"model(-\d+-of-\d+)?\.safetensors"), re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"))
NOTE = "source.json"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its name, size in bytes and, for the large ones, the sha256 that the hub publishes."""

    name: str
    bytes: int
    sha256: str | None


def download(names: list[str], out: Path, yes: bool = False, endpoint: str | None = None,
             ask: Callable[[str], str] = input) -> None:
    """Have each model of `names` (models or recipes) in a folder below `out`; asks first, unless `yes`.

    What is told before: sizes and licences. A folder is complete when it holds source.json, written last. Raises
    UserError when a file cannot be had or is not what the hub publishes.
    """
    wanted = [model for model in find_models(names) if not _is_complete(out / model.folder, model)]
    plans = {model: _listed(model, endpoint) for model in wanted}
    for model, files in plans.items():
        print(f"{model.repository}: {sum(file.bytes for file in files) / 1e9:.2f} GB, licence: {model.licence}")
    if not plans:
        print(f"{out}: all of {', '.join(names)} is there")
        return
    if not yes:
        if not sys.stdin.isatty() and ask is input:
            raise UserError("nobody can be asked here: add --yes if these sizes and licences are fine")
        if ask("Fetch them? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("nothing was fetched, as you answered: add --yes to skip the question")
    for model, files in plans.items():
        _fetch(model, files, out / model.folder, endpoint)


def _listed(model: HubModel, endpoint: str | None) -> list[HubFile]:
    """The files that we read, safetensors before pickles; offline those in the hub's cache."""
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(model.repository, revision=model.revision,
                                                                   files_metadata=True)
        found = [HubFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
                 for entry in info.siblings or ()]
    except OfflineModeIsEnabled:
        try:
            cached = Path(huggingface_hub.snapshot_download(model.repository, revision=model.revision,
                                                            local_files_only=True))
        except Exception as error:
            raise UserError(f"{model.repository} is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it and "
                            "run the same command again") from error
        found = [HubFile(path.name, path.stat().st_size, None) for path in cached.iterdir() if path.is_file()]
    except Exception as error:  # what stands below the library raises almost anything
        raise _refused(model, "be looked up", error) from error
    tensors = next((some for kind in TENSORS if (some := [file for file in found if kind.fullmatch(file.name)])), [])
    settings = [file for file in found if SETTINGS.fullmatch(file.name)]
    if not tensors or not any(file.name == "config.json" for file in settings):
        raise UserError(f"{model.repository} at {model.revision} has no config.json or no weights: choose another")
    if tensors[0].name.endswith(".safetensors"):
        settings = [file for file in settings if not file.name.startswith("pytorch_model")]
    return sorted([*settings, *tensors], key=lambda file: file.name)


def _fetch(model: HubModel, files: list[HubFile], folder: Path, endpoint: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    notes = []
    for file in files:
        try:
            cached = Path(huggingface_hub.hf_hub_download(model.repository, file.name, revision=model.revision,
                                                          endpoint=endpoint)).resolve()
        except Exception as error:
            raise _refused(model, f"give {file.name}", error) from error
        found = HubFile(file.name, cached.stat().st_size, sha256_of(cached))
        if found.bytes != file.bytes or file.sha256 not in (None, found.sha256):
            cached.unlink()
            raise UserError(f"{model.repository}: {file.name} came with {found.bytes} bytes and sha256 {found.sha256}, "
                            f"published are {file.bytes} and {file.sha256}: it was removed, run the same command again")
        try:
            write_beside(folder / file.name, lambda partial, cached=cached: _share(cached, partial))
        except OSError as error:
            raise UserError(f"{folder / file.name} cannot be written ({error.strerror}): make room or choose another "
                            "--out, then run the same command again") from error
        notes.append(vars(found))
    write_json(folder / NOTE, {"repository": model.repository, "revision": model.revision, "licence": model.licence,
                               "files": notes})
    print(f"{folder}: {len(notes)} files of {model.repository}")


def _share(cached: Path, partial: Path) -> None:
    """The cached file under another name, without a second copy where the disk allows it."""
    partial.unlink(missing_ok=True)
    try:
        os.link(cached, partial)
    except OSError:
        shutil.copyfile(cached, partial)


def _is_complete(folder: Path, model: HubModel) -> bool:
    """Whether the folder holds all of this revision; sizes are compared, for hashing takes minutes."""
    try:
        record = read_json(folder / NOTE)
        return record.get("revision") == model.revision and all(
            (folder / field(entry, "name", str, folder)).stat().st_size == entry["bytes"]
            for entry in field(record, "files", list, folder))
    except (UserError, OSError):
        return False


def _refused(model: HubModel, what: str, error: Exception) -> UserError:
    said = str(error).strip().splitlines() or [repr(error)]
    return UserError(f"the hub did not let {model.repository} {what} ({type(error).__name__}: {said[0]}): check the "
                     "network and run the same command again, it goes on where it stopped")
