"""One pass over all pairs in low precision: the best candidates of every row and every column.

The products are made tile by tile in bfloat16 and looked at once, while they are in the cache:
what beats the K-th best so far of its row or of its column is put on that one's list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.compare.assignment.rows import DistinctRows
from reseed.compare.assignment.threads import in_ranges
from reseed.compiling import njit

CANDIDATES = 48
"""Candidates listed for every row and every column. Fewer leave more pairs open, more make the
graph larger; from 32 to 64 the time hardly changes."""
_TILE = (2048, 4096)
_CHUNK = 64  # entries of a tile that are looked at together
_COLUMNS_AT_ONCE = 256
_NONE = np.int16(-32768)
ROUNDING = 2.0**-8
"""What storing a number in bfloat16 takes from it or adds, in proportion, at most."""
_FLUSHED = 1e-30  # products that are too small for float32


@dataclass(frozen=True, eq=False)
class Lists:
    """For every row (or column) its best partners.

    Attributes:
        best: indices of the listed partners, −1 where there are fewer than K.
        bound: no partner that is not listed has a cosine above it; −inf where all are listed.
    """

    best: Int[np.ndarray, "n K"]
    bound: Float[np.ndarray, " n"]

    def pairs(self) -> tuple[Int[np.ndarray, " listed"], Int[np.ndarray, " listed"]]:
        """Each row as often as it has partners, and these."""
        listed = self.best >= 0
        return np.nonzero(listed)[0], self.best[listed]


def candidates(
    a: DistinctRows,
    b: DistinctRows,
    *,
    absolute: bool,
    count: int = CANDIDATES,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[Lists, Lists]:
    """The best ``count`` partners of every row of ``a`` in ``b``, and the other way round.

    Args:
        progress: is told which part of the pass is done, 0 to 1.
    """
    rows, columns = _Growing(len(a), count), _Growing(len(b), count)
    place = torch.device(device)
    left, right = a.rounded.values.to(place), b.rounded.values.to(place)
    height, width = _TILE
    with torch.inference_mode():
        for i in range(0, len(a), height):
            for j in range(0, len(b), width):
                tile = products(left[i : i + height], right[j : j + width], absolute)
                _list(tile, rows, columns, i, j)
            progress(min(1.0, (i + height) / len(a)))
    error = product_error(a, b)
    return rows.lists(len(b), error.of_row), columns.lists(len(a), error.of_column)


def products(left: Tensor, right: Tensor, absolute: bool) -> Tensor:
    """Of every row of one side with every row of the other, or their absolute values."""
    product = left @ right.T
    return product.abs_() if absolute else product


def _list(tile: Tensor, rows: _Growing, columns: _Growing, i: int, j: int) -> None:
    if tile.device.type != "cpu":
        tile = tile.cpu()
    bits = tile.view(torch.int16).numpy()
    in_ranges(lambda start, stop: rows.push_rows(bits, i, j, start, stop), bits.shape[0])
    in_ranges(lambda start, stop: columns.push_columns(bits, i, j, start, stop), bits.shape[1])


@dataclass(frozen=True)
class ProductError:
    """S_ij ≤ S̃_ij + `of_row`_i and S_ij ≤ S̃_ij + `of_column`_j for a stored product S̃_ij.

    S̃_ij is the product of rounded rows, accumulated in float32 in any order. What storing it in
    bfloat16 changes is not in it; see `ROUNDING`.
    """

    of_row: Float[np.ndarray, " n"]
    of_column: Float[np.ndarray, " m"]


def product_error(a: DistinctRows, b: DistinctRows) -> ProductError:
    """Rigorous: ‖a − â‖‖b‖ + ‖â‖‖b − b̂‖ by Cauchy and Schwarz, and γ = (D+2)u/(1 − (D+2)u)."""
    steps = (a.d_in + 2) * 2.0**-24
    gamma = steps / (1 - steps)
    left, right = a.rounded.errors, b.rounded.errors
    worst_left, worst_right = np.max(left, keepdims=True), np.max(right, keepdims=True)

    def total(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return one + (1 + one) * other + gamma * (1 + one) * (1 + other) + _FLUSHED

    return ProductError(total(left, worst_right), total(worst_left, right))


class _Growing:
    """Lists while they grow: twice as long as wanted, cut to the best whenever they are full."""

    def __init__(self, rows: int, count: int) -> None:
        self.count = count
        self.index = np.empty((rows, 2 * count), dtype=np.int32)
        self.value = np.empty((rows, 2 * count), dtype=np.int16)
        self.length = np.zeros(rows, dtype=np.int64)
        self.threshold = np.full(rows, _NONE)

    def push_rows(self, tile: np.ndarray, i: int, j: int, start: int, stop: int) -> None:
        """Candidates of the rows ``start`` to ``stop`` of a tile that begins at (i, j)."""
        index, value, length, threshold = self._from(i)
        _push_rows(tile, index, value, length, threshold, j, start, stop)

    def push_columns(self, tile: np.ndarray, i: int, j: int, start: int, stop: int) -> None:
        """Candidates of its columns."""
        index, value, length, threshold = self._from(j)
        _push_columns(tile, index, value, length, threshold, i, start, stop)

    def _from(self, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.index[first:], self.value[first:], self.length[first:], self.threshold[first:]

    def lists(self, others: int, error: Float[np.ndarray, " n"]) -> Lists:
        in_ranges(
            lambda start, stop: _cut_all(
                self.index, self.value, self.length, self.threshold, start, stop
            ),
            len(self.length),
        )
        best = np.where(
            np.arange(self.count) < self.length[:, None], self.index[:, : self.count], -1
        )
        if others <= self.count:
            return Lists(best, np.full(len(best), -np.inf))
        bound = _decoded(self.threshold)
        return Lists(best, bound + ROUNDING * np.abs(bound) + error)


def _decoded(bits: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The numbers of `_ordered` bits."""
    plain = bits ^ ((bits >> 15) & 0x7FFF)
    return torch.from_numpy(plain.astype(np.int16)).view(torch.bfloat16).double().numpy()


