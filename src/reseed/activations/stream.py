"""Chunks and batches: the base class of activation streams, and prefetching.

A stream is a pure function of its configuration: chunk c does not depend on earlier requests. Its
activations are dealt into 8 stripes, and each stripe is permuted by a generator seeded with (order
seed, c, stripe). A batch takes the same number of tokens from every stripe. There is no shuffle
buffer to save: the position (chunk, offset) of step s is computed from s.

`Prefetch` is a thread that computes the next chunk while SAEs train on the current one.

    M chunk_tokens · B batch · D d_in
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reseed.activations.dataset import STRIPES, DatasetConfig, Position, batches_available
from reseed.activations.hookpoints import Hookpoint
from reseed.distributed.process_group import ALONE, ProcessGroup
from reseed.system.devices import cpus

Batch = dict[Hookpoint, Float[Tensor, "batch d_in"]]
Chunk = dict[Any, Tensor]


class ChunkStream(ABC):
    """The endless or finite sequence of chunks of one source.

    The base class is endless with full chunks. A stream that ends or has partial chunks overrides
    `num_batches`, `rows`, `position` and `steps_before`.

    Args:
        config: order and chunk size.
        hookpoints: where activations are read, all in one forward pass.
        device: device of the activations.

    Attributes:
        stripes: the stripes that this rank reads.
    """

    def __init__(
        self, config: DatasetConfig, hookpoints: Sequence[Hookpoint], device: torch.device
    ) -> None:
        self.config = config
        self.hookpoints = tuple(dict.fromkeys(hookpoints))
        self.device = device
        self.stripes = slice(0, STRIPES)
        self._compute_ranks = ALONE
        self._latest: tuple[int, dict[Hookpoint, Tensor]] = (-1, {})
        self._prefetch: Prefetch | None = None
        self._end: tuple[Position, int] = (Position(0, 0), STRIPES)
        self._looked_after = -1

    @abstractmethod
    def _compute_chunk(self, c: int) -> dict[Hookpoint, Float[Tensor, "stripes rows d_in"]]:
        """Return chunk ``c``, dealt into stripes and permuted by `_permutation`."""

    def _compute_own_stripes(self, c: int) -> dict[Hookpoint, Float[Tensor, "own rows d_in"]]:
        """Return this rank's stripes of chunk ``c``.

        Sources that can compute stripes separately override this.
        """
        if self.stripes == slice(0, STRIPES):
            return self._compute_chunk(c)
        # A view would keep the whole chunk alive.
        return {hook: x[self.stripes].clone() for hook, x in self._compute_chunk(c).items()}

    def divide(self, ranks: ProcessGroup) -> None:
        """Read only this rank's share of each chunk's stripes from now on.

        Args:
            ranks: the processes among which the stripes are divided.

        Raises:
            ValueError: the number of ranks does not divide `STRIPES`.
        """
        if STRIPES % ranks.count:
            raise ValueError(f"`ranks.count` (={ranks.count}) must divide the {STRIPES} stripes")
        if ranks.several:
            share = STRIPES // ranks.count
            self.stripes = slice(ranks.index * share, (ranks.index + 1) * share)
            self._latest = (-1, {})

    def share_computation(self, ranks: ProcessGroup) -> None:
        """Share the computation of each chunk among ranks; every rank gets the whole chunk.

        All ranks must request the same chunks in the same order. Cheap sources do not share: each
        rank computes every chunk itself.
        """
        if ranks.several:
            self._compute_ranks = ranks.channel()
            self._latest = (-1, {})  # the ranks may hold different chunks

    def num_batches(self, batch_size: int) -> int | None:
        """Return the number of batches, or None if the stream is endless."""
        return None

    def rows(self, c: int) -> int:
        """Return the number of activations per stripe of chunk ``c``."""
        return self.config.chunk_tokens // STRIPES

    def position(self, step: int, batch_size: int) -> Position:
        """Return the position where batch ``step`` (0-based) begins."""
        chunk, batch = divmod(step, self.config.chunk_tokens // batch_size)
        return Position(chunk, batch * (batch_size // STRIPES))

    def steps_before(self, c: int, batch_size: int) -> int:
        """Return the number of batches before the first batch of chunk ``c``."""
        return c * (self.config.chunk_tokens // batch_size)

    def chunk(self, c: int) -> dict[Hookpoint, Float[Tensor, "stripes rows d_in"]]:
        """Return chunk ``c``, dealt into stripes and permuted, in the source's dtype.

        After `divide`, returns only this rank's stripes. The latest chunk stays in memory, because
        most chunks are requested many times; it is freed before the next one is computed, except
        under `prefetching`.
        """
        if self._latest[0] != c:
            self._latest = (-1, {})
            compute = self._compute_own_stripes if self._prefetch is None else self._prefetch.take
            self._latest = (c, compute(c))
        if self._prefetch is not None and self._looked_after != c:
            self._looked_after = c
            after = self._after(c)
            if after is not None:
                self._prefetch.start(after)
        return self._latest[1]

    @contextmanager
    def prefetching(
        self, stop: Position, batch_size: int, wanted: bool | None = None
    ) -> Iterator[None]:
        """Compute the next chunk in a thread while the current one is used.

        Results do not change, but one more chunk is in memory.

        Args:
            stop: end of the last batch that will be read.
            batch_size: the smallest batch size in use; chunks with fewer activations are skipped.
            wanted: whether to prefetch; None: if it saves time (`prefetch_pays`).
        """
        if not (prefetch_pays(self.device) if wanted is None else wanted):
            yield
            return
        self._prefetch = Prefetch(self._compute_own_stripes, self.device)
        self._end, self._looked_after = (stop, batch_size), -1
        try:
            yield
        finally:
            self._prefetch.close()
            self._prefetch = None

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches from step ``start`` on, each with a [B, D] for every hookpoint."""
        part = batch_size // STRIPES
        step, end = start, self.num_batches(batch_size)
        while end is None or step < end:
            at = self.position(step, batch_size)
            rows = slice(at.row, at.row + part)
            chunk = self.chunk(at.chunk)
            yield {h: x[:, rows].flatten(0, 1) for h, x in chunk.items()}
            del chunk
            step += 1

    def _after(self, c: int) -> int | None:
        """Return the chunk that will be requested after chunk ``c``, or None."""
        stop, batch_size = self._end
        after = c + 1
        while Position(after, 0) < stop:
            if self.rows(after) >= batch_size // STRIPES:
                return after
            after += 1
        return None

    def _check_wanted(self) -> None:
        """Stop the prefetching thread if its chunk is no longer wanted.

        Slow streams call it between two parts of a chunk.
        """
        if self._prefetch is not None:
            self._prefetch.check()

    def _permutation(self, c: int, rows: int) -> Tensor:
        """Return the row order [STRIPES·rows]; each stripe is permuted within itself."""
        parts = []
        for stripe in range(STRIPES):
            seed = np.random.SeedSequence([self.config.order_seed, c, stripe])
            order = np.random.Generator(np.random.PCG64(seed)).permutation(rows)
            parts.append(stripe * rows + order)
        return torch.from_numpy(np.concatenate(parts))


