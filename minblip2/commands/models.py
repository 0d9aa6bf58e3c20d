"""Which model a command means, where it keeps features, and what it leaves unread of a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import UserError
from ..data.coco import CocoCaptions
from ..data.tokenizer import Tokenizer, normalize_caption
from ..training.bridge import load_bridge
from ..training.records import recorded_data
from ..training.shipping import usual_run, working_copy
from ..weights.blip2 import Blip2
from ..weights.retriever import Retriever
from .options import check_data


def note(text: str) -> None:
    """Say what is no error but should be known, on the error stream."""
    print(f"minblip2: {text}", file=sys.stderr)


def open_blip2(args: argparse.Namespace) -> Blip2:
    """The model that writes texts: --model, or that of --run."""
    return Blip2.from_folder(args.model) if args.model else load_bridge(args.run or usual_run(), args.parts).blip2


def open_retriever(args: argparse.Namespace) -> Retriever:
    """The model that compares pictures with texts: --model, or that of --run."""
    if args.model:
        return Retriever.from_folder(args.model)
    return load_bridge(args.run or usual_run(), args.parts).retriever


def run_folder(args: argparse.Namespace) -> Path:
    """Where features and results are kept: the run, or for --model a folder of its own. Raises UserError without data.
    """
    if args.model and not args.data:
        raise UserError("--model needs images: name a folder with captions, or a CSV, with --data")
    if args.data:
        check_data(args.data)
    return Path("runs") / args.model.resolve().name if args.model else args.run or working_copy()


def open_data(args: argparse.Namespace, run: Path) -> CocoCaptions:
    """The pictures of --data, or those that the run was trained on."""
    return CocoCaptions(args.data or recorded_data(run), args.split)


def note_unknown(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Say which words of the texts the model has never read: to it, all of them are one and the same."""
    unknown = set()
    for text in texts:
        read = tokenizer.backend.encode(text, add_special_tokens=False)
        unknown |= {text[slice(*place)] for token, place in zip(read.tokens, read.offsets, strict=True)
                    if token == "[UNK]"}
    if unknown:
        note(f"unknown words, read as one and the same: {', '.join(sorted(unknown))}")


def note_unread(retriever: Retriever, texts: Sequence[str]) -> None:
    """Say which words of the texts the Q-Former does not know, and where it stops reading a long one."""
    note_unknown(retriever.tokenizer, texts)
    for text in texts:
        whole = retriever.tokenizer.encode(normalize_caption(text), max_length=sys.maxsize)
        if len(whole) > retriever.max_length:
            read = retriever.tokenizer.decode(whole[:retriever.max_length - 1])
            note(f"a text is longer than the {retriever.max_length} ids that are read of it, which end with "
                 f"\"... {read[-30:]}\"")
