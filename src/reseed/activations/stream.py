"""Chunks and batches: what is common to every stream of activations.

A stream is a pure function of what is declared: chunk c does not depend on what was asked before.
Its activations are dealt into 8 stripes, and each stripe is permuted by a generator seeded with
(order seed, c, stripe). A batch takes the same number of tokens from every stripe. There is no
buffer whose state would have to be saved: position s of training is (chunk, offset), computed
from s.

    M chunk_tokens · B batch · D d_in
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.prefetch import Prefetch, pays
from reseed.config import Config, ConfigError, setting
from reseed.ranks import ALONE, Ranks

STRIPES = 8
"""Parts into which each chunk is dealt; a batch takes the same number of tokens from each."""

Batch = dict[Hookpoint, Float[Tensor, "batch d_in"]]


@dataclass(frozen=True)
class DatasetConfig(Config, family="dataset"):
    """How activations are ordered and cut up; members say where they come from."""

    order_seed: int = setting(0, at_least=0)
    """Moves the order of the documents and of the tokens, and nothing else."""
    chunk_tokens: int = setting(65_536, at_least=STRIPES)
    """Activations that are computed, shuffled and dealt out together."""
    held_out_tokens: int = setting(65_536, at_least=1)
    """Activations on which every run is measured."""

    def validate(self) -> None:
        if self.chunk_tokens % STRIPES:
            raise ConfigError(
                f"{{key}} must be a multiple of {STRIPES}; got {self.chunk_tokens}", "chunk_tokens"
            )


@dataclass(frozen=True, order=True)
class Position:
    """Where in the stream a batch begins: a chunk, and a row of each of its stripes.

    The clock of a stream: batches of every size have one, and they compare by their order.
    """

    chunk: int
    row: int


class ChunkStream(ABC):
    """The endless or finite sequence of chunks of one source.

    This base is endless, its chunks all full; a stream with an end, or with chunks that are not
    full, overrides `num_batches`, `rows`, `position` and `steps_before`.

    Args:
        config: order and chunk size.
        hookpoints: where activations are read, all in one pass.
        device: where they are.

    Attributes:
        stripes: those that this rank reads.
    """

    def __init__(
        self, config: DatasetConfig, hookpoints: Sequence[Hookpoint], device: torch.device
    ) -> None:
        self.config = config
        self.hookpoints = tuple(dict.fromkeys(hookpoints))
        self.device = device
        self.stripes = slice(0, STRIPES)
        self._together = ALONE
        self._latest: tuple[int, dict[Hookpoint, Tensor]] = (-1, {})
        self._prefetch: Prefetch | None = None
        self._end: tuple[Position, int] = (Position(0, 0), STRIPES)
        self._looked_after = -1

    @abstractmethod
    def _dealt(self, c: int) -> dict[Hookpoint, Float[Tensor, "stripes rows d_in"]]:
        """Chunk ``c``, its activations dealt into stripes and permuted by `_permutation`."""

    def _own(self, c: int) -> dict[Hookpoint, Float[Tensor, "own rows d_in"]]:
        """Those stripes of chunk ``c`` that this rank reads. A source that can compute them alone
        overrides this."""
        if self.stripes == slice(0, STRIPES):
            return self._dealt(c)
        # A copy, so that the rest is freed.
        return {hook: x[self.stripes].clone() for hook, x in self._dealt(c).items()}

    def divide(self, ranks: Ranks) -> None:
        """From here on read an equal share of the stripes of each chunk.

        Args:
            ranks: of which each reads stripes of its own; their number divides `STRIPES`.
        """
        if STRIPES % ranks.count:
            raise ValueError(f"`ranks.count` (={ranks.count}) must divide the {STRIPES} stripes")
        if ranks.several:
            share = STRIPES // ranks.count
            self.stripes = slice(ranks.index * share, (ranks.index + 1) * share)
            self._latest = (-1, {})

    def compute_together(self, ranks: Ranks) -> None:
        """From here on share the work of making each chunk, which every rank then has whole.

        All ranks ask for the same chunks in the same order. Sources that are cheap to compute are
        computed by each.
        """
        if ranks.several:
            self._together = ranks.channel()
            self._latest = (-1, {})  # not every rank may have it

    def num_batches(self, batch_size: int) -> int | None:
        """Batches that there are, or None where they never end."""
        return None

    def rows(self, c: int) -> int:
        """Activations in each stripe of chunk ``c``."""
        return self.config.chunk_tokens // STRIPES

    def position(self, step: int, batch_size: int) -> Position:
        """Where batch ``step`` (0-based) begins."""
        chunk, batch = divmod(step, self.config.chunk_tokens // batch_size)
        return Position(chunk, batch * (batch_size // STRIPES))

    def steps_before(self, c: int, batch_size: int) -> int:
        """Batches before the first one of chunk ``c``."""
        return c * (self.config.chunk_tokens // batch_size)

    def chunk(self, c: int) -> dict[Hookpoint, Float[Tensor, "stripes rows d_in"]]:
        """Chunk ``c``, dealt into stripes and permuted, in the source's dtype on its device.

        Of the stripes those that this rank reads (`divide`): all of them, unless said otherwise.
        The latest chunk is kept, as most are asked for many times; it is freed before the next
        one is computed, unless that is done ahead (`prefetching`).
        """
        if self._latest[0] != c:
            self._latest = (-1, {})
            made = self._own(c) if self._prefetch is None else self._prefetch.take(c)
            self._latest = (c, made)
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
        """Within it a thread computes the next chunk while this one is used.

        Nothing but the time changes; one chunk more is in memory.

        Args:
            stop: where the last batch ends that is wanted.
            batch_size: the smallest that is taken: of a chunk with fewer activations there is
                nothing to take.
            wanted: None for where it pays.
        """
        if not (pays(self.device) if wanted is None else wanted):
            yield
            return
        self._prefetch = Prefetch(self._own, self.device)
        self._end, self._looked_after = (stop, batch_size), -1
        try:
            yield
        finally:
            self._prefetch.close()
            self._prefetch = None

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Batches from step ``start`` on; [B, D] for each hookpoint."""
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
        """The chunk that will be asked for after chunk ``c``; None where there is none."""
        stop, batch_size = self._end
        after = c + 1
        while Position(after, 0) < stop:
            if self.rows(after) >= batch_size // STRIPES:
                return after
            after += 1
        return None

    def _check_wanted(self) -> None:
        """For streams that take long over a chunk, between two parts of it: end the thread that
        computes ahead, where nobody waits for the chunk any more."""
        if self._prefetch is not None:
            self._prefetch.check()

    def _permutation(self, c: int, rows: int) -> Tensor:
        """Row order [STRIPES·rows]: stripe s stays the s-th part, permuted within."""
        parts = []
        for stripe in range(STRIPES):
            seed = np.random.SeedSequence([self.config.order_seed, c, stripe])
            order = np.random.Generator(np.random.PCG64(seed)).permutation(rows)
            parts.append(stripe * rows + order)
        return torch.from_numpy(np.concatenate(parts))


def dealt(x: Float[Tensor, "rows d_in"], order: Tensor) -> Float[Tensor, "stripes r d_in"]:
    """Activations in the order of their source, put into that of a chunk."""
    return x[order.to(x.device)].view(STRIPES, len(order) // STRIPES, -1)


def check_batch_size(config: DatasetConfig, batch_size: int) -> None:
    """Raise `ConfigError` where batches do not tile a chunk."""
    if batch_size % STRIPES or config.chunk_tokens % batch_size:
        raise ConfigError(
            f"{{key}} must be a multiple of {STRIPES} that divides dataset.chunk_tokens "
            f"(={config.chunk_tokens}); got {batch_size}",
            "training.batch_size",
        )


def batches_available(activations: int, config: DatasetConfig, batch_size: int) -> int:
    """Whole batches in one reading of so many activations."""
    full, rest = divmod(activations, config.chunk_tokens)
    last = (rest // STRIPES) // (batch_size // STRIPES)
    return full * (config.chunk_tokens // batch_size) + last


def generator(*key: int) -> torch.Generator:
    """A CPU generator that is a pure function of ``key`` (non-negative integers)."""
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
