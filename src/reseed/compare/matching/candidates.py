"""One pass over all pairs in low precision: the best candidates of every row and every column.

The products are computed tile by tile in bfloat16 and read once, while they are in the cache. An
entry above the K-th best so far of its row or column is added to the list of that row or column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.compare.matching.rows import DistinctRows
from reseed.system.compiling import in_ranges, njit

CANDIDATES = 48
"""Number of candidates that are listed for every row and every column. A smaller value leaves more
pairs open, a larger one makes the graph larger."""
_TILE = (2048, 4096)
_CHUNK = 64  # number of entries of a tile that are compared together
_COLUMNS_AT_ONCE = 256
_NONE = np.int16(-32768)
ROUNDING = 2.0**-8
"""Maximum relative error of storing a number in bfloat16."""
_FLUSHED = 1e-30  # upper bound on products that are too small for float32


@dataclass(frozen=True, eq=False)
class CandidateLists:
    """Best partners of every row (or column).

    Attributes:
        best: indices of the listed partners, −1 where there are fewer than K.
        bound: upper bound on the cosines of unlisted partners; −inf where all are listed.
    """

    best: Int[np.ndarray, "n K"]
    bound: Float[np.ndarray, " n"]

    def pairs(self) -> tuple[Int[np.ndarray, " listed"], Int[np.ndarray, " listed"]]:
        """Return the listed pairs as (rows, partners)."""
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
) -> tuple[CandidateLists, CandidateLists]:
    """Find the best ``count`` partners of every row of ``a`` in ``b``, and of ``b`` in ``a``.

    Args:
        progress: called with the finished fraction of the pass, 0 to 1.
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
    """Return the products of all rows of both sides, or their absolute values."""
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
    """Error bounds: S_ij ≤ S̃_ij + `of_row`_i and S_ij ≤ S̃_ij + `of_column`_j.

    S̃_ij is the product of rounded rows, accumulated in float32 in any order. The error of storing
    it in bfloat16 is not included; see `ROUNDING`.
    """

    of_row: Float[np.ndarray, " n"]
    of_column: Float[np.ndarray, " m"]


def product_error(a: DistinctRows, b: DistinctRows) -> ProductError:
    """Return rigorous error bounds of the products.

    ‖a − â‖‖b‖ + ‖â‖‖b − b̂‖ (Cauchy and Schwarz), with γ = (D+2)u/(1 − (D+2)u) for accumulation.
    """
    steps = (a.d_in + 2) * 2.0**-24
    gamma = steps / (1 - steps)
    left, right = a.rounded.errors, b.rounded.errors
    worst_left, worst_right = np.max(left, keepdims=True), np.max(right, keepdims=True)

    def total(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return one + (1 + one) * other + gamma * (1 + one) * (1 + other) + _FLUSHED

    return ProductError(total(left, worst_right), total(worst_left, right))


class _Growing:
    """Lists that grow to twice the required length; a full list is cut to its better half."""

    def __init__(self, rows: int, count: int) -> None:
        self.count = count
        self.index = np.empty((rows, 2 * count), dtype=np.int32)
        self.value = np.empty((rows, 2 * count), dtype=np.int16)
        self.length = np.zeros(rows, dtype=np.int64)
        self.threshold = np.full(rows, _NONE)

    def push_rows(self, tile: np.ndarray, i: int, j: int, start: int, stop: int) -> None:
        """Add candidates of the rows ``start`` to ``stop`` of a tile that begins at (i, j)."""
        index, value, length, threshold = self._from(i)
        _push_rows(tile, index, value, length, threshold, j, start, stop)

    def push_columns(self, tile: np.ndarray, i: int, j: int, start: int, stop: int) -> None:
        """Add candidates of the columns ``start`` to ``stop`` of a tile that begins at (i, j)."""
        index, value, length, threshold = self._from(j)
        _push_columns(tile, index, value, length, threshold, i, start, stop)

    def _from(self, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.index[first:], self.value[first:], self.length[first:], self.threshold[first:]

    def lists(self, others: int, error: Float[np.ndarray, " n"]) -> CandidateLists:
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
            return CandidateLists(best, np.full(len(best), -np.inf))
        bound = _decoded(self.threshold)
        return CandidateLists(best, bound + ROUNDING * np.abs(bound) + error)


def _decoded(bits: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the bfloat16 numbers that `_ordered` mapped to these integers."""
    plain = bits ^ ((bits >> 15) & 0x7FFF)
    return torch.from_numpy(plain.astype(np.int16)).view(torch.bfloat16).double().numpy()


@njit(nogil=True, cache=True, inline="always")
def _ordered(bits):  # pragma: no cover
    """Map the bits of a bfloat16 number to an integer such that the order is the same."""
    return np.int16(bits ^ ((bits >> 15) & 0x7FFF))


@njit(nogil=True, cache=True)
def _push_rows(tile, index, value, length, threshold, first, start, stop):  # pragma: no cover
    """Add candidates of the rows ``start`` … ``stop``; the tile's columns begin at ``first``."""
    width, enough = tile.shape[1], index.shape[1] // 2
    for r in range(start, stop):
        row = tile[r]
        for c0 in range(0, width, _CHUNK):
            chunk = row[c0 : min(c0 + _CHUNK, width)]
            limit = threshold[r]
            # For a limit ≥ 0, raw bits compare like the numbers: non-negative numbers are ordered
            # and negative ones are smaller. So the loop compares whole registers. A limit < 0
            # needs `_ordered`.
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
    """Add candidates of the columns ``start`` … ``stop``; the tile's rows begin at ``first``."""
    enough = index.shape[1] // 2
    # Blocks of columns keep their lists in the cache while the tile is read along its rows.
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
    """Keep the better half of a list; its worst entry is the new threshold (quickselect)."""
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
