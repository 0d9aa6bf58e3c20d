"""retrieve: pictures that fit a text."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.progress import WIDTH
from .models import note, note_unread, open_data, open_retriever, run_folder
from .options import add_data, add_model_choice, command, positive

INDENT = 17  # columns before a picture's name


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
    retriever.text_ids([args.text])  # which refuses what holds no word, before all pictures are encoded
    data = open_data(args, folder)
    features = torch.from_numpy(retriever.cached_features(data.paths, folder / "cache").copy())
    cosine = retriever.similarity(features, [args.text])
    scores = retriever.rerank(features, [args.text], cosine, args.top, dim=0)
    rows = scores[:, 0].topk(min(args.show, args.top, len(data))).indices
    if len(rows) < args.show:
        note(f"{len(rows)} are shown: " + (f"the split has no more pictures than {len(data)}" if len(data) == len(rows)
                                           else f"ITM has ranked no more than --top, which is {args.top}"))
    match = retriever.match(features[rows], [args.text])[:, 0]
    found = [data.images[row] for row in rows.tolist()]
    names = short_paths([record.path for record in found], data.root)
    indent = INDENT * " "
    print("  match  cosine  picture, and what a person said of it")
    for row, probability, name, record in zip(rows.tolist(), match.tolist(), names, found, strict=True):
        print(f"{probability:6.0%}  {cosine[row, 0]:7.3f}  {name}")
        print(textwrap.fill(record.captions[0], WIDTH, initial_indent=indent, subsequent_indent=indent))
    print(f"pictures of {data.root}, split {data.split}")


def short_paths(paths: Sequence[Path], root: Path) -> list[str]:
    """Paths from where we are, if all lead down from there and fit a line; else from `root`; else as they are."""
    for base in (Path(), root):
        base = os.path.realpath(base)
        names = [os.path.relpath(os.path.realpath(path), base) for path in paths]
        if not any(name.startswith(os.pardir) for name in names) and (
                base == os.path.realpath(root) or INDENT + max(map(len, names)) <= WIDTH):
            return names
    return [str(path) for path in paths]
