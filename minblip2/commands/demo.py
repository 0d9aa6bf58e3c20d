"""demo: the live page on this machine: draw, and a bridge captions it in the browser; or photographs, in Python."""

from __future__ import annotations

import argparse
import functools
import webbrowser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .. import UserError
from .options import add_model_choice, command

PAGE = Path("site") / "html" / "live"


class Handler(SimpleHTTPRequestHandler):
    """Hands out files, and says nothing of it."""

    def log_message(self, *message: object) -> None:
        """Nothing."""


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "demo", run)
    add_model_choice(sub)
    sub.add_argument("--port", type=int, default=0, help="where to serve (default: any that is free)")
    sub.add_argument("--page", type=Path, help=f"the built page of drawings (default: {PAGE.as_posix()})")
    sub.add_argument("--no-browser", action="store_true", help="only serve")


def server(page: Path, port: int) -> ThreadingHTTPServer:
    """A server of the page's files, for this machine alone. Raises UserError when the page is not built."""
    if not (page / "index.html").exists():
        raise UserError(f"{page} holds no live page: build it with `make site` (it needs npm), then try again")
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=page))


def run(args: argparse.Namespace) -> None:
    """Serve the live page until Ctrl-C, and open it: drawings in the browser, or with --run or --model photographs."""
    if args.run or args.model:
        from .demo_server import Server, open_model  # only here: it needs the models

        make = functools.partial(Server, open_model(args.run, args.model, args.parts))
    else:
        make = functools.partial(server, args.page or PAGE)
    try:
        serving = make(args.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port} cannot be served ({error}): choose another, or leave it out") from None
    with serving:
        address = f"http://127.0.0.1:{serving.server_address[1]}/"
        print(f"the live page is at {address}; stop it with Ctrl-C", flush=True)
        if not args.no_browser:
            webbrowser.open(address)
        serving.serve_forever()
