"""What was trained here, for others: runs as folders that can be moved, hub folders, and a model card for each."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .. import UserError, __version__
from ..data.coco import CocoCaptions
from ..data.files import read_json, write_beside, write_json
from ..training.bridge import Bridge, check_finished, load_bridge
from ..training.finetune import Cost, finetune, load_for_training, measured_loss, settings_for
from ..training.loop import TrainConfig, read_log
from ..training.recipes import Recipe
from ..training.records import carried_record, read_record
from ..training.shipping import PARTS
from ..weights.blip2 import Blip2
from ..weights.hub import MODELS, HubModel
from ..weights.official import ForRetrieval
from ..weights.retriever import Retriever
from .measure import LABELS, caption_scores, of_next_picture
from .retrieval import TOP, evaluate_retrieval
from .tables import markdown

# Of each part of a run; checkpoints and caches stay behind.
KEPT = ("*.safetensors", "*.json", "log.jsonl", "log.jsonl.gz")
RESEARCH_ONLY = "research only"
UNKNOWN = "unknown: ask whoever made it"
FIGURES = {"pictures": "pictures", "loss": "loss, nats per token", "cider": "CIDEr-D ×100",
           "shuffled_cider": "— of another picture, the control", "bleu4": "BLEU-4 ×100",
           "shuffled_bleu4": "— of another picture, the control", "distinct": "different captions"}


def caption_figures(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D and BLEU-4 (both x100) of captions, and of the same ones given to the next picture: the control."""
    shuffled = caption_scores(of_next_picture(captions), references) if len(captions) > 1 else {}
    return caption_scores(captions, references) | {f"shuffled_{key}": value for key, value in shuffled.items()}


def finetune_and_measure(folder: Path, data: CocoCaptions, held_out: CocoCaptions | None, out: Path,
                         config: TrainConfig | None = None, prompt: str = "", resume: bool = True,
                         needed: Cost | None = None) -> dict[str, dict[str, float]]:
    """Go on training a hub folder on captions, and measure it before and after; all is kept in `out`.

    Measured are the loss and the captions of `held_out`, or without it of the very pictures that were trained on, each
    beside the same captions given to the next picture. Returns "before" and "after".
    """
    config = config or settings_for(len(data.pairs))
    measured = held_out or data
    blip2 = load_for_training(folder, len(data), config.batch_size, needed=needed)
    features = blip2.cached_features(data.paths, out / "cache")
    features_measured = blip2.cached_features(measured.paths, out / "cache") if held_out else features

    def figures() -> dict[str, float]:
        captions = blip2.caption(features_measured, prompt)
        return {"pictures": len(measured), "loss": measured_loss(blip2, measured, features_measured, prompt),
                **caption_figures(captions, [record.captions for record in measured.images])}

    results = {"before": figures()}
    log = finetune(blip2, folder, data, features, out, config, prompt, resume)
    results["after"] = figures()
    write_json(out / "results.json", results | {"held_out": held_out is not None})
    write_card(out, "Fine-tuned BLIP-2", *_finetuned(folder, data, held_out, config, prompt, results, log))
    return results


def evaluate_official(folder: Path, data: CocoCaptions, cache: Path, top: int | None = None,
                      prompt: str | None = None) -> dict[str, float]:
    """What a BLIP-2 of the hub does on a split: its captions, or with weights for retrieval how it ranks. `LABELS`.

    Raises UserError for a `top`, which is how many are ranked again, with weights that rank nothing, and for a prompt
    with weights that write nothing.
    """
    results: dict[str, float] = {"images": len(data)}
    try:
        blip2 = Blip2.from_folder(folder)
    except ForRetrieval:
        if prompt is not None:
            raise UserError(f"--prompt has no effect on {folder}, whose weights rank and write nothing: leave it out") \
                from None
        retriever = Retriever.from_folder(folder)
        features = torch.from_numpy(np.array(retriever.cached_features(data.paths, cache)))
        results |= {"chance_r1": 100 / len(data)}
        return results | evaluate_retrieval(retriever, features, data.texts, data.rows, top or TOP)
    if top is not None:
        raise UserError(f"--top has no effect on {folder}, whose weights write captions and rank nothing: leave it out")
    captions = blip2.caption(blip2.cached_features(data.paths, cache), prompt)
    figures = caption_figures(captions, [record.captions for record in data.images])
    return results | {name if name.startswith("shuffled_") else f"stage2_{name}": value
                      for name, value in figures.items()}


