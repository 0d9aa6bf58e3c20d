"""Command line: python -m minblip2 train | caption | ask | retrieve | evaluate | attend | export."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from . import UserError, __version__
from .course.results import cell
from .course.tables import plain_text
from .data.coco import CocoCaptions
from .data.files import read_json, write_beside
from .data.pictures import load_image
from .data.progress import forgiving_output
from .data.tables import NoSplit
from .data.tokenizer import Tokenizer
from .device import DTYPES, computing
from .evaluation.asking import questions_table
from .evaluation.measure import LABELS, evaluate_run
from .training.bridge import load_bridge, train_bridge
from .training.budget import dry_run
from .training.distributed import env_rank, is_first_to_report
from .training.recipes import RECIPES, find_recipe, recorded_data
from .training.shipping import usual_run, working_copy
from .weights.blip2 import Blip2
from .weights.retriever import Retriever


def print_table(results: dict[str, float]) -> None:
    """One line for each figure that has a label, and for each kind of question."""
    output = [(label, results[name]) for name, label in LABELS.items() if name in results]
    print(plain_text(*((label, f"{value:.1f}" if isinstance(value, float) else value) for label, value in output)))
    if asked := questions_table([results], cell):
        print("\n" + plain_text(*asked))


def note_unknown(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Say which words of the texts a model has never read: to it, all of them are one and the same."""
    unknown = set()
    for text in texts:
        read = tokenizer.backend.encode(text, add_special_tokens=False)
        unknown |= {text[slice(*place)] for token, place in zip(read.tokens, read.offsets, strict=True)
                    if token == "[UNK]"}
    if unknown:
        print(f"minblip2: unknown words, read as one and the same: {', '.join(sorted(unknown))}", file=sys.stderr)


def train_command(args: argparse.Namespace) -> None:
    """Run a recipe, then measure it on its validation split; or go on from a BLIP-2 of the model hub."""
    if args.model:
        finetune_command(args)
        return
    recipe = find_recipe(args.recipe).with_seed(args.seed)
    out = args.out or Path("runs") / recipe.name
    if args.dry_run:
        print(dry_run(recipe, args.data, args.parts))
        return
    if (out / "stage2" / "model.safetensors").exists() and not args.restart and env_rank()[0] == 0:
        print(f"{out} is finished: it is measured, not trained again (--restart would)")
    bridge = train_bridge(recipe, args.data, args.parts, out, resume=not args.restart)
    if env_rank()[0] > 0:
        return  # torchrun has started more of us: one measures and speaks
    print_table(evaluate_run(out, bridge, args.split, begun=partial(announce, out, args.split)))
    print(f"kept in {out}; try: python -m minblip2 caption --run {out} PICTURE")


def finetune_command(args: argparse.Namespace) -> None:
    """Go on training a BLIP-2 of the model hub on pictures and captions of one's own."""
    from .evaluation import handover
    from .training import finetune

    if args.data is None:
        raise UserError("--from needs pictures and captions: name a CSV of file name and caption, a folder with a "
                        "captions.txt, or one in COCO layout with --data")
    out = args.out or Path("runs") / f"{args.model.resolve().name}-on-{args.data.stem}"
    if out.resolve() == args.model.resolve():
        raise UserError(f"{out} is the folder that training starts from: name another one with --out")
    data = CocoCaptions(args.data, args.train_split, check=True)
    try:
        held_out = CocoCaptions(args.data, args.split)
    except NoSplit as error:
        if args.split != "val":  # which nobody has asked for
            raise
        print(f"minblip2: nothing is held out, so the pictures that were trained on are measured ({error})",
              file=sys.stderr)
        held_out = None
    config = finetune.settings_for(len(data.pairs), args.batch_size, args.steps, args.learning_rate, args.seed)
    print(finetune.cost(args.model, len(data), config.batch_size))
    if args.dry_run:
        return
    results = handover.finetune_and_measure(args.model, data, held_out, out, config, args.prompt, not args.restart)
    print(handover.figures_table(results))
    print(f"kept in {out}, a hub folder; try: python -m minblip2 caption --model {out} PICTURE")


def export_command(args: argparse.Namespace) -> None:
    """Copy what a finished run has trained to a folder that can be moved, with a model card."""
    from .evaluation.handover import export_run

    export_run(args.source, args.folder)
    print(f"wrote {args.folder}; its README.md is a model card: read it before you publish")


def caption_command(args: argparse.Namespace) -> None:
    """Say what is in each image."""
    images = [load_image(path) for path in args.images]  # all are read before anything is said of one
    writer = Blip2.from_folder(args.model) if args.model else load_bridge(args.run or usual_run())
    if not args.model:
        writer = writer.retriever if args.stage1 else writer.blip2
    torch.manual_seed(args.seed)  # here, for loading draws, too
    choice = dict(beams=args.beams) if args.top_p is None else dict(beams=1, top_p=args.top_p)
    if args.prompt is not None:
        choice |= dict(prompt=args.prompt)
    for path, caption in zip(args.images, writer.caption(images, max_length=args.max_length, **choice), strict=True):
        print(f"{path}: {caption}")


