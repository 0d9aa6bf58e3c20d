"""train: a recipe from its parts to figures, or a BLIP-2 of the model hub on one's own pictures."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from .. import UserError
from ..evaluation.measure import keep_results, measure_run
from ..training.bridge import train_bridge
from ..training.budget import dry_run
from ..training.checks import check_folder, check_run, foreign_group, open_split, seen_before
from ..training.distributed import env_rank_and_size
from ..training.recipes import RECIPES, find_recipe
from ..training.records import with_batch_size
from .evaluate import announce, print_figures
from .models import note
from .options import add_parts, check_data, command, positive, seed, share


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "train", run)
    sub.add_argument("--recipe", default="scenes", help=f"one of {', '.join(RECIPES)} (default %(default)s)")
    sub.add_argument("--data", type=Path, help="folder in COCO layout, or a table of file names and captions (scenes "
                                               "draws its own)")
    add_parts(sub)
    sub.add_argument("--out", type=Path, help="where everything is kept (default runs/RECIPE)")
    sub.add_argument("--dry-run", action="store_true", help="only say what it takes and what is missing")
    sub.add_argument("--seed", type=seed, default=0, help="of every draw (default %(default)s)")
    sub.add_argument("--split", default="val", help="what is measured at the end (default %(default)s)")
    sub.add_argument("--batch-size", type=positive, help="pairs of picture and caption in a batch (default: the "
                                                         "recipe's; with --from 32, or all there are)")
    sub.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read, and count "
                                                                "them, instead of refusing")
    sub.add_argument("--resume", action="store_true", help="go on where a killed run stopped (the default)")
    sub.add_argument("--restart", action="store_true", help="train again even if the folder holds a finished run")
    sub.add_argument("--from", dest="model", type=Path,
                     help="folder of a BLIP-2 as on the model hub: its stage 2 goes on training on --data")
    sub.add_argument("--train-split", default="train", help="what is trained on with --from (default %(default)s)")
    sub.add_argument("--prompt", default="", help="with --from: text that stands before each caption")
    sub.add_argument("--steps", type=positive, help="with --from (default 5 passes, at least 200)")
    sub.add_argument("--learning-rate", type=share, default=1e-5, help="with --from (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run a recipe, then measure it on its validation split; or go on from a BLIP-2 of the model hub."""
    if alone := foreign_group():
        note(alone)
    if args.model:
        go_on(args)
        return
    recipe = with_batch_size(find_recipe(args.recipe).with_seed(args.seed), args.batch_size)
    out = args.out or Path("runs") / recipe.name
    if args.dry_run:
        print(dry_run(recipe, args.data, args.parts, args.split, out, args.skip_broken, not args.restart))
        return
    first = env_rank_and_size()[0] == 0
    if first:
        check_run(recipe, args.data, args.parts, out, args.split, args.skip_broken, note, not args.restart)
        if (out / "stage2" / "model.safetensors").exists() and not args.restart:
            print(f"{out} is finished: it is measured, not trained again (--restart would)")
    bridge = train_bridge(recipe, args.data, args.parts, out, resume=not args.restart, skip_broken=args.skip_broken)
    if not first:
        return  # torchrun has started more of us: one measures and speaks
    results = measure_run(out, bridge, args.split, begun=partial(announce, out, args.split))
    print_figures(results)
    keep_results(out, args.split, results)
    print(f"kept in {out}; try: python -m minblip2 caption --run {out} PICTURE")


def go_on(args: argparse.Namespace) -> None:
    """Go on training a BLIP-2 of the model hub on pictures and captions of one's own."""
    from ..evaluation import handover
    from ..training import finetune
    from ..weights.checkpoint import read_config, require_folder

    finetune.check_one_process()
    if args.data is None:
        raise UserError("--from needs pictures and captions: name a CSV of file name and caption, a folder with a "
                        "captions.txt, or one in COCO layout with --data")
    check_data(args.data)
    out = args.out or Path("runs") / f"{args.model.resolve().name}-on-{args.data.stem}"
    check_folder(out)
    if out.resolve() == args.model.resolve():
        raise UserError(f"{out} is the folder that training starts from: name another one with --out")
    require_folder(args.model)
    read_config(args.model)  # both before all pictures are read
    data = open_split(args.data, args.train_split, None if args.dry_run else out, args.skip_broken)
    if (held_out := held_out_of(args)) is not None and (said := seen_before(data, held_out)):
        note(said)
    config = finetune.settings_for(len(data.pairs), args.batch_size, args.steps, args.learning_rate, args.seed)
    needed = finetune.cost(args.model, len(data), config.batch_size)
    print(needed)
    for said in finetune.check_texts(args.model, data, args.prompt):
        note(said)
    if args.dry_run:
        return
    results = handover.finetune_and_measure(args.model, data, held_out, out, config, args.prompt, not args.restart,
                                            needed)
    print(handover.figures_table(results))
    prompt = f" --prompt {shlex.quote(args.prompt)}" if args.prompt else ""
    print(f"kept in {out}, a hub folder; try: python -m minblip2 caption --model {out}{prompt} PICTURE")


def held_out_of(args: argparse.Namespace):
    """The split that is measured, or None where there is none and nobody has asked for one."""
    from ..data.tables import NoSplit

    if args.split == args.train_split:
        note(f"the split {args.split!r} is trained on, so nothing is held out: --split names another")
        return None
    try:
        return open_split(args.data, args.split, None, args.skip_broken)
    except NoSplit as error:
        if args.split != "val":
            raise
        note(f"nothing is held out, so the pictures that were trained on are measured ({error})")
        return None
