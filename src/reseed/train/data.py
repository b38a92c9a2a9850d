"""The stream of activations as Lightning reads it."""

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
"""A block holds at most so many batches of the smallest size, but one of every size always."""
LONGEST_BYTES = 32 * 2**20
"""And at most so many bytes of activations, with the same exception."""
TURN_S = 0.5
"""A block is made as long as the group takes about so many seconds for: what happens between blocks
(checkpoints, progress) then costs nothing, and is not waited for either."""


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` (exclusive) of every stripe of a chunk."""

    chunk: int
    start: int
    stop: int
    activations: dict[Hookpoint, Float[Tensor, "stripes rows d_in"]]


class StreamDataset(IterableDataset[Block]):
    """A stream from one position to another, in blocks that hold whole batches of every size.

    Nothing is remembered between blocks: they are pure functions of their positions, so that to go
    on after an interruption is to start at another one. A member of a group makes all its steps of
    a block before the next member's turn: its weights and moments, which are far larger than its
    batches, then come to the cache once in a block and not once in a step. How long blocks are
    moves no number.

    Args:
        batch_sizes: those of the members.
        start: where the first batch begins that anybody lacks.
        stop: where the last batch that anybody wants ends.
        ranks: those that make each step together, and so take the same blocks.
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
        # Down to where a block of this company begins: members that are further on wait.
        chunk, row = self.start.chunk, self.start.row // self.unit * self.unit
        while Position(chunk, row) < self.stop:
            yield from self._blocks(chunk, row)
            chunk, row = chunk + 1, 0

    def _blocks(self, chunk: int, row: int) -> Iterator[Block]:
        rows = self.stream.rows(chunk)
        if rows - row < self.smallest:  # of what is left nobody can make a batch
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
        """Choose the length of the next block by what was done with the last one."""
        if self.ranks.several:
            seconds = float(self.ranks.largest_(torch.tensor(seconds)))
        if seconds < TURN_S / 2:
            self._units = min(2 * self._units, self._most)
        elif seconds > TURN_S:
            self._units = max(1, self._units // 2)


class ActivationData(L.LightningDataModule):
    """Feeds every SAE of a group from one stream."""

    def __init__(self, dataset: StreamDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self) -> DataLoader:
        # The model lives in this process: workers would need a copy each.
        return DataLoader(self.dataset, batch_size=None, num_workers=0)
