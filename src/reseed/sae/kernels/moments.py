"""Sums over the rows of a matrix, in portions that depend only on the shape."""

from __future__ import annotations

import numpy as np

from reseed.compiling import njit
from reseed.sae.kernels.screening import REORDER

PART = 64
"""Rows per portion; one thread adds them up."""


@njit(nogil=True, cache=True, fastmath=REORDER)
def part_sums(rows, weights, parts, start, stop):  # pragma: no cover
    """Write Σ weight · row of each of the portions ``start`` … ``stop``."""
    width = rows.shape[1]
    for part in range(start, stop):
        parts[part, :] = 0.0
        for i in range(part * PART, min((part + 1) * PART, rows.shape[0])):
            weight = weights[i]
            if weight != 0:
                for c in range(width):
                    parts[part, c] += weight * rows[i, c]


@njit(nogil=True, cache=True, fastmath=REORDER)
def squared_distances(rows, centre, squares, start, stop):  # pragma: no cover
    """Write ‖row − centre‖² of the rows ``start`` … ``stop``."""
    for i in range(start, stop):
        total = np.float32(0.0)
        for c in range(rows.shape[1]):
            away = rows[i, c] - centre[c]
            total += away * away
        squares[i] = total
