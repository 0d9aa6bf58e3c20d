"""demo: the live page of the site, on this machine: draw, and the bridge that ships captions it in the browser."""

from __future__ import annotations

import argparse
import functools
import webbrowser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .. import UserError

PAGE = Path("site") / "html" / "live"


class Handler(SimpleHTTPRequestHandler):
    """Hands out files, and says nothing of it."""

    def log_message(self, *message: object) -> None:
        """Nothing."""


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = commands.add_parser("demo", help=run.__doc__, description=run.__doc__)
    sub.add_argument("--port", type=int, default=0, help="where to serve (default: any that is free)")
    sub.add_argument("--page", type=Path, default=PAGE, help=f"the built page (default: {PAGE.as_posix()})")
    sub.add_argument("--no-browser", action="store_true", help="only serve")
    sub.set_defaults(execute=run, device=None, dtype=None)


def server(page: Path, port: int) -> ThreadingHTTPServer:
    """A server of the page's files, for this machine alone. Raises UserError when the page is not built."""
    if not (page / "index.html").exists():
        raise UserError(f"{page} holds no live page: build it with `make site` (it needs npm), then try again")
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=page))


def run(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C, and open it."""
    with server(args.page, args.port) as serving:
        address = f"http://127.0.0.1:{serving.server_address[1]}/"
        print(f"the live bridge is at {address}; stop it with Ctrl-C", flush=True)
        if not args.no_browser:
            webbrowser.open(address)
        serving.serve_forever()
