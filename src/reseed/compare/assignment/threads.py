"""Parallel execution of compiled loops, on as many threads as torch may use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch


def in_ranges(task: Callable[[int, int], None], count: int, least: int = 256) -> None:
    """Run ``task(start, stop)`` over ranges of 0 … ``count`` in parallel threads.

    The task has to release the interpreter's lock (numba's ``nogil``), and different ranges must
    not write to the same places.

    Args:
        least: minimum length of a range, unless it is the only one.
    """
    workers = max(1, min(torch.get_num_threads(), count // least))
    if workers == 1:
        task(0, count)
        return
    bounds = [count * w // workers for w in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(task, *ends) for ends in pairwise(bounds)]:
            done.result()
