"""Ranges and blocks on as many threads as torch may use (`torch.get_num_threads`).

Threads of our own, because those of numba do not outlive a fork and those of OpenMP spin. A task
must let go of the interpreter's lock (numba's ``nogil``; torch's operators do), and tasks must not
write to the same places; who does which of them must not matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count as counting
from threading import Barrier, Lock

import torch

LEAST_WORK = 2**22
"""Multiplications, about, that are worth waking another thread."""
_CHUNKS = 8
"""Ranges per thread, so that one that is held up does not hold up the rest."""

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def in_ranges(task: Callable[[int, int], object], count: int, work: int) -> None:
    """``task(start, stop)`` over 0 … ``count``.

    Args:
        work: multiplications, about, per item.
    """
    threads = min(torch.get_num_threads(), count, 1 + count * work // LEAST_WORK)
    if threads <= 1:
        task(0, count)
        return
    chunks = min(count, threads * _CHUNKS)
    numbers = counting()

    def worker() -> None:
        while (chunk := next(numbers)) < chunks:
            task(count * chunk // chunks, count * (chunk + 1) // chunks)

    others = [_workers(threads).submit(worker) for _ in range(threads - 1)]
    worker()
    for other in others:
        other.result()


def in_blocks(task: Callable[[int, int], object], count: int, size: int) -> None:
    """``task(start, stop)`` over blocks of ``size`` of 0 … ``count``; in it torch has one thread.

    The blocks, and what torch makes of them, do not depend on the number of threads.
    """
    blocks = -(-count // size)
    numbers = counting()

    @torch.no_grad()
    def worker() -> None:
        with torch.autocast("cpu", enabled=False):  # which other threads do not know of anyway
            while (block := next(numbers)) < blocks:
                task(block * size, min(count, (block + 1) * size))

    threads = min(torch.get_num_threads(), blocks)
    if torch.get_num_threads() == 1:
        worker()
        return
    for done in [_workers(threads).submit(worker) for _ in range(threads)]:
        done.result()


def _workers(threads: int) -> ThreadPoolExecutor:
    """At least so many, in each of which torch has one thread."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            if _pool is not None:
                _pool.shutdown(wait=False)
            own = torch.get_num_threads()
            _pool, _size = ThreadPoolExecutor(threads, "reseed-kernels"), threads
            # What torch is told counts for the thread that tells it, and for threads to come.
            together = Barrier(threads)
            for done in [_pool.submit(_alone, together) for _ in range(threads)]:
                done.result()
            torch.set_num_threads(own)
        return _pool


def _alone(together: Barrier) -> None:
    together.wait()  # each worker is to come here once
    torch.get_num_threads()  # a thread's first question sets it to what the others have
    torch.set_num_threads(1)


def _forget() -> None:
    """Threads do not outlive a fork."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
