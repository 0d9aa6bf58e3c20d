"""retrieve: pictures that fit a text."""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path
from typing import Any

import torch

from ..data.progress import WIDTH
from .models import note, note_unread, open_data, open_retriever, run_folder
from .options import add_data, add_model_choice, command, positive


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "retrieve", run)
    sub.add_argument("text")
    add_model_choice(sub)
    add_data(sub)
    sub.add_argument("--top", type=positive, default=32, help="so many ITM ranks again (default %(default)s)")
    sub.add_argument("--show", type=positive, default=5, help="so many of these are shown (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Find the images of a split that fit a text best: by ITC, then re-ranked by ITM."""
    folder = run_folder(args)
    if not args.model:
        args.run = folder
    retriever = open_retriever(args)
    note_unread(retriever, [args.text])
    data = open_data(args, folder)
    features = torch.from_numpy(retriever.cached_features(data.paths, folder / "cache").copy())
    cosine = retriever.similarity(features, [args.text])
    scores = retriever.rerank(features, [args.text], cosine, args.top, dim=0)
    rows = scores[:, 0].topk(min(args.show, args.top, len(data))).indices
    if len(rows) < args.show:
        note(f"{len(rows)} are shown: " + (f"the split has no more pictures than {len(data)}" if len(data) == len(rows)
                                           else f"ITM has ranked no more than --top, which is {args.top}"))
    match = retriever.match(features[rows], [args.text])[:, 0]
    print("  match  cosine  picture, and what a person said of it")
    for row, probability in zip(rows.tolist(), match.tolist(), strict=True):
        record = data.images[row]
        print(f"{probability:6.0%}  {cosine[row, 0]:7.3f}  {short_path(record.path, data.root)}")
        print(textwrap.fill(record.captions[0], WIDTH, initial_indent=17 * " ", subsequent_indent=17 * " "))
    print(f"pictures of {short_path(data.root, Path())}, split {data.split}")


def short_path(path: Path, root: Path) -> Path:
    """The path from where we are if it leads down from there, else from `root` if it does from there, else the path."""
    here = os.path.realpath(os.getcwd())
    for base in (here, os.path.realpath(root)):
        if (whole := os.path.realpath(path)).startswith(base + os.sep):
            return Path(os.path.relpath(whole, base))
    return path
