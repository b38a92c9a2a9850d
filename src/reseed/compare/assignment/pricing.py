"""Which pairs outside the graph could still do better, and their cosines.

Of a pair that is not listed an upper bound of its cosine is known: min(r_i, c_j) from the first
pass, p_i + q_j from every later look. Prices that no bound exceeds need no further proof. The
pairs that are left "open" are computed: in blocks, in low precision with its error added, and
those that still could matter one by one in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit
from torch import Tensor

from reseed.compare.assignment.candidates import ROUNDING, product_error
from reseed.compare.assignment.edges import Edges
from reseed.compare.assignment.rows import Rows
from reseed.compare.assignment.threads import in_ranges

_ROWS, _COLUMNS = 1024, 4096
_GUARD = 1e-6  # for comparisons that are made in float32


class Pairs(NamedTuple):
    """Some pairs (i, j), in no particular order."""

    row: Int[np.ndarray, " pairs"]
    column: Int[np.ndarray, " pairs"]


@dataclass(eq=False)
class Bounds:
    """Upper bounds of the cosines of pairs that are not listed.

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
class OpenBlock:
    """Rows and columns that have open pairs with each other, and how many.

    Attributes:
        row, column: their indices.
        count: open pairs among them.
    """

    row: Int[np.ndarray, " rows"]
    column: Int[np.ndarray, " columns"]
    count: int


def open_pairs(
    bounds: Bounds,
    u: Float[np.ndarray, " n"],
    v: Float[np.ndarray, " m"],
    margin: float,
) -> Iterator[OpenBlock]:
    """All pairs whose every bound exceeds u_i + v_j − margin, in blocks."""
    v = v - margin
    order = np.argsort(v, kind="stable")
    sorted_v = v[order]
    reach = np.searchsorted(sorted_v, bounds.row - u)
    by_column = np.stack([(bounds.column - v)[order], *((q - v)[order] for _, q in bounds.sums)])
    by_row = np.stack([u, *(u - p for p, _ in bounds.sums)])
    rows = np.argsort(-reach, kind="stable")
    rows = rows[: np.count_nonzero(reach)]
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        count = np.zeros(reach[some[0]], dtype=np.int64)
        own = np.zeros(len(some), dtype=np.int64)
        in_ranges(
            lambda a, b, own=own, count=count, some=some: _count_open(
                reach[some], by_row[:, some], by_column, own, count, a, b
            ),
            len(count),
            least=4096,
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


def suspects(
    a: Rows,
    b: Rows,
    block: OpenBlock,
    u: Float[np.ndarray, " n"],
    v: Float[np.ndarray, " m"],
    margin: float,
    *,
    absolute: bool,
    device: torch.device,
) -> Pairs:
    """Pairs of a block that may have S_ij > u_i + v_j − margin; all that have it are among them."""
    error = product_error(a, b).of_row
    need = (u - error - margin - _GUARD).astype(np.float32)
    left = a.rounded.values[torch.from_numpy(block.row)].to(device)
    rows, columns = [], []
    for start in range(0, len(block.column), _COLUMNS):
        some = block.column[start : start + _COLUMNS]
        right = b.rounded.values[torch.from_numpy(some)].to(device)
        tile = left @ right.T
        if absolute:
            tile = tile.abs_()
        tile = tile.float()
        tile += ROUNDING * tile.abs()
        found = _above(tile.cpu().numpy(), need[block.row], v[some].astype(np.float32))
        rows.append(block.row[found[0]])
        columns.append(some[found[1]])
    return Pairs(np.concatenate(rows), np.concatenate(columns))


def _above(
    tile: Float[np.ndarray, "rows columns"],
    row: Float[np.ndarray, " rows"],
    column: Float[np.ndarray, " columns"],
) -> tuple[np.ndarray, np.ndarray]:
    counts = np.zeros(len(row), dtype=np.int64)
    in_ranges(lambda a, b: _count_above(tile, row, column, counts, a, b), len(row), least=64)
    ends = np.cumsum(counts)
    found_row = np.repeat(np.arange(len(row)), counts)
    found_column = np.empty(ends[-1] if len(ends) else 0, dtype=np.int64)
    if len(found_column):
        in_ranges(
            lambda a, b: _find_above(tile, row, column, ends - counts, found_column, a, b),
            len(row),
            least=64,
        )
    return found_row, found_column


@njit(nogil=True, cache=True)
def _count_above(tile, row, column, counts, first, last):  # pragma: no cover
    for i in range(first, last):
        found = 0
        for j in range(len(column)):
            found += tile[i, j] - row[i] > column[j]
        counts[i] = found


@njit(nogil=True, cache=True)
def _find_above(tile, row, column, cursor, found, first, last):  # pragma: no cover
    for i in range(first, last):
        at = cursor[i]
        for j in range(len(column)):
            if tile[i, j] - row[i] > column[j]:
                found[at] = j
                at += 1


def best_partners(
    some: Int[np.ndarray, " some"],
    of: Rows,
    others: Rows,
    prices: Float[np.ndarray, " others"],
    count: int,
    *,
    absolute: bool,
    device: torch.device,
) -> Int[np.ndarray, "some count"]:
    """For some rows the partners with the largest S − price (about: in low precision)."""
    count = min(count, len(others))
    right = others.rounded.values.to(device)
    price = torch.from_numpy(prices).float().to(device)
    found = np.empty((len(some), count), dtype=np.int64)
    for start in range(0, len(some), _ROWS // 4):
        part = slice(start, start + _ROWS // 4)
        left = of.rounded.values[torch.from_numpy(some[part])].to(device)
        product: Tensor = left @ right.T
        profit = (product.abs_() if absolute else product).float() - price
        found[part] = profit.topk(count, sorted=False).indices.cpu().numpy()
    return found


def centre(
    edges: Edges,
    u: Float[np.ndarray, " n"],
    v: Float[np.ndarray, " m"],
    partner: Int[np.ndarray, " n"],
    bounds: Bounds,
    *,
    free_columns: bool,
    sweeps: int = 20,
) -> None:
    """Move prices between matched pairs, u_i up and v_j down or back, to where few pairs are open.

    Optimal prices are not unique. What a pair can be moved by without any listed pair losing its
    cover is halved, as its neighbours move at the same time.

    Args:
        partner: the column of row i, where both are single; −1 elsewhere: these stay.
        free_columns: whether there are more columns than rows: then prices v stay ≥ 0.
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