class EpochStream(ChunkStream):
    """The chunks of a finite source: one epoch, or endless ones.

    The last chunk of an epoch may be shorter. Activations that fill no whole batch are left out.

    Args:
        repeat: whether to read the source again after an epoch.
    """

    def __init__(
        self,
        config: DatasetConfig,
        repeat: bool,
        hookpoints: Sequence[Hookpoint],
        device: torch.device,
    ) -> None:
        super().__init__(config, hookpoints, device)
        self.repeat = repeat

    @property
    @abstractmethod
    def num_activations(self) -> int:
        """Number of activations per epoch, or a lower bound that holds for every epoch."""

    def num_batches(self, batch_size: int) -> int | None:
        """Return the number of batches of the epoch, or None if epochs are repeated."""
        return None if self.repeat else self._batches_per_epoch(batch_size)

    def position(self, step: int, batch_size: int) -> Position:
        """Return the position where batch ``step`` (0-based) begins."""
        epoch, step = divmod(step, self._batches_per_epoch(batch_size))
        within = super().position(step, batch_size)
        return Position(epoch * self._chunks_per_epoch + within.chunk, within.row)

    def rows(self, c: int) -> int:
        """Return the number of activations per stripe of ``c``; the last chunk may have fewer."""
        return self.extent(c)[2]

    def steps_before(self, c: int, batch_size: int) -> int:
        """Return the number of batches before the first batch of chunk ``c``."""
        epoch, within = divmod(c, self._chunks_per_epoch)
        return epoch * self._batches_per_epoch(batch_size) + super().steps_before(
            within, batch_size
        )

    def extent(self, c: int) -> tuple[int, int, int]:
        """Return the epoch of chunk ``c``, its first activation there, and its rows per stripe."""
        epoch, within = divmod(c, self._chunks_per_epoch)
        first = within * self.config.chunk_tokens
        length = min(self.config.chunk_tokens, self.num_activations - first)
        return epoch, first, length // STRIPES

    @property
    def _chunks_per_epoch(self) -> int:
        return -(-self.num_activations // self.config.chunk_tokens)

    def _batches_per_epoch(self, batch_size: int) -> int:
        return batches_available(self.num_activations, self.config, batch_size)


def deal_stripes(x: Float[Tensor, "rows d_in"], order: Tensor) -> Float[Tensor, "stripes r d_in"]:
    """Reorder activations from source order to chunk order, split into stripes."""
    return x[order.to(x.device)].view(STRIPES, len(order) // STRIPES, -1)


def generator(*key: int) -> torch.Generator:
    """Return a CPU generator seeded by ``key`` (non-negative integers)."""
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


class Abandoned(Exception):
    """Exception that ends the computation of a chunk that is no longer wanted."""


class Prefetch:
    """A thread that computes chunks, at most one ahead of the caller.

    A chunk is a pure function of its number, so any thread with the same number of torch threads
    (which torch sets per calling thread) computes the same chunk. On a GPU the thread uses its own
    CUDA stream, concurrent with that of the training step.

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
            # An error of a chunk that is no longer needed is ignored.
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


def prefetch_pays(device: torch.device) -> bool:
    """Return True if prefetching saves time: on a GPU, or if torch leaves half of the CPUs idle.

    Measured with one thread on two cores: benchmarks/README.md.
    """
    if device.type != "cpu":
        return True
    return 2 * torch.get_num_threads() <= cpus()
