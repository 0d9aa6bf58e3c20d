"""How a command ends: what its user can mend is one sentence, and the exit code is one that shells know."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from .. import UserError
from .progress import forgiving_output

STOPPED, NO_READER = 130, 141  # what a shell says of a command that Ctrl-C, or the end of `head`, has ended


def run_command(name: str, action: Callable[[], int | None], again: str = "",
                speaks: Callable[[], bool] = lambda: True) -> int:
    """Run `action` and return the exit code: its own, or 2 for what the user can mend, 130 after Ctrl-C, 141 for a pipe
    that nobody reads. Then one sentence stands on the error stream, headed by `name`.

    `again` is what the same command does next time, and `speaks` tells whether this of several processes is to say it.
    Raises what else goes wrong, for it is a fault of the program.
    """
    forgiving_output()
    try:
        code = action() or 0
        if sys.stdout:  # None where it was closed before we began
            sys.stdout.flush()  # so that what cannot be written is known here
        return code
    except UserError as error:
        code, said = 2, str(error)
    except KeyboardInterrupt:
        code, said = STOPPED, f"stopped{again and '; '}{again}"
        print(file=sys.stderr)  # the terminal has written ^C, or a progress bar stands there
    except OSError as error:  # a full disk, a folder that may not be written
        if sys.__stdout__:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # what is left to print has no reader
        if isinstance(error, BrokenPipeError):
            return NO_READER
        code, said = 2, f"{error.filename or 'the output'}: {error.strerror or error}"
    if speaks():
        print(f"{name}: {said}", file=sys.stderr)
    return code
