"""The exact assignment: solve on a graph of candidates, price the pairs outside it, repeat.

The first prices come from an auction with ε-scaling, a nearly optimal assignment on the graph. A
row without a column bids for the column with the largest S_ij − v_j. It raises the price by the
lead over its second best column plus ε, and the previous owner has to bid again. At the end the
column of every row is within ε of the row's best (Bertsekas 1988). A few rounds with a large ε find
roughly the right prices; rounds with smaller ε refine them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int

from reseed.compare.matching.candidates import CANDIDATES, candidates
from reseed.compare.matching.graph import Assignment, Edges, add_edges, no_edges
from reseed.compare.matching.paths import augment, release
from reseed.compare.matching.pricing import EXACT, Bounds, Pricer, Prices, centre_prices, open_pairs
from reseed.compare.matching.rows import DistinctRows
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
        least: minimum S_ij − v_j for a bid of each row; a row without such a column is unmatched.
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


log = logging.getLogger(__name__)

Progress = Callable[[str], None]
STEPS = (6e-3, 2e-3, 6e-4, 2e-4, 5e-5)
"""ε of the rounds of the auction."""
UNMATCHED_FRACTION = 0.03
"""The first auction ends when at most this fraction of the rows has no column."""
_LOWERED = 0.01, 8  # step, and maximum number of steps, by which the rows' reserve values fall
_BIDS = 40  # maximum number of bids per row and auction; limits the time if there are many ties
_NEAR = 1e-3  # pairs this near to u_i + v_j become edges too, so that the next search is short
_MOST_EDGES = 1 << 26  # maximum number of edges that a round may add
SPREAD = 4.0
"""Maximum difference between initial column prices. Optimal prices differ by at most 2, as cosines
do."""


@dataclass(frozen=True, eq=False)
class Optimum:
    """A finished assignment of rows to at least as many columns.

    Attributes:
        state: every copy of a row has a slot; prices are exact.
        edges: the graph at the end. Pairs outside it have S_ij ≤ u_i + v_j (to 1e-12), and are
            below by a margin (0.001) unless a row has more such near pairs than its list holds;
            the nearest are listed first. So if very many pairs tie, the graph may lack some.
    """

    state: Assignment
    edges: Edges


def solve(
    a: DistinctRows,
    b: DistinctRows,
    *,
    absolute: bool = False,
    count: int = CANDIDATES,
    device: torch.device | str = "cpu",
    progress: Progress = lambda message: None,
) -> Optimum:
    """Assign every row of ``a`` to a row of ``b`` with the largest sum of cosines.

    Raises:
        ValueError: ``a`` has more rows than ``b`` (copies counted).
    """
    if a.count > b.count:
        raise ValueError(f"`a` must not have more rows than `b`; got {a.count} and {b.count}")
    # The error bounds assume accumulation in float32, which CUDA guarantees only with this setting.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return _Solver(a, b, absolute, count, torch.device(device), progress).solve()


@dataclass(eq=False)
class _Solver:
    """State of `solve`: the graph, bounds on the pairs outside it, the assignment."""

    a: DistinctRows
    b: DistinctRows
    absolute: bool
    count: int
    device: torch.device
    say: Progress
    edges: Edges = field(init=False)
    bounds: Bounds = field(init=False)
    state: Assignment = field(init=False)

    def __post_init__(self) -> None:
        self.pricer = Pricer(self.a, self.b, self.absolute, self.device)
        self.surplus = self.b.count - self.a.count
        self.started = time.perf_counter()
        self.rounds = 0

    def solve(self) -> Optimum:
        self.list_candidates()
        self.begin()
        self.solve_graph()
        while not self.priced():
            self.solve_graph()
        return Optimum(self.state, self.edges)

    def list_candidates(self) -> None:
        """Run the pass over all pairs; set the graph, and bounds on the pairs outside it."""
        by_row, by_column = candidates(
            self.a, self.b, absolute=self.absolute, count=self.count, device=self.device,
            progress=lambda done: self.say(f"candidates {done:.0%}"),
        )  # fmt: skip
        self.bounds = Bounds(by_row.bound, by_column.bound)
        self.edges = no_edges(len(self.a), len(self.b))
        row, column = by_row.pairs()
        of_column, back = by_column.pairs()
        self.add(np.concatenate([row, back]), np.concatenate([column, of_column]))
        self.note("candidates")

    def begin(self) -> None:
        """Run the auction: find roughly right prices, and a column for most rows.

        It starts at prices which the bounds make feasible for all pairs, u_i ≥ r_i/2 and
        v_j ≥ c_j/2. Rows that find no column worth this much, and columns without a bid, get more
        edges; then the auction continues without these limits.
        """
        least_row, prices = (np.maximum(x, -1.0) / 2 for x in (self.bounds.row, self.bounds.column))
        if self.surplus:
            # Unused columns cost 0; usually they are those with the worst candidates.
            shift = np.quantile(prices, self.surplus / self.b.count)
            least_row, prices = least_row + shift, np.maximum(prices - shift, 0.0)
        # Rows of several copies are left to the shortest paths.
        single = self.a.copies == 1
        least = np.where(single, least_row, np.inf)
        owner, partner = np.full(len(self.b), -1), np.full(len(self.a), -1)

        def bid(step: float) -> None:
            bids = _BIDS * len(self.a)
            auction(self.edges, prices, owner, partner, least, step, bids)
            self.note(f"auction at {step}: {np.count_nonzero(single & (partner < 0))} without")

        bid(STEPS[0])
        by, times = _LOWERED
        for _ in range(times):
            if np.count_nonzero(single & (partner < 0)) <= UNMATCHED_FRACTION * len(self.a):
                break
            least -= by
            bid(STEPS[0])
        rows, columns = np.flatnonzero(single & (partner < 0)), np.flatnonzero(owner < 0)
        if len(rows):
            columns = columns[np.argsort(-prices[columns], kind="stable")][: len(rows)]
            self.widen(rows, columns, self.edges.profit(prices), prices)
        least[single] = -np.inf
        for step in STEPS:
            bid(step)
        self.state = Assignment.empty(self.a.copies, self.b.copies, _limit_prices(prices))
        rows = np.flatnonzero(partner >= 0)
        self.state.take(self.state.first_copy[rows], partner[rows])

    def solve_graph(self) -> None:
        """Find the optimum on the graph; add edges where not every row finds a column."""
        state = self.state
        state.tighten(self.edges)
        self.note(f"paths for {len(state.unmatched):,}")
        while True:
            stuck = augment(self.edges, state, lambda done: self.say(f"shortest paths {done:.0%}"))
            if not len(stuck):
                break
            self.note(f"{len(stuck):,} stuck")
            rows, times = np.unique(state.row_of[stuck], return_counts=True)
            columns = np.flatnonzero(state.has_room)
            columns = columns[np.argsort(state.column_price[columns], kind="stable")]
            self.widen(rows, columns[: 4 * len(rows)], state.row_price, state.column_price)
            # Edges to free slots guarantee a column to every stuck copy.
            room = np.bincount(state.column_of[state.owner < 0], minlength=len(self.b))
            self.add(np.repeat(rows, times), np.repeat(columns, room[columns])[: len(stuck)])
            state.tighten(self.edges)
        if self.surplus:
            release(self.edges, state)
        self.note("settled")

    def priced(self) -> bool:
        """Compute the open pairs; return True if none of them belongs in the graph."""
        self.centre()
        prices = Prices(self.state.row_price.copy(), self.state.column_price.copy(), _NEAR)
        unclear, worst = self.price_open_pairs(prices)
        if worst > EXACT:
            return False
        # Low precision cannot decide rows with more pairs near u_i + v_j than were listed.
        return not len(unclear) or self.price_open_pairs(prices, unclear)[1] <= EXACT

    def centre(self) -> None:
        """Move to equally good prices that leave few pairs open."""
        state = self.state
        partner = np.full(len(self.a), -1)
        column = state.partner
        movable = (self.a.copies[state.row_of] == 1) & (self.b.copies[column] == 1)
        partner[state.row_of[movable]] = column[movable]
        centre_prices(
            self.edges, state.row_price, state.column_price, partner, self.bounds,
            free_columns=self.surplus > 0,
        )  # fmt: skip
        self.note("centred")

    def price_open_pairs(
        self, prices: Prices, rows: Int[np.ndarray, " some"] | None = None
    ) -> tuple[Int[np.ndarray, " unclear"], float]:
        """Compute the open pairs, add edges, and tighten the bounds of the other pairs.

        Args:
            rows: compute only the pairs of these rows, and in float64.

        Returns:
            the rows that have unlisted pairs which may exceed u_i + v_j; and the largest excess of
            a listed pair.
        """
        compute = self.pricer.evaluate if rows is None else self.pricer.prove
        # Usually few pairs are found. If many rounds are needed, as with clusters larger than the
        # lists, each round may add twice as many, within `_MOST_EDGES`.
        count = min(self.count << self.rounds, max(self.count, _MOST_EDGES // len(self.a)))
        self.rounds += rows is None
        rest = np.full(len(self.a), -prices.margin)
        found, total = [], 0
        for block in open_pairs(self.bounds, prices, rows):
            total += block.count
            self.say(f"prices: {total:,} open pairs")
            found.append(compute(block, prices, count))
            rest[block.row] = found[-1].rest
        if found:
            self.add(
                np.concatenate([one.row for one in found]),
                np.concatenate([one.column for one in found]),
            )
        if rows is None:
            self.bounds.add(prices.u + rest, prices.v)
        edges = self.edges
        worst = float((edges.cosine - prices.u[edges.row] - prices.v[edges.column]).max())
        part = total / (len(self.a) * len(self.b))
        self.note(f"open {part:.3%}, {len(edges):,} edges, worst {worst:.1e}")
        return np.flatnonzero(rest > 0), worst

    def widen(
        self,
        rows: Int[np.ndarray, " rows"],
        columns: Int[np.ndarray, " columns"],
        row_price: Float[np.ndarray, " n"],
        column_price: Float[np.ndarray, " m"],
    ) -> None:
        """Add edges from some rows and columns to their best partners, and to each other."""
        more = 2 * self.count
        found = self.pricer.best_partners(rows, column_price, more)
        back = self.pricer.best_partners(columns, row_price, more, of_columns=True)
        pairs = min(len(rows), len(columns))
        self.add(
            np.concatenate([np.repeat(rows, found.shape[1]), back.ravel(), rows[:pairs]]),
            np.concatenate([found.ravel(), np.repeat(columns, back.shape[1]), columns[:pairs]]),
        )
        self.note(f"widened {len(rows):,} rows and {len(columns):,} columns")

    def add(self, row: Int[np.ndarray, " new"], column: Int[np.ndarray, " new"]) -> None:
        self.edges = add_edges(
            self.a, self.b, row, column, absolute=self.absolute, existing=self.edges
        )

    def note(self, what: str) -> None:
        log.debug("%7.2f s  %s", time.perf_counter() - self.started, what)


def _limit_prices(prices: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Limit the level and the spread of the auction's prices.

    If rows compete for too few columns (e.g. columns of many copies, of which the auction sells
    one), they outbid each other until no bids are left. At prices of a million, float64 lacks the
    12 digits after the point that the proof needs. A common offset does not matter, and the
    shortest paths can start from any prices.
    """
    prices = prices - max(0.0, float(prices.min()) - 1.0)
    return np.minimum(prices, prices.min() + SPREAD)
