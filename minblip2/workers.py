"""Work done ahead of its need, so that nobody waits for it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ahead(function: Callable[[Any], Any], items: Iterable[Any], workers: int, window: int = 64) -> Iterator[Any]:
    """function of each item, in order, by threads at most `window` items ahead (`pool.map` would take all at once)."""
    with ThreadPoolExecutor(workers) as pool:
        futures = (pool.submit(function, item) for item in items)
        waiting = deque(itertools.islice(futures, window))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(itertools.islice(futures, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
