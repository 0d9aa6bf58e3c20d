"""ask: questions about a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data.pictures import load_image
from .models import note_unknown, open_blip2
from .options import add_model_choice, command


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "ask", run)
    sub.add_argument("image", type=Path)
    sub.add_argument("questions", nargs="+", help='for example "what is the dog doing?"')
    add_model_choice(sub)


def run(args: argparse.Namespace) -> None:
    """Answer questions about an image."""
    image = load_image(args.image)
    blip2 = open_blip2(args)
    note_unknown(blip2.tokenizer, args.questions)
    for question, answer in zip(args.questions, blip2.ask(image, args.questions), strict=True):
        print(f"{question} {answer}")
