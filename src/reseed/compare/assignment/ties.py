"""How much of an optimal assignment is a choice: rows that have an equally good alternative."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from reseed.compare.assignment.solve import Optimum

TIE = 1e-9
"""Pairs whose cosine is so near to u_i + v_j count as tight."""


def exchangeable(optimum: Optimum) -> Bool[np.ndarray, " row_copies"]:
    """Copies of rows that another assignment, as good, gives another column (or copy of one).

    In the graph with an arrow from a row to every column that is as good for it, and from a column
    to the rows that have it, these are the rows on a cycle that is more than going to its own
    column and back. Room in a column, and a column that may be left without a row because its price
    is 0, are one more node.
    """
    state, edges = optimum.state, optimum.edges
    u, v = state.row_price, state.column_price
    n, m = len(u), len(v)
    tight = np.flatnonzero(edges.cosine - u[edges.row] - v[edges.column] >= -TIE)
    room = np.flatnonzero(state.has_room)
    spare = np.flatnonzero(v <= TIE) if len(room) else room
    taken = np.flatnonzero(state.owner >= 0)
    outside = np.full(len(room), n + m), np.full(len(spare), n + m)
    source = np.concatenate([edges.row[tight], n + state.column_of[taken], n + room, outside[1]])
    target = np.concatenate(
        [n + edges.column[tight], state.row_of[state.owner[taken]], outside[0], n + spare]
    )
    graph = sparse.csr_array((np.ones(len(source), dtype=bool), (source, target)), [n + m + 1] * 2)
    part = connected_components(graph, directed=True, connection="strong")[1]
    members = np.bincount(part)
    partner = state.partner
    several = members[part[state.row_of]] > 2
    row_copies, column_copies = np.bincount(state.row_of), np.diff(state.first_slot)
    return several | (row_copies[state.row_of] > 1) | (column_copies[partner] > 1)
