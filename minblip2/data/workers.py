"""Work done ahead of its need, in threads or in processes, so that nobody waits for it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .. import UserError


def prefetch(function: Callable[[Any], Any], items: Iterable[Any], workers: int, window: int = 64,
             processes: bool = False) -> Iterator[Any]:
    """function of each item, in order, by threads at most `window` items ahead (`pool.map` would take all at once).

    With `processes` it runs in worker processes: function, items and results must pickle. Raises what the function
    raises, and UserError when a worker process dies.
    """
    with _processes(workers) if processes else ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(function, item) for item in items)
        try:
            waiting = deque(itertools.islice(futures, window))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(itertools.islice(futures, 1))
                yield result
        except BrokenProcessPool:
            raise UserError("a worker process died, most likely for want of memory: free some, then run the same "
                            "command again") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _processes(workers: int) -> Executor:
    # Forked workers start at once and need no guard around the caller's script. They never touch PyTorch's threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a parent that is killed cannot end its workers
    os._exit(1)
