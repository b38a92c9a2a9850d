"""One chunk ahead: a thread computes the next chunk while SAEs train on this one."""

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
    """Nobody waits for this chunk any more."""


class Prefetch:
    """Computes chunks in a thread of its own, at most one that nobody has asked for yet.

    A chunk is a pure function of its number, so that it is the same whoever computes it, given as
    many threads of torch: these are counted for each calling thread. On a GPU the thread has a
    CUDA stream of its own, which runs beside that of the training step.

    The thread starts with the first chunk and ends with `close`.

    Args:
        compute: from a chunk's number to the chunk. It may call `check` now and then.
        device: where chunks are.
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
        """Begin chunk ``c``, unless it was begun; one that was begun in its place is dropped."""
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
        """Chunk ``c``, waited for if it was begun, computed by the caller if not.

        Raises:
            BaseException: what went wrong while it was computed, with its own traceback.
        """
        if self._ahead is None or self._ahead[0] != c:
            self._drop()  # one at a time reads the source
            return self._compute(c)
        (_, future), self._ahead = self._ahead, None
        chunk, done = future.result()
        if done is not None:
            # The caller's stream goes on when the chunk is there, and its memory is not given to
            # another chunk before what the caller's stream does with it is done.
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for x in chunk.values():
                x.record_stream(current)
        return chunk

    def check(self) -> None:
        """For the source, between two passes: raise `Abandoned` where the chunk is not wanted."""
        dropped = self._closed or self._abandoned.is_set()
        if dropped and threading.get_ident() == self._worker:
            raise Abandoned

    def close(self) -> None:
        """End the thread; what it is computing is dropped at the next `check`."""
        self._closed = True  # also where a second Ctrl-C ends the waiting below
        self._drop()
        self._pool.shutdown()

    def _drop(self) -> None:
        if self._ahead is None:
            return
        (_, future), self._ahead = self._ahead, None
        self._abandoned.set()
        try:
            # Whatever became of it: it is not needed.
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
            self._side.wait_event(begun)  # weights and constants were put there by the caller's
            chunk = self._compute(c)
            done = torch.cuda.Event()
            done.record(self._side)
        return chunk, done


def pays(device: torch.device) -> bool:
    """Whether computing ahead saves time: on a GPU, and where torch leaves half of the CPUs idle
    (measured with one thread on two cores: benchmarks/README.md)."""
    if device.type != "cpu":
        return True
    return 2 * torch.get_num_threads() <= cpus()
