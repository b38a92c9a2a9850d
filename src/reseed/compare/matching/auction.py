"""Auction with ε-scaling: a nearly optimal assignment on the graph, with its prices.

A row without a column bids for the column with the largest S_ij − v_j. It raises the price by the
lead over its second best column plus ε, and the previous owner has to bid again. At the end every
row is within ε of its best (Bertsekas 1988). A few rounds with a large ε find roughly the right
prices; rounds with smaller ε refine them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from reseed.compare.matching.graph import Edges
from reseed.system.compiling import njit


def auction(
    edges: Edges,
    prices: Float[np.ndarray, " m"],
    owner: Int[np.ndarray, " m"],
    partner: Int[np.ndarray, " n"],
    least: Float[np.ndarray, " n"],
    step: float,
    bids: int,
) -> int:
    """Run one round with ε = ``step``, changing ``prices``, ``owner`` and ``partner`` in place.

    Args:
        owner: row of each column, −1 where it is free.
        partner: column of each row, −1 where it has none.
        least: a row does not bid, and stays unmatched, unless some column is worth this much to it.
        bids: maximum number of bids.

    Returns:
        the number of rows left without a column.
    """
    return _auction(
        edges.start, edges.column, edges.cosine, prices, owner, partner, least, step, bids
    )


@njit(nogil=True, cache=True)
def _auction(start, column, cosine, prices, owner, partner, least, step, bids):  # pragma: no cover
    n = len(start) - 1
    waiting = np.empty(n, dtype=np.int64)
    count = 0
    # A row whose column is within ε of its best offer keeps it.
    for i in range(n):
        best, worth = least[i], -np.inf
        for e in range(start[i], start[i + 1]):
            value = cosine[e] - prices[column[e]]
            best = max(best, value)
            if column[e] == partner[i]:
                worth = value
        if partner[i] >= 0 and worth < best - step:
            owner[partner[i]] = -1
            partner[i] = -1
        if partner[i] < 0:
            waiting[count] = i
            count += 1
    without = 0
    while count > 0 and bids > 0:
        bids -= 1
        count -= 1
        i = waiting[count]
        best, second, at = -np.inf, least[i], -1
        for e in range(start[i], start[i + 1]):
            value = cosine[e] - prices[column[e]]
            if value > best:
                second = max(second, best)
                best = value
                at = column[e]
            elif value > second:
                second = value
        if at < 0 or best < least[i]:
            without += 1
            continue
        if second == -np.inf:
            second = best - 2.0  # the only listed column: bid as much as cosines can differ
        prices[at] += best - second + step
        before = owner[at]
        owner[at], partner[i] = i, at
        if before >= 0:
            partner[before] = -1
            waiting[count] = before
            count += 1
    return without + count
