"""Blocks of batches: together the batches of the stream, ended where something is to be done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from reseed.activations.hookpoint import Hookpoint
from reseed.train.data import BLOCK_BYTES, StreamDataset

HOOK = Hookpoint("resid_post", 0)


class Counting:
    """A stream whose batch s holds the number s, of a given size."""

    def __init__(self, columns: int = 1, end: int = 10**9) -> None:
        self.columns, self.end = columns, end

    def batches(self, batch_size: int, start: int) -> Iterator[dict[Hookpoint, Tensor]]:
        for s in range(start, self.end):
            yield {HOOK: torch.tensor([[float(s)]]).expand(batch_size, self.columns)}


def blocks(start: int, stop: int, **options: object) -> list[tuple[int, list[int]]]:
    data = StreamDataset(Counting(), 8, start, stop, **options)  # type: ignore[arg-type]
    return [(first, [int(x[HOOK][0, 0]) for x in block]) for first, block in data]


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (3, 40), (7, 8), (5, 5)])
@pytest.mark.parametrize("every", [1, 10, 50])
def test_blocks_are_the_batches_in_order(start: int, stop: int, every: int) -> None:
    found = blocks(start, stop, every=every)
    assert [s for _, block in found for s in block] == list(range(start, stop))
    assert all(block[0] == first for first, block in found)


def test_blocks_end_at_borders_and_multiples() -> None:
    ends = {first + len(block) for first, block in blocks(0, 60, borders=[13, 37], every=25)}
    assert {13, 25, 37, 50, 60} <= ends
    assert max(len(block) for _, block in blocks(0, 60, borders=[13, 37], every=25)) <= 16


def test_a_group_of_one_takes_one_batch_at_a_time() -> None:
    assert {len(block) for _, block in blocks(0, 20, every=50, longest=1)} == {1}


def test_large_batches_come_alone() -> None:
    columns = BLOCK_BYTES // (4 * 8) + 1  # a batch of 8 float32 rows is above the bound
    data = StreamDataset(Counting(columns), 8, 0, 5, every=50)  # type: ignore[arg-type]
    assert [len(block) for _, block in data] == [1] * 5


def test_a_stream_that_ends_early_ends_the_blocks() -> None:
    data = StreamDataset(Counting(end=5), 8, 0, 9, every=50)  # type: ignore[arg-type]
    assert [len(block) for _, block in data] == [1, 4]
