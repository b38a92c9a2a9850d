"""Search for pairs outside the graph that could improve the assignment.

An unlisted pair has upper bounds on its cosine: min(r_i, c_j) from the first pass and p_i + q_j
from every later search. Where u_i + v_j is at least some bound, nothing is left to prove. All
other pairs are "open". They are computed in blocks in low precision with its error added; pairs
that could still matter are then computed one by one in float64.

Optimal prices are not unique: `centre_prices` chooses those that leave few pairs open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from reseed.compare.matching.candidates import ROUNDING, product_error, products
from reseed.compare.matching.graph import Edges, cosines
from reseed.compare.matching.rows import DistinctRows
from reseed.system.compiling import LEAST_WORK, in_ranges, njit

_ROWS, _COLUMNS = 1024, 4096
_GUARD = 1e-6  # error of float32 sums and comparisons, for prices that sum to 4 at most
EXACT = 1e-12
"""Rounding error of u_i + v_j − S_ij in float64."""


@dataclass(eq=False)
class Bounds:
    """Upper bounds on the cosines of pairs that are not listed.

    Attributes:
        row, column: S_ij ≤ min(row_i, column_j).
        sums: (p, q) with S_ij ≤ p_i + q_j.
    """

    row: Float[np.ndarray, " n"]
    column: Float[np.ndarray, " m"]
    sums: list[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]]] = field(
        default_factory=list
    )

    def add(self, p: Float[np.ndarray, " n"], q: Float[np.ndarray, " m"]) -> None:
        self.sums.append((p.copy(), q.copy()))


@dataclass(frozen=True, eq=False)
class Prices:
    """Prices u and v; a pair with a cosine of u_i + v_j − margin or less need not be computed."""

    u: Float[np.ndarray, " n"]
    v: Float[np.ndarray, " m"]
    margin: float


@dataclass(frozen=True, eq=False)
class OpenBlock:
    """Rows and columns that have open pairs with each other.

    Attributes:
        row, column: indices of these rows and columns.
        count: number of open pairs among them.
    """

    row: Int[np.ndarray, " rows"]
    column: Int[np.ndarray, " columns"]
    count: int


def open_pairs(
    bounds: Bounds, prices: Prices, rows: Int[np.ndarray, " some"] | None = None
) -> Iterator[OpenBlock]:
    """Yield blocks of all pairs (of some rows) whose every bound exceeds u_i + v_j − margin."""
    u, v = prices.u, prices.v - prices.margin
    order = np.argsort(v, kind="stable")
    sorted_v = v[order]
    reach = np.searchsorted(sorted_v, bounds.row - u)
    by_column = np.stack([(bounds.column - v)[order], *((q - v)[order] for _, q in bounds.sums)])
    by_row = np.stack([u, *(u - p for p, _ in bounds.sums)])
    rows = np.arange(len(u)) if rows is None else rows
    rows = rows[np.argsort(-reach[rows], kind="stable")]
    rows = rows[: np.count_nonzero(reach[rows])]
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        count = np.zeros(reach[some[0]], dtype=np.int64)
        own = np.zeros(len(some), dtype=np.int64)
        in_ranges(
            lambda a, b, own=own, count=count, some=some: _count_open(
                reach[some], by_row[:, some], by_column, own, count, a, b
            ),
            len(count),
            work=LEAST_WORK // 4096,
        )
        kept = np.flatnonzero(count)
        if len(kept):
            yield OpenBlock(some, order[kept], int(count.sum()))


@njit(nogil=True, cache=True)
def _count_open(reach, by_row, by_column, own, count, first, last):  # pragma: no cover
    bounds = by_row.shape[0]
    for i in range(len(reach)):
        stop = min(last, reach[i])
        if bounds == 1:
            limit = by_row[0, i]
            for j in range(first, stop):
                count[j] += by_column[0, j] > limit
        else:
            for j in range(first, stop):
                covered = False
                for b in range(bounds):
                    covered |= by_column[b, j] <= by_row[b, i]
                count[j] += not covered


class PricedPairs(NamedTuple):
    """Result of computing a block of open pairs.

    Attributes:
        row, column: pairs that should become edges.
        rest: for each row of the block, upper bound on S_ij − u_i − v_j of its other pairs.
    """

    row: Int[np.ndarray, " pairs"]
    column: Int[np.ndarray, " pairs"]
    rest: Float[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class Pricer:
    """Computation of open pairs.

    Attributes:
        a, b: the rows and the columns.
        absolute: take |cosine| instead of the cosine.
        device: device of the products.
    """

    a: DistinctRows
    b: DistinctRows
    absolute: bool
    device: torch.device

    def evaluate(self, block: OpenBlock, prices: Prices, count: int) -> PricedPairs:
        """Find, for every row of a block, the ``count`` pairs that may exceed u_i + v_j the most.

        Only pairs that may exceed u_i + v_j − margin are considered. Two pairs of every column are
        added.
        """
        rows = _Best(len(block.row), 2 * count, -prices.margin)
        found_row, found_column = [], []
        for first, excess in self._excess(block, prices):
            in_ranges(
                lambda a, b, excess=excess, first=first: rows.push(excess, first, a, b),
                len(block.row),
                work=LEAST_WORK // 64,
            )
            at, to = _best_of_columns(excess, np.float32(-prices.margin))
            found_row.append(block.row[at])
            found_column.append(block.column[first + to])
        at, to = rows.pairs()
        return PricedPairs(
            np.concatenate([block.row[at], *found_row]),
            np.concatenate([block.column[to], *found_column]),
            # The bound of pairs that were not open is the float64 margin; its float32 value may
            # be larger.
            np.maximum(rows.threshold.astype(np.float64), -prices.margin),
        )

    def prove(self, block: OpenBlock, prices: Prices, count: int) -> PricedPairs:
        """Find all pairs of a block that exceed u_i + v_j, in float64; there may be none.

        Needed where a great many pairs are too near to u_i + v_j for low precision. ``count`` is
        ignored.
        """
        found_row, found_column = [], []
        for first, excess in self._excess(block, prices):
            at, to = np.nonzero(excess > 0)
            row, column = block.row[at], block.column[first + to]
            cosine = cosines(self.a, self.b, row, column, absolute=self.absolute)
            above = cosine > prices.u[row] + prices.v[column] + EXACT
            found_row.append(row[above])
            found_column.append(column[above])
        return PricedPairs(
            np.concatenate(found_row), np.concatenate(found_column), np.full(len(block.row), EXACT)
        )

    def best_partners(
        self,
        some: Int[np.ndarray, " some"],
        prices: Float[np.ndarray, " others"],
        count: int,
        *,
        of_columns: bool = False,
    ) -> Int[np.ndarray, "some count"]:
        """Return the partners of some rows (columns) with the largest S − price (low precision)."""
        of, others = (self.b, self.a) if of_columns else (self.a, self.b)
        count = min(count, len(others))
        right = others.rounded.values.to(self.device)
        price = torch.from_numpy(prices).float().to(self.device)
        found = np.empty((len(some), count), dtype=np.int64)
        for start in range(0, len(some), _ROWS // 4):
            part = slice(start, start + _ROWS // 4)
            left = of.rounded.values[torch.from_numpy(some[part])].to(self.device)
            profit = products(left, right, self.absolute).float() - price
            found[part] = profit.topk(count, sorted=False).indices.cpu().numpy()
        return found

    def _excess(
        self, block: OpenBlock, prices: Prices
    ) -> Iterator[tuple[int, Float[np.ndarray, "rows columns"]]]:
        """Yield the first column of each tile, and upper bounds on its S_ij − u_i − v_j."""
        size = float(np.abs(prices.u).max() + np.abs(prices.v).max())
        error = product_error(self.a, self.b).of_row[block.row] + _GUARD * max(1.0, size / 4)
        left = self.a.rounded.values[torch.from_numpy(block.row)].to(self.device)
        own = torch.from_numpy(error - prices.u[block.row]).float().to(self.device)[:, None]
        for first in range(0, len(block.column), _COLUMNS):
            some = block.column[first : first + _COLUMNS]
            right = self.b.rounded.values[torch.from_numpy(some)].to(self.device)
            excess = products(left, right, self.absolute).float()
            excess.add_(excess.abs(), alpha=ROUNDING).add_(own)
            excess.sub_(torch.from_numpy(prices.v[some]).float().to(self.device))
            yield first, excess.cpu().numpy()


class _Best:
    """Largest entries of each row, in lists that are cut to half whenever they are full."""

    def __init__(self, rows: int, length: int, least: float) -> None:
        self.index = np.empty((rows, length), dtype=np.int64)
        self.value = np.empty((rows, length), dtype=np.float32)
        self.length = np.zeros(rows, dtype=np.int64)
        self.threshold = np.full(rows, least, dtype=np.float32)

    def push(self, tile: np.ndarray, first: int, start: int, stop: int) -> None:
        _push_best(tile, self.index, self.value, self.length, self.threshold, first, start, stop)

    def pairs(self) -> tuple[Int[np.ndarray, " found"], Int[np.ndarray, " found"]]:
        kept = np.arange(self.index.shape[1]) < self.length[:, None]
        return np.nonzero(kept)[0], self.index[kept]


@njit(nogil=True, cache=True)
def _push_best(tile, index, value, length, threshold, first, start, stop):  # pragma: no cover
    for r in range(start, stop):
        for c in range(tile.shape[1]):
            if tile[r, c] > threshold[r]:
                index[r, length[r]], value[r, length[r]] = first + c, tile[r, c]
                length[r] += 1
                if length[r] == index.shape[1]:
                    # Keep the better half; entries equal to its worst may stay or go.
                    order = np.argsort(-value[r])
                    keep = index.shape[1] // 2
                    index[r, :keep] = index[r][order[:keep]]
                    threshold[r] = value[r, order[keep]]
                    value[r, :keep] = value[r][order[:keep]]
                    length[r] = keep


def _best_of_columns(
    tile: Float[np.ndarray, "rows columns"], least: np.float32
) -> tuple[Int[np.ndarray, " found"], Int[np.ndarray, " found"]]:
    """Return (rows, columns) of the two largest entries above ``least`` of every column."""
    best = np.full((2, tile.shape[1]), least, dtype=np.float32)
    at = np.full((2, tile.shape[1]), -1)
    in_ranges(lambda a, b: _two_best(tile, best, at, a, b), tile.shape[1], work=LEAST_WORK // 512)
    found = at.ravel() >= 0
    return at.ravel()[found], np.tile(np.arange(tile.shape[1]), 2)[found]


@njit(nogil=True, cache=True)
def _two_best(tile, best, at, start, stop):  # pragma: no cover
    for r in range(tile.shape[0]):
        for c in range(start, stop):
            if tile[r, c] > best[1, c]:
                if tile[r, c] > best[0, c]:
                    best[1, c], at[1, c] = best[0, c], at[0, c]
                    best[0, c], at[0, c] = tile[r, c], r
                else:
                    best[1, c], at[1, c] = tile[r, c], r


def centre_prices(
    edges: Edges,
    u: Float[np.ndarray, " n"],
    v: Float[np.ndarray, " m"],
    partner: Int[np.ndarray, " n"],
    bounds: Bounds,
    *,
    free_columns: bool,
    sweeps: int = 10,
) -> None:
    """Shift the prices of matched pairs, u_i up and v_j down or back, so that few pairs are open.

    Optimal prices are not unique. Each pair moves by at most half of what keeps u_i + v_j ≥ S_ij
    for the listed pairs, because its neighbours move at the same time.

    Args:
        partner: the column of row i, where neither has copies; −1 elsewhere: these prices stay.
        free_columns: true if there are more columns than rows; prices v then stay ≥ 0.
        sweeps: number of times that all prices are shifted.
    """
    rows = np.flatnonzero(partner >= 0)
    columns = partner[rows]
    start, place = edges.by_column
    row = edges.row
    owner = np.full(edges.columns, -1)
    owner[columns] = rows
    room_down, room_up = np.empty(edges.rows), np.empty(edges.columns)
    for _ in range(sweeps):
        in_ranges(
            lambda a, b: _row_room(
                edges.start, edges.column, edges.cosine, u, v, partner, room_down, a, b
            ),
            edges.rows,
        )
        in_ranges(
            lambda a, b: _column_room(start, place, row, edges.cosine, u, v, owner, room_up, a, b),
            edges.columns,
        )
        low, high = -room_down[rows] / 2, room_up[columns] / 2
        if free_columns:
            high = np.minimum(high, v[columns])
        spare_u = u[rows] - np.maximum(bounds.row[rows], -1.0) / 2
        spare_v = v[columns] - np.maximum(bounds.column[columns], -1.0) / 2
        shift = np.clip((spare_v - spare_u) / 2, low, np.maximum(high, low))
        u[rows] += shift
        v[columns] -= shift


@njit(nogil=True, cache=True)
def _row_room(start, column, cosine, u, v, partner, room, first, last):  # pragma: no cover
    for i in range(first, last):
        least = 4.0
        for e in range(start[i], start[i + 1]):
            if column[e] != partner[i]:
                least = min(least, u[i] + v[column[e]] - cosine[e])
        room[i] = max(least, 0.0)


@njit(nogil=True, cache=True)
def _column_room(start, place, row, cosine, u, v, owner, room, first, last):  # pragma: no cover
    for j in range(first, last):
        least = 4.0
        for c in range(start[j], start[j + 1]):
            i = row[place[c]]
            if i != owner[j]:
                least = min(least, u[i] + v[j] - cosine[place[c]])
        room[j] = max(least, 0.0)
