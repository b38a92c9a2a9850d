"""The stream of activations as Lightning reads it."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from reseed.activations.stream import Batch, ChunkStream


class StreamDataset(IterableDataset[tuple[int, Batch]]):
    """Batches ``start`` to ``stop`` (exclusive) of a stream, each with its number.

    Nothing is remembered between batches: batch s is a pure function of s, so that to go on
    after an interruption is to start at another number.
    """

    def __init__(self, stream: ChunkStream, batch_size: int, start: int, stop: int) -> None:
        super().__init__()
        self.stream, self.batch_size = stream, batch_size
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        batches = self.stream.batches(self.batch_size, self.start)
        # zip asks its first argument first: the range ends before a chunk too many is computed.
        yield from zip(range(self.start, self.stop), batches, strict=False)

    def __len__(self) -> int:
        return self.stop - self.start


class ActivationData(L.LightningDataModule):
    """Feeds every SAE of a group from one stream."""

    def __init__(self, stream: ChunkStream, batch_size: int, start: int, stop: int) -> None:
        super().__init__()
        self.dataset = StreamDataset(stream, batch_size, start, stop)

    def train_dataloader(self) -> DataLoader:
        # The model lives in this process: workers would need a copy each.
        return DataLoader(self.dataset, batch_size=None, num_workers=0)
