"""Sparse graph of the listed pairs, and a partial assignment of its rows with prices.

`Edges` has the columns of every row, with cosines in float64. `Assignment` is what the shortest
paths and the pricing work on. Its rows and columns are distinct and may have several copies; a
column has one slot per copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from reseed.compare.matching.rows import DistinctRows
from reseed.system.compiling import in_ranges, njit


@dataclass(frozen=True, eq=False)
class Edges:
    """Pairs (i, j) in compressed rows; the columns of a row are unique and ascending.

    Attributes:
        start: the pairs of row i are ``start[i] : start[i + 1]``.
        column: j of each pair.
        cosine: S_ij of each pair.
        columns: number of columns, m.
    """

    start: Int[np.ndarray, " n+1"]
    column: Int[np.ndarray, " edges"]
    cosine: Float[np.ndarray, " edges"]
    columns: int

    def __len__(self) -> int:
        return len(self.column)

    @property
    def rows(self) -> int:
        return len(self.start) - 1

    @cached_property
    def by_column(self) -> tuple[Int[np.ndarray, " m+1"], Int[np.ndarray, " edges"]]:
        """``start`` per column, and the pairs of each column as indices into `column`.

        scipy's ``tocsc`` gives the same, but also moves the rows.
        """
        start = np.zeros(self.columns + 1, dtype=np.int64)
        np.cumsum(np.bincount(self.column, minlength=self.columns), out=start[1:])
        place = np.empty(len(self), dtype=np.int32 if len(self) < 2**31 else np.int64)
        _places_by_column(self.column, start[:-1].copy(), place)
        return start, place

    @cached_property
    def row(self) -> Int[np.ndarray, " edges"]:
        """i of each pair."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), np.diff(self.start))

    def profit(self, prices: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
        """Return the best profit of each row, max_j S_ij − v_j; −inf for a row without edges."""
        profits = np.full(self.rows, -np.inf)
        np.maximum.at(profits, self.row, self.cosine - prices[self.column])
        return profits

    def cosine_of(
        self, row: Int[np.ndarray, " some"], column: Int[np.ndarray, " some"]
    ) -> Float[np.ndarray, " some"]:
        """Return the cosines of listed pairs."""
        found = np.empty(len(row))
        _look_up(self.start, self.column, self.cosine, row, column, found)
        return found


def no_edges(rows: int, columns: int) -> Edges:
    """Return a graph without pairs."""
    start, none = np.zeros(rows + 1, dtype=np.int64), np.empty(0, dtype=np.int32)
    return Edges(start, none, np.empty(0), columns)


def add_edges(
    a: DistinctRows,
    b: DistinctRows,
    row: Int[np.ndarray, " listed"],
    column: Int[np.ndarray, " listed"],
    *,
    absolute: bool,
    existing: Edges,
) -> Edges:
    """Return the graph of the pairs (row, column) and of those of ``existing``.

    The pairs may be in any order and repeat. The cosine of a pair is the product of its rows in
    float64, divided by both norms.
    """
    start, found, values = _merged(*_compressed(row, column, len(a), len(b)), existing)
    in_ranges(
        lambda first, last: _fill_cosines(
            start, found, values, a.values, b.values, a.inverse_norms, b.inverse_norms,
            absolute, first, last,
        ),
        len(a),
    )  # fmt: skip
    return Edges(start, found, values, len(b))


def cosines(
    a: DistinctRows,
    b: DistinctRows,
    row: Int[np.ndarray, " pairs"],
    column: Int[np.ndarray, " pairs"],
    *,
    absolute: bool,
) -> Float[np.ndarray, " pairs"]:
    """Return the cosines of some pairs, in float64."""
    found = np.empty(len(row))
    in_ranges(
        lambda first, last: _cosines(
            row, column, found, a.values, b.values, a.inverse_norms, b.inverse_norms,
            absolute, first, last,
        ),
        len(row),
    )  # fmt: skip
    return found


def _compressed(
    row: Int[np.ndarray, " listed"], column: Int[np.ndarray, " listed"], rows: int, columns: int
) -> tuple[Int[np.ndarray, " n+1"], Int[np.ndarray, " edges"]]:
    """Sort pairs by row and column and drop repeated ones."""
    listed = row.astype(np.int32), column.astype(np.int32)
    graph = sparse.csr_array((np.ones(len(row), dtype=bool), listed), shape=(rows, columns))
    graph.sum_duplicates()
    return graph.indptr.astype(np.int64), graph.indices.astype(np.int32, copy=False)


def _closed_up(
    start: Int[np.ndarray, " n+1"], kept: Int[np.ndarray, " n"], found: np.ndarray
) -> tuple[Int[np.ndarray, " n+1"], np.ndarray]:
    """Return the first ``kept[i]`` entries of every row, without the gaps."""
    ends = np.zeros(len(start), dtype=np.int64)
    np.cumsum(kept, out=ends[1:])
    if ends[-1] == len(found):
        return start, found
    closed = np.empty(ends[-1], dtype=found.dtype)
    _close(start, ends, found, closed)
    return ends, closed


def _merged(
    start: Int[np.ndarray, " n+1"], found: Int[np.ndarray, " new"], existing: Edges
) -> tuple[Int[np.ndarray, " n+1"], Int[np.ndarray, " edges"], Float[np.ndarray, " edges"]]:
    """Merge the sorted rows of two graphs; cosines that are not known yet are NaN.

    A sum of scipy matrices would drop the pairs whose cosine is 0.
    """
    rows = len(start) - 1
    bounds = start + existing.start
    column = np.empty(bounds[-1], dtype=np.int32)
    cosine = np.empty(bounds[-1])
    kept = np.empty(rows, dtype=np.int64)
    in_ranges(
        lambda first, last: _merge(
            start, found, existing.start, existing.column, existing.cosine,
            bounds, column, cosine, kept, first, last,
        ),
        rows,
    )  # fmt: skip
    ends, column = _closed_up(bounds, kept, column)
    return ends, column, _closed_up(bounds, kept, cosine)[1]


@njit(nogil=True, cache=True)
def _look_up(start, column, cosine, rows, columns, found):  # pragma: no cover
    for k in range(len(rows)):
        i = rows[k]
        e = start[i] + np.searchsorted(column[start[i] : start[i + 1]], columns[k])
        found[k] = cosine[e]


@njit(nogil=True, cache=True)
def _places_by_column(column, cursor, place):  # pragma: no cover
    for e in range(len(column)):
        place[cursor[column[e]]] = e
        cursor[column[e]] += 1


@njit(nogil=True, cache=True)
def _close(start, ends, found, closed):  # pragma: no cover
    for i in range(len(start) - 1):
        count = ends[i + 1] - ends[i]
        closed[ends[i] : ends[i + 1]] = found[start[i] : start[i] + count]


@njit(nogil=True, cache=True)
def _merge(
    start, found, start2, found2, cosine2, bounds, column, cosine, kept, first, last
):  # pragma: no cover
    for i in range(first, last):
        e, f, to = start[i], start2[i], bounds[i]
        while e < start[i + 1] or f < start2[i + 1]:
            if f == start2[i + 1] or (e < start[i + 1] and found[e] < found2[f]):
                column[to], cosine[to] = found[e], np.nan
                e += 1
            else:
                if e < start[i + 1] and found[e] == found2[f]:
                    e += 1
                column[to], cosine[to] = found2[f], cosine2[f]
                f += 1
            to += 1
        kept[i] = to - bounds[i]


@njit(nogil=True, cache=True)
def _fill_cosines(
    start, column, cosine, a, b, inverse_a, inverse_b, absolute, first, last
):  # pragma: no cover
    for i in range(first, last):
        row = a[i]
        for e in range(start[i], start[i + 1]):
            if np.isnan(cosine[e]):
                j = column[e]
                value = _product(row, b[j]) * inverse_a[i] * inverse_b[j]
                cosine[e] = abs(value) if absolute else value


@njit(nogil=True, cache=True)
def _cosines(
    row, column, found, a, b, inverse_a, inverse_b, absolute, first, last
):  # pragma: no cover
    for k in range(first, last):
        i, j = row[k], column[k]
        value = _product(a[i], b[j]) * inverse_a[i] * inverse_b[j]
        found[k] = abs(value) if absolute else value


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _product(x, y):  # pragma: no cover
    """Return the scalar product in float64, summed in any order."""
    total = 0.0
    for k in range(len(x)):
        total += np.float64(x[k]) * np.float64(y[k])
    return total


@dataclass(eq=False)
class Assignment:
    """A partial assignment and its prices; changed in place.

    Attributes:
        row_price, column_price: u and v.
        row_of: row of each copy of a row.
        slot_of: slot of each copy of a row, −1 where it has none.
        column_of: column of each slot.
        first_slot: the slots of column j are ``first_slot[j] : first_slot[j + 1]``.
        owner: copy of a row in the slot, −1 where it is free.
    """

    row_price: Float[np.ndarray, " n"]
    column_price: Float[np.ndarray, " m"]
    row_of: Int[np.ndarray, " row_copies"]
    slot_of: Int[np.ndarray, " row_copies"]
    column_of: Int[np.ndarray, " slots"]
    first_slot: Int[np.ndarray, " m+1"]
    owner: Int[np.ndarray, " slots"]

    @classmethod
    def empty(
        cls,
        row_copies: Int[np.ndarray, " n"],
        column_copies: Int[np.ndarray, " m"],
        column_price: Float[np.ndarray, " m"],
    ) -> Assignment:
        """Return an assignment in which every row is unmatched."""
        return cls(
            row_price=np.zeros(len(row_copies)),
            column_price=column_price.copy(),
            row_of=np.repeat(np.arange(len(row_copies)), row_copies),
            slot_of=np.full(row_copies.sum(), -1),
            column_of=np.repeat(np.arange(len(column_copies)), column_copies),
            first_slot=np.r_[0, np.cumsum(column_copies)],
            owner=np.full(column_copies.sum(), -1),
        )

    @property
    def unmatched(self) -> Int[np.ndarray, " some"]:
        """Copies of rows that have no column."""
        return np.flatnonzero(self.slot_of < 0)

    @property
    def partner(self) -> Int[np.ndarray, " row_copies"]:
        """Column of each copy of a row, −1 where it has none."""
        return np.where(self.slot_of >= 0, self.column_of[self.slot_of], -1)

    @property
    def first_copy(self) -> Int[np.ndarray, " n+1"]:
        """The copies of row i are ``first_copy[i] : first_copy[i + 1]``."""
        return np.searchsorted(self.row_of, np.arange(len(self.row_price) + 1))

    @property
    def has_room(self) -> Bool[np.ndarray, " m"]:
        """Columns with a free slot."""
        room = np.zeros(len(self.column_price), dtype=bool)
        room[self.column_of[self.owner < 0]] = True
        return room

    def take(self, copies: Int[np.ndarray, " some"], columns: Int[np.ndarray, " some"]) -> None:
        """Put each of the copies into the first slot of its column."""
        slots = self.first_slot[columns]
        self.slot_of[copies] = slots
        self.owner[slots] = copies

    def tighten(self, edges: Edges) -> None:
        """Set each row price to the row's best profit; unmatch rows whose column gives less."""
        _tighten(
            edges.start, edges.column, edges.cosine, self.row_price, self.column_price,
            self.row_of, self.slot_of, self.column_of, self.owner,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _tighten(start, column, cosine, u, v, row_of, slot_of, column_of, owner):  # pragma: no cover
    for i in range(len(u)):
        best = -np.inf
        for e in range(start[i], start[i + 1]):
            best = max(best, cosine[e] - v[column[e]])
        u[i] = best
    for copy in range(len(row_of)):
        if slot_of[copy] < 0:
            continue
        i, j = row_of[copy], column_of[slot_of[copy]]
        tight = False
        for e in range(start[i], start[i + 1]):
            if column[e] == j:
                tight = cosine[e] - v[j] >= u[i] - 1e-15  # rounding error of moved prices
        if not tight:
            owner[slot_of[copy]] = -1
            slot_of[copy] = -1
