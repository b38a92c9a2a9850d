"""The optimum on the graph: shortest augmenting paths, with exact prices.

Invariant: u_i + v_j ≥ S_ij for every listed pair, with equality for matched ones ("tight"). A row
without a column searches for the nearest column with a free slot (Dijkstra). The distance of a
pair is u_i + v_j − S_ij; going back along a matched pair costs nothing. Then every row on the path
takes the next column, and prices change by the remaining distance, which preserves the invariant
(Jonker & Volgenant 1987).

The heap of columns is in this file because numba's cache of a function does not notice a change
of a function that it calls from another file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from reseed.compare.matching.graph import Assignment, Edges
from reseed.system.compiling import njit

_AT_A_TIME = 512  # number of searches per compiled call; Ctrl-C takes effect between calls


def augment(
    edges: Edges,
    state: Assignment,
    progress: Callable[[float], None] = lambda done: None,
) -> Int[np.ndarray, " some"]:
    """Give every copy of a row a column, as far as the graph has one for it.

    Returns:
        copies that stay unmatched: other rows need every column that these copies can reach.
    """
    todo = state.unmatched
    scratch = _Scratch.of(edges)
    stuck = []
    for first in range(0, len(todo), _AT_A_TIME):
        batch = todo[first : first + _AT_A_TIME]
        reached = np.ones(len(batch), dtype=np.bool_)
        _augment(
            edges.start, edges.column, edges.cosine, state.row_price, state.column_price,
            state.row_of, state.slot_of, state.column_of, state.first_slot, state.owner,
            batch, reached, *scratch.arrays,
        )  # fmt: skip
        stuck.append(batch[~reached])
        progress((first + len(batch)) / len(todo))
    return np.concatenate([*stuck, np.empty(0, dtype=np.int64)])


def release(edges: Edges, state: Assignment) -> None:
    """Lower the price of every column with a free slot to 0, the price of an unused column.

    The price falls until a row prefers this column. That row leaves its own column, which then has
    a free slot, and so on along the shortest path to a column whose price reaches 0.
    """
    start, place = edges.by_column
    scratch = _Scratch.of(edges)
    while True:
        # One search fills one copy of a column, so a column of several copies needs several
        # searches.
        todo = np.flatnonzero(state.has_room & (state.column_price > 0))
        if not len(todo):
            return
        todo = todo[np.argsort(state.column_price[todo], kind="stable")]
        for first in range(0, len(todo), _AT_A_TIME):
            _release(
                start, place, edges.row, edges.cosine, state.row_price, state.column_price,
                state.row_of, state.slot_of, state.column_of, state.first_slot, state.owner,
                state.first_copy, todo[first : first + _AT_A_TIME], *scratch.arrays,
            )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Scratch:
    """Work space of the searches; every search leaves it clean."""

    distance: Float[np.ndarray, " m"]
    place: Int[np.ndarray, " m"]  # position in the heap; −1 not seen, −2 done
    via: Int[np.ndarray, " m"]  # copy from which the column was reached
    heap: Int[np.ndarray, " m"]
    seen: Int[np.ndarray, " m"]
    row_distance: Float[np.ndarray, " n"]  # −1 where the row was not reached
    rows_seen: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, edges: Edges) -> _Scratch:
        n, m = edges.rows, edges.columns
        return cls(
            np.zeros(m), np.full(m, -1), np.full(m, -1), np.zeros(m, dtype=np.int64),
            np.zeros(m, dtype=np.int64), np.full(n, -1.0), np.zeros(n, dtype=np.int64),
        )  # fmt: skip

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.distance, self.place, self.via, self.heap, self.seen, self.row_distance,
            self.rows_seen,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _augment(
    start, column, cosine, u, v, row_of, slot_of, column_of, first_slot, owner,
    todo, reached, distance, place, via, heap, seen, row_distance, rows_seen,
):  # pragma: no cover  # fmt: skip
    # long: the steps of a search share counters; as functions, each would need a dozen arguments.
    for t in range(len(todo)):
        copy = todo[t]
        size, columns, rows = 0, 0, 0
        i, base = row_of[copy], 0.0
        row_distance[i] = 0.0
        rows_seen[rows] = i
        rows += 1
        by = copy
        end = -1
        while True:
            for e in range(start[i], start[i + 1]):
                j = column[e]
                if place[j] == -2:
                    continue
                there = base + max(0.0, u[i] + v[j] - cosine[e])
                if place[j] == -1:
                    seen[columns] = j
                    columns += 1
                    distance[j], via[j] = there, by
                    size = _heap_add(heap, place, distance, size, j)
                elif there < distance[j]:
                    distance[j], via[j] = there, by
                    _heap_up(heap, place, distance, place[j])
                else:
                    continue
                if there <= base:
                    # No column can be nearer, so with many ties the search can stop here.
                    end = _free_slot(first_slot, owner, j)
                    if end >= 0:
                        break
            if end >= 0:
                break
            # Pop the nearest columns until one of them leads to a row not yet reached.
            onward = False
            while not onward:
                if size == 0:
                    break
                j = heap[0]
                size = _heap_pop(heap, place, distance, size)
                end = _free_slot(first_slot, owner, j)
                if end >= 0:
                    break
                for s in range(first_slot[j], first_slot[j + 1]):
                    i = row_of[owner[s]]
                    if row_distance[i] < 0:
                        # A column of several copies goes back on the heap for its other rows.
                        row_distance[i] = distance[j]
                        rows_seen[rows] = i
                        rows += 1
                        by, base = owner[s], distance[j]
                        onward = True
                        more = False
                        for r in range(s + 1, first_slot[j + 1]):
                            more |= row_distance[row_of[owner[r]]] < 0
                        if more:
                            place[j] = -1
                            size = _heap_add(heap, place, distance, size, j)
                        break
            if not onward:
                break
        if end >= 0:
            last = distance[column_of[end]]
            for r in range(rows):
                i = rows_seen[r]
                u[i] -= last - row_distance[i]
            for c in range(columns):
                j = seen[c]
                if distance[j] < last:
                    v[j] += last - distance[j]
            s = end
            while True:
                by = via[column_of[s]]
                before = slot_of[by]
                owner[s], slot_of[by] = by, s
                if by == copy:
                    break
                s = before
        else:
            reached[t] = False
        for r in range(rows):
            row_distance[rows_seen[r]] = -1.0
        for c in range(columns):
            place[seen[c]] = -1


@njit(nogil=True, cache=True, inline="always")
def _free_slot(first_slot, owner, j):  # pragma: no cover
    """Return a free slot of column j, −1 if there is none."""
    for s in range(first_slot[j], first_slot[j + 1]):
        if owner[s] < 0:
            return s
    return -1


@njit(nogil=True, cache=True)
def _release(
    start, entry, row, cosine, u, v, row_of, slot_of, column_of, first_slot, owner, copies,
    todo, distance, place, via, heap, seen, row_distance, rows_seen,
):  # pragma: no cover  # fmt: skip
    # long: for the reason given in `_augment`.
    for first in todo:
        if v[first] <= 0:
            continue
        size, columns, rows = 0, 1, 0
        distance[first], via[first], seen[0] = 0.0, -1, first
        size = _heap_add(heap, place, distance, size, first)
        end, last = -1, np.inf
        while size > 0:
            j = heap[0]
            base = distance[j]
            if base >= last:
                break
            size = _heap_pop(heap, place, distance, size)
            if base + v[j] < last:
                end, last = j, base + v[j]
            for c in range(start[j], start[j + 1]):
                e = entry[c]
                i = row[e]
                there = base + max(0.0, u[i] + v[j] - cosine[e])
                if there >= last:
                    continue
                if row_distance[i] < 0:
                    rows_seen[rows] = i
                    rows += 1
                elif row_distance[i] <= there:
                    continue
                row_distance[i] = there
                for copy in range(copies[i], copies[i + 1]):
                    k = column_of[slot_of[copy]]
                    if k == j or place[k] == -2:
                        continue
                    if place[k] == -1:
                        seen[columns] = k
                        columns += 1
                        distance[k], via[k] = there, copy * len(v) + j
                        size = _heap_add(heap, place, distance, size, k)
                    elif there < distance[k]:
                        distance[k], via[k] = there, copy * len(v) + j
                        _heap_up(heap, place, distance, place[k])
        for r in range(rows):
            i = rows_seen[r]
            if row_distance[i] < last:
                u[i] += last - row_distance[i]
            row_distance[i] = -1.0
        for c in range(columns):
            j = seen[c]
            if distance[j] < last:
                v[j] -= last - distance[j]
            place[j] = -1
        v[end] = 0.0
        # Each row on the path moves to the previous column, into the slot of the next row to move.
        j = end
        if via[j] >= 0:
            owner[slot_of[via[j] // len(v)]] = -1
        while via[j] >= 0:
            copy, to = via[j] // len(v), via[j] % len(v)
            via[j] = -1
            if via[to] >= 0:
                s = slot_of[via[to] // len(v)]
            else:
                s = first_slot[to]
                while owner[s] >= 0:
                    s += 1
            owner[s], slot_of[copy] = copy, s
            j = to


@njit(nogil=True, cache=True, inline="always")
def _heap_add(heap, place, distance, size, j):  # pragma: no cover
    heap[size], place[j] = j, size
    _heap_up(heap, place, distance, size)
    return size + 1


@njit(nogil=True, cache=True)
def _heap_up(heap, place, distance, k):  # pragma: no cover
    j = heap[k]
    d = distance[j]
    while k > 0:
        above = (k - 1) >> 1
        if distance[heap[above]] <= d:
            break
        heap[k] = heap[above]
        place[heap[k]] = k
        k = above
    heap[k], place[j] = j, k


@njit(nogil=True, cache=True)
def _heap_pop(heap, place, distance, size):  # pragma: no cover
    """Remove the nearest column and mark it as done."""
    place[heap[0]] = -2
    size -= 1
    if size == 0:
        return 0
    j = heap[size]
    d = distance[j]
    k = 0
    while True:
        below = 2 * k + 1
        if below >= size:
            break
        if below + 1 < size and distance[heap[below + 1]] < distance[heap[below]]:
            below += 1
        if distance[heap[below]] >= d:
            break
        heap[k] = heap[below]
        place[heap[k]] = k
        k = below
    heap[k], place[j] = j, k
    return size
