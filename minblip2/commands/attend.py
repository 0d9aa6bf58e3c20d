"""attend: where in a picture a text is found."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import UserError
from ..data.files import write_beside
from ..data.pictures import load_image
from ..evaluation.tables import plain_text
from .models import note_unread, open_retriever
from .options import add_model_choice, command

SHOWN = 800  # pixels of the longer side in the figure
SOFTWARE = "minblip2 attend"


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "attend", run)
    sub.add_argument("image", type=Path)
    sub.add_argument("texts", nargs="+", help='for example "a dog" "the grass"')
    sub.add_argument("--to", type=Path, default=Path("attention.png"),
                     help="the figure to write, a PNG (default %(default)s)")
    add_model_choice(sub)


def run(args: argparse.Namespace) -> None:
    """Draw which parts of a picture make each text match it."""
    from ..course import figures, viz  # only here: what draws is slow to load

    if args.to.suffix.lower() != ".png":
        raise UserError(f"the figure is a PNG: give --to a name that ends in .png, not {args.to}")
    if args.to.is_symlink() or args.to.exists() and (not is_figure(args.to) or args.to.samefile(args.image)):
        raise UserError(f"--to {args.to} is there, and is not marked as a figure of this command: give a new name, or "
                        "delete it")
    image, texts = load_image(args.image), list(dict.fromkeys(args.texts))
    retriever = open_retriever(args)
    note_unread(retriever, texts)
    features = retriever.encode_images(image)
    match = retriever.match(features, texts)[0].tolist()
    maps = retriever.attention_maps(features, texts)
    said = [f"matches to {probability:.0%}" for probability in match]
    shown = retriever.transform.part_seen(image)
    shown.thumbnail((SHOWN, SHOWN))
    figure = figures.attention_maps(shown, dict(zip(texts, maps, strict=True)), notes=said)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    with Image.open(io.BytesIO(viz.png(figure))) as drawn:
        write_beside(args.to, lambda path: drawn.save(path, "png", pnginfo=mark, optimize=True))
    print(plain_text(*((text, one) for text, one in zip(texts, said, strict=True))))
    print(f"wrote {args.to}; each map is coloured up to its own maximum. A text that names only part of what is there "
          "may match to 0%: compare maps, or name everything")


def is_figure(path: Path) -> bool:
    """Whether a file was drawn by this command, so that it may be drawn anew: a PNG says who has written it."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
