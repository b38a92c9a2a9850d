"""Compiled loops: numba's `njit`, and the threads on which the loops run.

Signals are deferred until a compilation ends. An exception that a signal handler raises inside the
compiler is lost in an LLVM callback, or leaves a function half compiled: the command would ignore
the signal, end with a spurious error, or crash. A compilation takes a second or two, once per
function and machine.

`in_ranges` and `in_blocks` use as many threads as torch may use (`torch.get_num_threads`). The
threads are our own, because numba's do not survive a fork and OpenMP's busy-wait. A task must
release the GIL (numba's ``nogil``; torch's operators do) and must not write to the memory of
another task; the result must not depend on which thread runs which task.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count as counting
from threading import Barrier, Lock
from types import FrameType
from typing import Any

import torch
from numba import njit
from numba.core import event

__all__ = ["njit"]

_HEEDED = (signal.SIGINT, signal.SIGTERM)


class _Deferring(event.Listener):
    """Listener that holds back signals during a compilation and raises the first one after it."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.noted: list[int] = []

    def on_start(self, event: event.Event) -> None:
        # Signal handlers run only in the main thread; other threads are not interrupted.
        if threading.current_thread() is not threading.main_thread():
            return
        self.depth += 1
        if self.depth == 1:
            self.handlers = {number: signal.signal(number, self._note) for number in _HEEDED}

    def on_end(self, event: event.Event) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.depth -= 1
        if self.depth:
            return
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        noted, self.noted = self.noted, []
        if noted:
            signal.raise_signal(noted[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted.append(number)


# A module body runs once per process, so there is one listener.
event.register("numba:compiler_lock", _Deferring())


LEAST_WORK = 2**22
"""Approximate number of multiplications from which waking another thread saves time."""
_CHUNKS = 8
"""Number of ranges per thread; with several, a delayed thread does not delay the others."""

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def in_ranges(
    task: Callable[[int, int], object], count: int, work: int = LEAST_WORK // 256
) -> None:
    """Run ``task(start, stop)`` over ranges of 0 … ``count``.

    Args:
        work: approximate number of multiplications per item; by default, another thread is used
            from 256 items on.
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
    """Run ``task(start, stop)`` over blocks of ``size`` of 0 … ``count``, each on one torch thread.

    The blocks, and torch's results on them, do not depend on the number of threads.
    """
    blocks = -(-count // size)
    numbers = counting()

    @torch.no_grad()
    def worker() -> None:
        with torch.autocast("cpu", enabled=False):  # autocast does not reach other threads
            while (block := next(numbers)) < blocks:
                task(block * size, min(count, (block + 1) * size))

    threads = min(torch.get_num_threads(), blocks)
    if torch.get_num_threads() == 1:
        worker()
        return
    for done in [_workers(threads).submit(worker) for _ in range(threads)]:
        done.result()


def _workers(threads: int) -> ThreadPoolExecutor:
    """Return a pool of at least ``threads`` workers, in each of which torch uses one thread."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            if _pool is not None:
                _pool.shutdown(wait=False)
            own = torch.get_num_threads()
            _pool, _size = ThreadPoolExecutor(threads, "reseed-kernels"), threads
            # `set_num_threads` acts on the calling thread and on threads started later.
            together = Barrier(threads)
            for done in [_pool.submit(_alone, together) for _ in range(threads)]:
                done.result()
            torch.set_num_threads(own)
        return _pool


def _alone(together: Barrier) -> None:
    together.wait()  # makes every worker run this function once
    torch.get_num_threads()  # a thread's first call resets its number to the process's number
    torch.set_num_threads(1)


def _forget() -> None:
    """Drop the pool after a fork, which its threads do not survive."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
