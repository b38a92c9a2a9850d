"""Ties of an optimal assignment: rows that have an equally good alternative."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from reseed.compare.assignment.solve import Optimum

TIE = 1e-9
"""A pair is tight if its cosine is within this distance of u_i + v_j."""


def exchangeable(optimum: Optimum) -> Bool[np.ndarray, " row_copies"]:
    """Return the copies of rows that an equally good assignment gives another column or copy.

    The graph has an arrow from a row to every tight column, and from a column to the rows matched
    to it. The rows are those on a cycle longer than to their own column and back. One more node
    stands for free slots, and for columns that may stay unused because their price is 0.
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