def ask_command(args: argparse.Namespace) -> None:
    """Answer questions about an image."""
    image = load_image(args.image)
    blip2 = Blip2.from_folder(args.model) if args.model else load_bridge(args.run or usual_run()).blip2
    note_unknown(blip2.tokenizer, args.questions)
    for question, answer in zip(args.questions, blip2.ask(image, args.questions), strict=True):
        print(f"{question} {answer}")


def run_folder(args: argparse.Namespace) -> Path:
    """The run that is meant; for a model from elsewhere, where its features are kept. Raises UserError without data."""
    if args.model and not args.data:
        raise UserError("--model needs images: name a folder with captions, or a CSV, with --data")
    return args.run or (Path("runs") / args.model.resolve().name if args.model else working_copy())


def retrieve_command(args: argparse.Namespace) -> None:
    """Find the images of a split that fit a text best: by ITC, then re-ranked by ITM."""
    run = run_folder(args)
    bridge = None if args.model else load_bridge(run)
    retriever = Retriever.from_folder(args.model) if args.model else bridge.retriever
    note_unknown(retriever.tokenizer, [args.text])
    data = CocoCaptions(args.data or recorded_data(bridge.recipe, run), args.split)
    features = torch.from_numpy(retriever.cached_features(data.paths, run / "cache").copy())
    cosine = retriever.similarity(features, [args.text])
    scores = retriever.rerank(features, [args.text], cosine, args.top, dim=0)
    print("  match  cosine  image, and what a person said of it")
    for row in scores[:, 0].topk(min(args.show, args.top, len(data))).indices.tolist():
        record = data.images[row]
        print(f"{scores[row, 0]:7.2f}  {cosine[row, 0]:6.3f}  {record.path}  {record.captions[0]}")


def announce(run: Path, split: str) -> None:
    """Say at once what will be measured, and how long that took the last time, if there was one."""
    before = run / f"results-{split}.json"
    seconds = read_json(before).get("seconds_to_evaluate") if before.exists() else None
    last = f" (the last time this took {seconds:.0f} seconds)" if seconds else ""
    print(f"measuring {run} on {split}: retrieval, captions, and what they get right{last}", flush=True)


def evaluate_command(args: argparse.Namespace) -> None:
    """Measure a finished run, or a BLIP-2 of the model hub, on a split."""
    run = run_folder(args)
    if args.model:
        from .evaluation.handover import evaluate_official

        print_table(evaluate_official(args.model, CocoCaptions(args.data, args.split), run / "cache", args.top))
        return
    print_table(evaluate_run(run, load_bridge(run), args.split, args.top, partial(announce, run, args.split)))
    print(f"these and more in {run / f'results-{args.split}.json'}")


def attend_command(args: argparse.Namespace) -> None:
    """Draw which parts of a picture make each text match it."""
    from .course import figures, viz

    if args.to.suffix.lower() != ".png":
        raise UserError(f"the figure is a PNG: give --to a name that ends in .png, not {args.to}")
    if args.to.is_symlink() or args.to.exists() and (not args.to.is_file() or args.to.samefile(args.image)):
        raise UserError(f"--to {args.to} is there and is no figure of an earlier run: give it a new name")
    image = load_image(args.image)
    retriever = Retriever.from_folder(args.model) if args.model else load_bridge(args.run or usual_run()).retriever
    note_unknown(retriever.tokenizer, args.texts)
    maps = retriever.attention_maps(image, args.texts)
    shown = retriever.transform.crop_and_resize(image)
    figure = figures.attention_maps(shown, dict(zip(args.texts, maps, strict=True)))
    args.to.parent.mkdir(parents=True, exist_ok=True)
    write_beside(args.to, lambda path: path.write_bytes(viz.png(figure)))
    print(f"wrote {args.to}; each map is coloured up to its own maximum, which stands above it")


