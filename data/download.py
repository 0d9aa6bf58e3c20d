"""Pictures, captions and frozen models for the recipes: python data/download.py coco | weights [--help]

Every file is checked and then renamed into place, so a download may be stopped or killed at any moment: the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import coco
from fetch import Fetcher
from minblip2 import UserError
from minblip2.commands.rules import given_options, never_with, refuse_idle_options
from minblip2.data.progress import forgiving_output
from minblip2.weights.hub import MODELS, RECIPE_MODELS

RULES = {"coco": never_with("verify", "nothing is fetched then", "images", "licenses", "seed", "workers", "timeout",
                            "base_url", "karpathy_url")}


def coco_command(args: argparse.Namespace) -> None:
    """Fetch a subset of COCO 2017: pictures, captions and boxes."""
    out = args.out or Path("data") / ("coco-karpathy" if "karpathy" in args.split else "coco")
    if args.verify:
        print(f"{out}: {coco.verify(out)} files are as they were fetched")
        return
    coco.download(out, args.split, args.images, args.seed, args.base_url, args.karpathy_url, args.licenses,
                  Fetcher(args.workers, args.timeout))


def weights_command(args: argparse.Namespace) -> None:
    """Fetch frozen models from the hub, by their names or a recipe's."""
    import weights  # only here: the hub's library is slow to load

    weights.download(args.names, args.out, args.yes)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="python data/download.py", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("coco", help=coco_command.__doc__, description=coco_command.__doc__)
    sub.set_defaults(execute=coco_command)
    sub.add_argument("--split", nargs="+", choices=[*coco.SOURCES, "karpathy"], default=list(coco.SOURCES),
                     help="what to fetch (default: train2017 val2017); karpathy is the split of the captioning papers")
    sub.add_argument("--images", type=int, help="how many of the first split, and a tenth as many of each other "
                                                "(default: all, 19 GB)")
    sub.add_argument("--seed", type=int, default=0, help="which ones; more of one seed hold all that fewer do")
    sub.add_argument("--licenses", nargs="+", metavar="LICENCE",
                     help="only pictures under these, by COCO's ids or names: by by-sa by-nc ...")
    sub.add_argument("--out", type=Path, help="folder (default: data/coco, or data/coco-karpathy)")
    sub.add_argument("--verify", action="store_true", help="only compare the folder with its manifests, offline")
    sub.add_argument("--workers", type=int, default=16, help="connections at a time")
    sub.add_argument("--timeout", type=float, default=30.0, help="seconds that a connection may say nothing")
    sub.add_argument("--base-url", default=coco.OFFICIAL, help="a mirror with the same paths (default: %(default)s)")
    sub.add_argument("--karpathy-url", default=coco.KARPATHY, help="where the split lies (default: %(default)s)")

    sub = commands.add_parser("weights", help=weights_command.__doc__, description=weights_command.__doc__)
    sub.set_defaults(execute=weights_command)
    sub.add_argument("names", nargs="+", metavar="NAME",
                     help=f"a recipe ({', '.join(RECIPE_MODELS)}) or among {', '.join(MODELS)}")
    sub.add_argument("--out", type=Path, default=Path("data/parts"), help="folder (default: %(default)s)")
    sub.add_argument("--yes", action="store_true", help="do not ask before fetching")
    return top


def main(words: list[str] | None = None) -> int:
    """Run one command; 0 when everything is there, 2 when something is not."""
    args = parser().parse_args(words)
    try:
        refuse_idle_options(args.command, given_options(parser(), words), RULES)
        args.execute(args)
    except UserError as error:
        print(f"download: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the network's errors are told by then: this is the folder's
        print(f"download: {error.filename or 'a file'} cannot be written or read ({error.strerror or error}): make "
              "room or choose another --out, then run the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("download: stopped; the same command goes on from here", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # connections that wait for a server would hold up an orderly end; no file needs one
    return 0


if __name__ == "__main__":
    forgiving_output()
    sys.exit(main())
