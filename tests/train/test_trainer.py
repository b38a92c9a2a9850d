"""Blocks: together they make the stream from one position to another, in whole batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reseed.activations.dataset import STRIPES, DatasetConfig, Position
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.stream import ChunkStream
from reseed.train import trainer
from reseed.train.trainer import MAX_BLOCK_BYTES, MAX_BLOCK_STEPS, Block, StreamDataset

HOOK = Hookpoint("resid_post", 0)
ROWS = 32
"""Rows in each stripe of a chunk."""


class Counting(ChunkStream):
    """A stream whose chunk c holds c; every third one is shorter, as at the end of an epoch."""

    def __init__(self, columns: int = 1) -> None:
        super().__init__(DatasetConfig(chunk_tokens=ROWS * STRIPES), [HOOK], torch.device("cpu"))
        self.columns, self.asked = columns, list[int]()

    def rows(self, c: int) -> int:
        return 13 if c % 3 == 2 else ROWS

    def _compute_chunk(self, c: int) -> dict[Hookpoint, Tensor]:
        self.asked.append(c)
        x = torch.full((STRIPES, self.rows(c), 1), float(c))
        return {HOOK: x.expand(-1, -1, self.columns)}


def blocks(sizes: list[int], start: Position, stop: Position) -> list[Block]:
    return list(StreamDataset(Counting(), sizes, start, stop))


@pytest.mark.parametrize("sizes", [[8], [16, 64], [8, 32, 256]])
@pytest.mark.parametrize("stop", [Position(0, 20), Position(2, 13), Position(7, 1)])
def test_blocks_are_the_chunks_in_order(sizes: list[int], stop: Position) -> None:
    rows = [
        (block.chunk, row)
        for block in blocks(sizes, Position(0, 0), stop)
        for row in range(block.start, block.stop)
    ]
    stream = Counting()
    everything = [(c, r) for c in range(stop.chunk + 1) for r in range(stream.rows(c))]
    assert rows == everything[: len(rows)]
    end = rows[-1]
    assert end >= (stop.chunk, stop.row - 1)
    # No further than the unit that contains the last row.
    assert end[1] - stop.row < max(sizes) // STRIPES * MAX_BLOCK_STEPS


@pytest.mark.parametrize("sizes", [[8], [16, 64], [32, 256]])
def test_block_edges_are_multiples_of_every_batch_size(sizes: list[int]) -> None:
    unit = math.lcm(*sizes) // STRIPES
    stream = Counting()
    for block in StreamDataset(stream, sizes, Position(1, 5), Position(4, 3)):
        assert block.start % unit == 0
        assert block.stop % unit == 0 or block.stop == stream.rows(block.chunk)
        x = block.activations[HOOK]
        assert x.shape[:2] == (STRIPES, block.stop - block.start)
        assert (x == block.chunk).all()
    assert stream.asked == [1, 2, 3, 4], "each chunk once, and none beyond the end"


def test_the_first_block_starts_at_a_common_multiple_of_the_batches() -> None:
    first = blocks([8, 64], Position(1, 13), Position(2, 0))[0]
    assert (first.chunk, first.start) == (1, 8)


def test_a_remainder_too_short_for_a_batch_is_skipped() -> None:
    # A run whose position is in the remainder of a chunk continues with the next chunk.
    assert blocks([256], Position(0, ROWS), Position(1, ROWS))[0].chunk == 1


def test_blocks_grow_while_they_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [b.stop - b.start for b in blocks([8], Position(0, 0), Position(0, ROWS))]
    assert lengths == [1, 2, 4, 8, 16, 1], "each twice the last, up to the end of the chunk"
    monkeypatch.setattr(trainer, "BLOCK_SECONDS", 0.0)
    slow = [b.stop - b.start for b in blocks([8], Position(0, 0), Position(0, ROWS))]
    assert slow == [1] * ROWS


def test_blocks_are_bounded_in_batches_and_bytes() -> None:
    class Long(Counting):
        def rows(self, c: int) -> int:
            return 1024

    def longest(columns: int) -> int:
        found = StreamDataset(Long(columns), [8], Position(0, 0), Position(0, 1024))
        return max(block.stop - block.start for block in found)

    assert longest(1) == MAX_BLOCK_STEPS
    assert longest(MAX_BLOCK_BYTES // (STRIPES * 4 * 2)) == 2
