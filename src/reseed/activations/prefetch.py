"""Prefetching: a thread computes the next chunk while SAEs train on the current one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from reseed.devices import cpus

Chunk = dict[Any, Tensor]


class Abandoned(Exception):
    """Signal to the thread that its chunk is no longer wanted."""


class Prefetch:
    """A thread that computes chunks, at most one ahead of the caller.

    A chunk is a pure function of its number, so it does not matter which thread computes it, given
    the same number of torch threads (a setting of each calling thread). On a GPU the thread uses
    its own CUDA stream, concurrent with that of the training step.

    The thread starts with the first chunk and ends with `close`.

    Args:
        compute: maps a chunk's number to the chunk. It should call `check` periodically.
        device: device of the chunks.
    """

    def __init__(self, compute: Callable[[int], Chunk], device: torch.device) -> None:
        self._compute = compute
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reseed-prefetch")
        self._abandoned = threading.Event()
        self._closed = False
        self._ahead: tuple[int, Future[tuple[Chunk, Any]]] | None = None
        self._worker: int | None = None
        self._side: Any = None

    def start(self, c: int) -> None:
        """Start computing chunk ``c``, unless already started; abandon any other chunk."""
        if self._ahead is not None and self._ahead[0] == c:
            return
        self._drop()
        threads, begun = torch.get_num_threads(), None
        if self._device.type == "cuda":
            self._side = self._side or torch.cuda.Stream(self._device)
            begun = torch.cuda.Event()
            begun.record(torch.cuda.current_stream(self._device))
        self._ahead = c, self._pool.submit(self._work, c, threads, begun)

    def take(self, c: int) -> Chunk:
        """Return chunk ``c``: wait for it if it was started, else compute it in this thread.

        Raises:
            BaseException: the error of the computation, with its own traceback.
        """
        if self._ahead is None or self._ahead[0] != c:
            self._drop()  # only one thread at a time may read the source
            return self._compute(c)
        (_, future), self._ahead = self._ahead, None
        chunk, done = future.result()
        if done is not None:
            # The caller's stream waits for the chunk; record_stream keeps its memory from being
            # reused before the caller's kernels are done with it.
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for x in chunk.values():
                x.record_stream(current)
        return chunk

    def check(self) -> None:
        """Raise `Abandoned` if the chunk is no longer wanted; sources call it between passes."""
        dropped = self._closed or self._abandoned.is_set()
        if dropped and threading.get_ident() == self._worker:
            raise Abandoned

    def close(self) -> None:
        """End the thread; a chunk in progress is abandoned at its next `check`."""
        self._closed = True  # holds even if a second Ctrl-C interrupts the waiting below
        self._drop()
        self._pool.shutdown()

    def _drop(self) -> None:
        if self._ahead is None:
            return
        (_, future), self._ahead = self._ahead, None
        self._abandoned.set()
        try:
            # The chunk is not needed, so its error is not either.
            with suppress(Exception):
                if not future.cancel():
                    future.result()
        finally:
            self._abandoned.clear()

    def _work(self, c: int, threads: int, begun: Any) -> tuple[Chunk, Any]:
        self._worker = threading.get_ident()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if begun is None:
            return self._compute(c), None
        with torch.cuda.stream(self._side):
            self._side.wait_event(begun)  # the caller's stream may still copy weights to the GPU
            chunk = self._compute(c)
            done = torch.cuda.Event()
            done.record(self._side)
        return chunk, done


def pays(device: torch.device) -> bool:
    """Return True if prefetching saves time: on a GPU, or if torch leaves half of the CPUs idle.

    Measured with one thread on two cores: benchmarks/README.md.
    """
    if device.type != "cpu":
        return True
    return 2 * torch.get_num_threads() <= cpus()
