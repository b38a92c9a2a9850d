"""The stream of activations as a data set for Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.stream import STRIPES, ChunkStream, Position
from reseed.ranks import ALONE, Ranks

LONGEST_STEPS = 64
"""Most batches of the smallest size in a block; it always holds one batch of every size."""
LONGEST_BYTES = 32 * 2**20
"""Most bytes of activations in a block, with the same exception."""
TURN_S = 0.5
"""Seconds that the group should take for a block: long enough that the work between blocks
(checkpoints, progress) costs nothing, short enough that this work is not delayed."""


class Block(NamedTuple):
    """The rows ``start`` to ``stop`` (exclusive) of every stripe of a chunk."""

    chunk: int
    start: int
    stop: int
    activations: dict[Hookpoint, Float[Tensor, "stripes rows d_in"]]


class StreamDataset(IterableDataset[Block]):
    """A stream from one position to another, in blocks that hold whole batches of every size.

    A block is a pure function of its position, so resuming means starting at another position. Each
    run of a group makes all its steps of a block before the next run does: its weights and moments,
    which are far larger than its batches, then enter the cache once per block, not once per step.
    The length of blocks changes no result.

    Args:
        batch_sizes: of the runs.
        start: where the first batch begins that any run lacks.
        stop: where the last batch ends that any run needs.
        ranks: the processes that make each step together and so take the same blocks.
    """

    def __init__(
        self,
        stream: ChunkStream,
        batch_sizes: Sequence[int],
        start: Position,
        stop: Position,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.stream, self.start, self.stop, self.ranks = stream, start, stop, ranks
        parts = [size // STRIPES for size in batch_sizes]
        self.unit, self.smallest = math.lcm(*parts), min(parts)
        self._most = max(1, LONGEST_STEPS * self.smallest // self.unit)
        self._units = 1

    def __iter__(self) -> Iterator[Block]:
        # Round down to the start of a block; runs that are further ahead wait.
        chunk, row = self.start.chunk, self.start.row // self.unit * self.unit
        while Position(chunk, row) < self.stop:
            yield from self._blocks(chunk, row)
            chunk, row = chunk + 1, 0

    def _blocks(self, chunk: int, row: int) -> Iterator[Block]:
        rows = self.stream.rows(chunk)
        if rows - row < self.smallest:  # the rest is too short for any run's batch
            return
        dealt = self.stream.chunk(chunk)
        row_bytes = sum(len(x) * x.shape[2] * x.element_size() for x in dealt.values())
        most = max(1, min(self._most, LONGEST_BYTES // (row_bytes * self.unit)))
        while row < rows and Position(chunk, row) < self.stop:
            end = min(row + min(self._units, most) * self.unit, rows)
            started = time.perf_counter()
            yield Block(chunk, row, end, {hook: x[:, row:end] for hook, x in dealt.items()})
            self._pace(time.perf_counter() - started)
            row = end

    def _pace(self, seconds: float) -> None:
        """Choose the length of the next block by the time that the last one took."""
        if self.ranks.several:
            seconds = float(self.ranks.largest_(torch.tensor(seconds)))
        if seconds < TURN_S / 2:
            self._units = min(2 * self._units, self._most)
        elif seconds > TURN_S:
            self._units = max(1, self._units // 2)


class ActivationData(L.LightningDataModule):
    """The data module that feeds every SAE of a group from one stream."""

    def __init__(self, dataset: StreamDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self) -> DataLoader:
        # The language model is in this process; data-loader workers would each need a copy.
        return DataLoader(self.dataset, batch_size=None, num_workers=0)