@njit(nogil=True, cache=True, inline="always")
def _ordered(bits):  # pragma: no cover
    """Bits of a bfloat16 number as an integer of the same order."""
    return np.int16(bits ^ ((bits >> 15) & 0x7FFF))


@njit(nogil=True, cache=True)
def _push_rows(tile, index, value, length, threshold, first, start, stop):  # pragma: no cover
    """Candidates of the rows ``start`` … ``stop`` of a tile; its columns begin at ``first``."""
    width, enough = tile.shape[1], index.shape[1] // 2
    for r in range(start, stop):
        row = tile[r]
        for c0 in range(0, width, _CHUNK):
            chunk = row[c0 : min(c0 + _CHUNK, width)]
            limit = threshold[r]
            # Bits of numbers from 0 up have their order, and all others are below them: the loop
            # is one comparison of whole registers. It will not do for a limit below 0.
            found = limit < 0
            if not found:
                for c in range(len(chunk)):
                    found |= chunk[c] > limit
            if found:
                for c in range(len(chunk)):
                    if limit < 0 or chunk[c] > limit:
                        one = _ordered(chunk[c])
                        if one > threshold[r] or length[r] < enough:
                            _push(index, value, length, threshold, r, first + c0 + c, one)


@njit(nogil=True, cache=True)
def _push_columns(tile, index, value, length, threshold, first, start, stop):  # pragma: no cover
    """Candidates of the columns ``start`` … ``stop`` of a tile; its rows begin at ``first``."""
    enough = index.shape[1] // 2
    # The lists of some columns stay in the cache while the tile is read along its rows.
    for b0 in range(start, stop, _COLUMNS_AT_ONCE):
        b1 = min(b0 + _COLUMNS_AT_ONCE, stop)
        limits = threshold[b0:b1].copy()
        slow = limits.min() < 0
        for r in range(tile.shape[0]):
            for c0 in range(b0, b1, _CHUNK):
                chunk = tile[r, c0 : min(c0 + _CHUNK, b1)]
                own = limits[c0 - b0 : c0 - b0 + len(chunk)]
                found = slow
                if not found:
                    for c in range(len(chunk)):
                        found |= chunk[c] > own[c]
                if found:
                    for c in range(len(chunk)):
                        if slow or chunk[c] > own[c]:
                            one = _ordered(chunk[c])
                            if one > own[c] or length[c0 + c] < enough:
                                _push(index, value, length, threshold, c0 + c, first + r, one)
                                own[c] = threshold[c0 + c]
            if slow:
                slow = limits.min() < 0


@njit(nogil=True, cache=True)
def _push(index, value, length, threshold, i, partner, one):  # pragma: no cover
    place = length[i]
    index[i, place] = partner
    value[i, place] = one
    length[i] = place + 1
    if place + 1 == index.shape[1]:
        _cut(index, value, length, threshold, i)


@njit(nogil=True, cache=True)
def _cut(index, value, length, threshold, i):  # pragma: no cover
    """Keep the better half of a list; the worst of it is the new threshold (quickselect)."""
    keep = index.shape[1] // 2
    low, high = 0, length[i] - 1
    while low < high:
        pivot = value[i, (low + high) // 2]
        left, right = low, high
        while left <= right:
            while value[i, left] > pivot:
                left += 1
            while value[i, right] < pivot:
                right -= 1
            if left <= right:
                value[i, left], value[i, right] = value[i, right], value[i, left]
                index[i, left], index[i, right] = index[i, right], index[i, left]
                left += 1
                right -= 1
        if keep - 1 <= right:
            high = right
        elif keep - 1 >= left:
            low = left
        else:
            break
    length[i] = keep
    threshold[i] = value[i, keep - 1]


@njit(nogil=True, cache=True)
def _cut_all(index, value, length, threshold, start, stop):  # pragma: no cover
    for i in range(start, stop):
        if length[i] > index.shape[1] // 2:
            _cut(index, value, length, threshold, i)