def positive(text: str) -> int:
    """A count of at least one. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: give 1 or more")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and up to 1. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give a number above 0 and up to 1")
    return value


def computing_options() -> argparse.ArgumentParser:
    """What every command knows: where to compute, and in which precision."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, mps (default: what MINBLIP2_DEVICE "
                                          "says, else the CPU for the scenes, else a GPU if there is one)")
    options.add_argument("--dtype", choices=DTYPES, help="of the frozen parts (default: what MINBLIP2_DTYPE says, else "
                                                         "bfloat16 where the device computes in it, else float32)")
    return options


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="python -m minblip2", description=__doc__)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    where = computing_options()

    def command(name: str, run, needs_run: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__, parents=[where])
        sub.set_defaults(execute=run)
        if needs_run:
            sub.add_argument("--run", type=Path, help="folder of a trained bridge (default: runs/scenes if you have "
                                                      "trained it, else the bridge that ships)")
        return sub

    train = command("train", train_command, needs_run=False)
    train.add_argument("--recipe", default="scenes", help=f"one of {', '.join(RECIPES)} (default %(default)s)")
    train.add_argument("--data", type=Path, help="folder in COCO layout (scenes draws its own)")
    train.add_argument("--parts", type=Path, help="folder of pretrained models, each in the hub's layout")
    train.add_argument("--out", type=Path, help="where everything is kept (default runs/RECIPE)")
    train.add_argument("--dry-run", action="store_true", help="only say what it takes and what is missing")
    train.add_argument("--seed", type=int, default=0, help="of every draw (default %(default)s)")
    train.add_argument("--split", default="val", help="what is measured at the end (default %(default)s)")
    train.add_argument("--resume", action="store_true", help="go on where a killed run stopped (the default)")
    train.add_argument("--from", dest="model", type=Path,
                       help="folder of a BLIP-2 as on the model hub: its stage 2 goes on training on --data")
    train.add_argument("--train-split", default="train", help="what is trained on with --from (default %(default)s)")
    train.add_argument("--prompt", default="", help="with --from: text that stands before each caption")
    train.add_argument("--batch-size", type=positive, help="with --from: pairs (default 32, or all there are)")
    train.add_argument("--steps", type=positive, help="with --from (default 5 passes, at least 200)")
    train.add_argument("--learning-rate", type=share, default=1e-5, help="with --from (default %(default)s)")
    train.add_argument("--restart", action="store_true", help="train again even if the folder holds a finished run")

    caption = command("caption", caption_command)
    caption.add_argument("images", nargs="+", type=Path)
    caption.add_argument("--model", type=Path, help="folder of a BLIP-2 as on the model hub, instead of --run")
    caption.add_argument("--prompt", help="text that the caption goes on from, as in --prompt 'a picture of'; only "
                                          "what is new is printed")
    caption.add_argument("--beams", type=positive, default=5, help="of the search (default %(default)s)")
    caption.add_argument("--top-p", type=share, help="draw from the nucleus of this probability instead of searching")
    caption.add_argument("--seed", type=int, default=0, help="of the draw (default %(default)s)")
    caption.add_argument("--max-length", type=positive, default=30, help="in tokens (default %(default)s)")
    caption.add_argument("--stage1", action="store_true", help="let the Q-Former caption without a language model")

    ask = command("ask", ask_command)
    ask.add_argument("image", type=Path)
    ask.add_argument("questions", nargs="+", help='for example "what is the dog doing?"')
    ask.add_argument("--model", type=Path, help="folder of a BLIP-2 as on the model hub, instead of --run")

    retrieve = command("retrieve", retrieve_command)
    retrieve.add_argument("text")
    retrieve.add_argument("--data", type=Path, help="folder in COCO layout (default: the run's own)")
    retrieve.add_argument("--split", default="val", help="where to look (default %(default)s)")
    retrieve.add_argument("--top", type=positive, default=32, help="so many ITM ranks again (default %(default)s)")
    retrieve.add_argument("--show", type=positive, default=5, help="so many of these are shown (default %(default)s)")

    evaluate = command("evaluate", evaluate_command)
    evaluate.add_argument("--data", type=Path, help="with --model: what it is measured on")
    evaluate.add_argument("--split", default="val", help="what is measured (default %(default)s)")
    evaluate.add_argument("--top", type=positive, default=16, help="so many ITM ranks again (default %(default)s)")

    attend = command("attend", attend_command)
    attend.add_argument("image", type=Path)
    attend.add_argument("texts", nargs="+", help='for example "a dog" "the grass"')
    attend.add_argument("--to", type=Path, default=Path("attention.png"),
                        help="the figure to write, a PNG (default %(default)s)")
    for sub in (retrieve, evaluate, attend):
        sub.add_argument("--model", type=Path, help="folder of a BLIP-2 as on the model hub, instead of --run")

    export = command("export", export_command, needs_run=False)
    export.add_argument("source", metavar="run", type=Path, help="folder of a trained bridge")
    export.add_argument("folder", type=Path, help="where to, a new folder")
    return top


def main() -> int:
    """Run one command; 0 when it worked, 2 when the user's input cannot be used, 130 when it was stopped."""
    forgiving_output()
    args = parser().parse_args()
    try:
        with computing(args.device, args.dtype):
            args.execute(args)
        sys.stdout.flush()  # so that what cannot be written is known here
    except UserError as error:
        if is_first_to_report():
            print(f"minblip2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first_to_report():
            again = "; the same command goes on where it stopped" if args.command == "train" else ""
            print(f"\nminblip2: stopped{again}", file=sys.stderr)
        return 130  # what a shell says of a command that Ctrl-C has ended
    except OSError as error:  # a full disk, a folder that may not be written: no fault of the program
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # what is left to print has no reader
        if isinstance(error, BrokenPipeError):
            return 141  # what a shell says of it, as of any command in front of `head`
        if is_first_to_report():
            print(f"minblip2: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
