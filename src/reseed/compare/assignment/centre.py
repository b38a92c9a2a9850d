"""Choice among optimal prices: those that leave few pairs open."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from reseed.compare.assignment.edges import Edges
from reseed.compare.assignment.pricing import Bounds
from reseed.compare.assignment.threads import in_ranges
from reseed.compiling import njit


def centre(
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
        partner: the column of row i, where both are single; −1 elsewhere: these prices stay.
        free_columns: there are more columns than rows; then prices v stay ≥ 0.
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
