"""The stream of activations as Lightning reads it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from reseed.activations.stream import Batch, ChunkStream

BLOCK_STEPS = 16
"""At most so many batches are handed out together."""
BLOCK_BYTES = 32 * 2**20
"""And at most so many bytes of activations, but one batch always."""

Block = tuple[int, list[Batch]]
"""The number of the first batch, and consecutive batches."""


class StreamDataset(IterableDataset[Block]):
    """Batches ``start`` to ``stop`` (exclusive) of a stream, in blocks.

    Nothing is remembered between batches: batch s is a pure function of s, so that to go on
    after an interruption is to start at another number. A member of a group makes all the steps of
    a block before the next member's turn: its weights and moments, which are far larger than its
    batches, then come to the cache once in a block and not once in a step.

    Args:
        borders: numbers at which a block ends, as something is to be done there.
        every: ditto for every multiple of this number.
        longest: batches in a block at most.
    """

    def __init__(
        self,
        stream: ChunkStream,
        batch_size: int,
        start: int,
        stop: int,
        *,
        borders: Sequence[int] = (),
        every: int = 1,
        longest: int = BLOCK_STEPS,
    ) -> None:
        super().__init__()
        self.stream, self.batch_size = stream, batch_size
        self.start, self.stop = start, stop
        self.borders = sorted({*borders, stop})
        self.every, self.longest = every, longest

    def __iter__(self) -> Iterator[Block]:
        batches = self.stream.batches(self.batch_size, self.start)
        first = self.start
        longest = 1  # until a batch has shown its size
        while first < self.stop:
            block = list(islice(batches, self._end(first, longest) - first))
            if not block:
                return
            yield first, block
            first += len(block)
            size = sum(x.numel() * x.element_size() for x in block[0].values())
            longest = max(1, min(self.longest, BLOCK_BYTES // size))

    def _end(self, first: int, longest: int) -> int:
        """Where the block that begins at ``first`` ends."""
        border = self.borders[bisect_right(self.borders, first)]
        multiple = (first // self.every + 1) * self.every
        return min(first + longest, border, multiple)


class ActivationData(L.LightningDataModule):
    """Feeds every SAE of a group from one stream."""

    def __init__(self, dataset: StreamDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self) -> DataLoader:
        # The model lives in this process: workers would need a copy each.
        return DataLoader(self.dataset, batch_size=None, num_workers=0)