def _finetuned(folder: Path, data: CocoCaptions, held_out: CocoCaptions | None, config: TrainConfig, prompt: str,
               results: Mapping[str, Mapping[str, float]], log: Sequence[dict]) -> tuple[str, list[tuple[str, str]]]:
    """Licence and sections of the card of a hub folder that training went on from."""
    known = MODELS.get(folder.name)
    base = f"{known.repository} at commit {known.revision} ({known.licence})" if known else folder.name
    where = f"the split {held_out.split!r}, held out" if held_out else "the pictures that were trained on"
    return known.licence if known else "other", [
        ("What it is", f"{base}, whose query branch, image norm and projection went on training on captions with "
                       f"minblip2 {__version__}. Image encoder and language model are unchanged. transformers' "
                       "`Blip2ForConditionalGeneration` loads the folder."),
        ("Data", described(data)),
        ("Training", f"{len(log)} steps of {config.batch_size} pairs, AdamW at {config.learning_rate:g}, seed "
                     f"{config.seed}, prompt {prompt!r}."),
        ("Results", f"On {where}:\n\n{figures_table(results)}"),
        ("Limits", "The captions above are all that was measured. " + LIMITS)]


LIMITS = ("A caption may name what is not there, and what the language model has read before weighs in it. The "
          "licences of the data and of the frozen models hold for this model as well.")


def described(data: CocoCaptions) -> str:
    """How much there is of a data set, where it came from, and under which licences, as far as it says so."""
    licences = Counter(record.licence for record in data.images if record.licence)
    text = f"{len(data):,} pictures with {len(data.pairs):,} captions, the split {data.split!r} of `{data.root.name}`."
    if not licences:
        return f"{text} It names no licences of its pictures: ask whoever made it."
    rows = [(licence, f"{count:,}") for licence, count in licences.most_common(20)]
    return f"{text} Licences of the pictures, as it tells them:\n\n{markdown(('licence', 'pictures'), *rows)}"


def figures_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of `finetune_and_measure` before and after, as a table in Markdown."""
    rows = [(label, *(f"{figures[name]:.2f}" if isinstance(figures[name], float) else f"{figures[name]}"
                      for figures in results.values()))
            for name, label in FIGURES.items() if all(name in figures for figures in results.values())]
    return markdown(("", *results), *rows)


def write_card(folder: Path, title: str, licence: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write README.md, a model card in the hub's form."""
    short = {"MIT": "mit", "Apache 2.0": "apache-2.0"}.get(licence, "other")
    head = ["---", f"license: {short}", *([f"license_name: {json.dumps(licence)}"] if short == "other" else []),
            "library_name: minblip2", "pipeline_tag: image-to-text", "---", "", f"# {title}"]
    text = "\n".join(head) + "\n\n" + "\n\n".join(f"## {name}\n\n{body}" for name, body in sections) + "\n"
    write_beside(folder / "README.md", lambda partial: partial.write_text(text, encoding="utf-8"))


