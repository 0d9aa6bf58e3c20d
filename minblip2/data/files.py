"""Files that are whole or not there, and JSON that is what it should be."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .. import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None


def write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file next to `path`, then rename it into place: nobody ever sees half a file.

    Each process has a name of its own for it: two that write the same at once do not rename each other's away.
    """
    partial = _own(path, "part")
    _sweep(path, "part")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:  # also of a full disk and of Ctrl-C nothing is left behind
        partial.unlink(missing_ok=True)
        raise


def write_folder(folder: Path, write: Callable[[Path], object], is_there: Callable[[], bool]) -> None:
    """Let `write` make a folder next to `folder`, then rename it into place, where `is_there` finds it from then on.

    Of two processes that do this at once, each makes a folder of its own, and the later one keeps the first one's.
    """
    partial = _own(folder, "partial")
    _sweep(folder, "partial")
    try:
        write(partial)
        if not is_there():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    except OSError:  # in the moment since, another process may have put its own there
        if not is_there():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _own(path: Path, kind: str) -> Path:
    """The name beside `path` under which this process writes."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.{kind}")


def _sweep(path: Path, kind: str) -> None:
    """Remove what processes of this machine were writing beside `path` when they were killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.{glob.escape(socket.gethostname())}-*.{kind}"):
        if not _is_running(left.name[len(f"{path.name}.{socket.gethostname()}-"):-len(f".{kind}")]):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_running(process: str) -> bool:
    """Whether a process of this number is there; where that cannot be asked, yes."""
    if os.name == "nt" or not process.isdecimal():  # in Windows, to ask is to end it
        return True
    if int(process) == os.getpid():
        return False  # an earlier process with our number
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], object] = int, pause: float = 0.1) -> Iterator[None]:
    """Hold a lock, the file `path`: of those who want it one goes on, in this process or another, the others wait.

    The system frees it when its holder ends, however that dies. `waiting` is called once where there is a wait; the
    lock is asked for again every `pause` seconds. The file is gone afterwards. A disk without locks gives none.
    """
    while (file := _lock(path)) is None:
        waiting()
        waiting = int
        time.sleep(pause)
    try:
        yield
    finally:
        if fcntl:
            path.unlink(missing_ok=True)  # before the lock is free: whoever gets it next will see that its file is gone
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would leave it to forked workers
            file.close()
        else:
            file.close()
            with contextlib.suppress(OSError):  # Windows deletes no file that another process has opened
                path.unlink()


def _lock(path: Path) -> BinaryIO | None:
    """The open file with the lock on it, or None where another holds it."""
    file = open(path, "ab")  # noqa: SIM115  (it is open as long as the lock is held)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # the second is how Windows says the same
        file.close()
        return None
    except OSError:
        return file  # there are no locks on this disk
    try:
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    except FileNotFoundError:
        pass
    file.close()  # its last holder has removed it since we opened it: a lock on what nobody else will open
    return None


def write_json(path: Path, content: object) -> None:
    """Write JSON beside `path` and rename it into place."""
    write_beside(path, lambda partial: partial.write_text(json.dumps(content, indent=1), encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, in UTF-8, -16 or -32. Raises UserError for one that is absent, no JSON, no object."""
    try:
        content = json.loads(path.read_bytes())  # which may begin with a byte order mark, or be UTF-16
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): download or write it again, in UTF-8") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object with keys: download or write it again")
    return content


def field(entry: Any, key: str, kind: type, file: object) -> Any:
    """entry[key], which must be there and of a kind (true is no int). Raises UserError naming the `file` it is from."""
    if not isinstance(entry, dict) or key not in entry:
        raise UserError(f"{file} has an entry without {key!r}: {str(entry)[:80]}; add it, or take the entry out")
    if not isinstance(entry[key], kind) or (kind is int and isinstance(entry[key], bool)):
        raise UserError(f"{file} has {key} = {str(entry[key])[:80]!r}, which is not {kind.__name__}: "
                        "mend it, or take the entry out")
    return entry[key]


def whole(entry: Any, key: str, file: object) -> int:
    """entry[key] as a whole number, which may be written as 7, 7.0 or "7". Raises UserError naming the `file`."""
    value = field(entry, key, object, file)
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,19}", value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -2**63 <= value < 2**63:
        raise UserError(f"{file} has {key} = {str(value)[:80]!r}, which is not int, or not one of 64 bits: give the "
                        "images whole numbers below 2**63, the same ones in `images` and `annotations`")
    return value