def export_run(run: Path, folder: Path, data: Path | None = None, parts: Path | None = None) -> None:
    """Copy what a finished run has trained to a folder that can be moved, with a model card. `load_bridge` reads it.

    `data` and `parts` say where the data and the frozen models lie now, if not where they were. Frozen models of the
    hub are named with their commit, not copied. Raises UserError for a run that is not finished, and for a folder that
    holds something else.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "run.json").is_file():
        raise UserError(f"{folder} is there and holds something else: name a new folder")
    if folder.resolve() == run.resolve():
        raise UserError(f"{folder} is the run itself: name another folder")
    bridge, record = load_bridge(run, parts), read_record(run)  # which say what is missing
    check_finished(run, "stage2", bridge.recipe)
    folder.mkdir(parents=True, exist_ok=True)  # first: by this file an export that was stopped is known and done again
    write_json(folder / "run.json", carried_record(run, record.data.name if record.data else None))
    for part in PARTS:
        for path in sorted(found for kind in KEPT for found in (run / part).glob(kind)):
            target = folder / part / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_beside(target, lambda partial, path=path: shutil.copyfile(path, partial))
    for path in folder.glob("results-*.json"):
        path.unlink()  # of a run that was copied here before
    for path in run.glob("results-*.json"):
        write_beside(folder / path.name, lambda partial, path=path: shutil.copyfile(path, partial))
    write_card(folder, f"minBLIP-2, recipe {bridge.recipe.name}", *_trained(run, bridge, data or record.data or run))


def licence_of(recipe: Recipe) -> str:
    """The licence that what a recipe trains must keep to: the strictest of its frozen models'."""
    licences = [_source(name).licence for name in recipe.models.values()]
    return max(licences, key=lambda one: (RESEARCH_ONLY in one, one == UNKNOWN), default="MIT")


def _trained(run: Path, bridge: Bridge, root: Path) -> tuple[str, list[tuple[str, str]]]:
    """Licence and sections of the card of a run."""
    recipe = bridge.recipe
    frozen = [(role, source.repository, source.revision, source.licence)
              for role, source in ((role, _source(name)) for role, name in recipe.models.items())]
    loads = f"python -m minblip2 caption --run FOLDER PICTURE{' --parts PARTS' if recipe.models else ''}"
    what = ("The bridge between a frozen image encoder and a frozen language model, trained in two stages by the "
            f"recipe `{recipe.name}` of minblip2 {__version__}. It reads pictures by `{loads}`.")
    if frozen:
        what += (" The frozen models are not in this folder; these are needed (`python data/download.py weights "
                 f"{recipe.name}`):\n\n" + markdown(("role", "model", "commit", "licence"), *frozen))
    else:
        what += " The two frozen models were trained by the recipe as well and are in this folder."
    if any(RESEARCH_ONLY in row[-1] for row in frozen):
        what += "\n\nOne of them may be used for research only, and so may this bridge, which is of no use without it."
    stages = [_stage_row(run / f"stage{i}", f"stage {i}", config)
              for i, config in enumerate((recipe.stage1, recipe.stage2), start=1)]
    try:
        data = described(CocoCaptions(root, "train"))
    except UserError as error:
        data = f"The data are not there any more: {str(error).replace(str(root), root.name)}"
    sections = [("What it is", what), ("Data", data),
                ("Training", markdown(("", "steps", "learning rate", "seed", "last loss"), *stages))]
    for path in sorted(run.glob("results-*.json")):
        results: dict[str, Any] = read_json(path)
        rows = [(label, f"{results[name]:.1f}" if isinstance(results[name], float) else f"{results[name]}")
                for name, label in LABELS.items() if name in results]
        sections.append((f"Results on the split {path.stem.removeprefix('results-')!r}", markdown(("", ""), *rows)))
    if len(sections) == 3:
        sections.append(("Results", "None were measured: `python -m minblip2 evaluate --run FOLDER` does."))
    return licence_of(recipe), [*sections, ("Limits", LIMITS)]


def _stage_row(folder: Path, name: str, planned: TrainConfig) -> tuple[str, ...]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:  # a run may have had others than were planned
        known = (file.metadata() or {}).get("fingerprint")
    config = json.loads(known)["train"] if known else asdict(planned)
    return (name, f"{config['steps']:,} steps of {config['batch_size'] * config['grad_accum']} pairs",
            f"{config['learning_rate']:g}", f"{config['seed']}",
            f"{read_log(folder / 'log.jsonl')[-1]['loss']:.3f}")


def _source(name: str) -> HubModel:
    return MODELS.get(name) or HubModel(name, "unknown", UNKNOWN)
