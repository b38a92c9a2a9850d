"""The exact assignment: solve on a graph of candidates, price what is outside of it, repeat."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int

from reseed.compare.assignment.auction import auction
from reseed.compare.assignment.candidates import CANDIDATES, candidates
from reseed.compare.assignment.centre import centre
from reseed.compare.assignment.edges import Edges, listed_edges, no_edges
from reseed.compare.assignment.paths import augment, release
from reseed.compare.assignment.pricing import EXACT, Bounds, Pricer, Prices, open_pairs
from reseed.compare.assignment.rows import DistinctRows
from reseed.compare.assignment.state import Assignment

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
STEPS = (6e-3, 2e-3, 6e-4, 2e-4, 5e-5)
"""ε of the rounds of the auction."""
PARKED = 0.03
"""The first auction is over when at most so many rows are without a column."""
_LOWERED = 0.01, 8  # by how much, and how often, what a row may be content with is lowered
_BIDS = 40  # of an auction, for each row: where ties are many it could go on for long
_NEAR = 1e-3  # pairs so near to u_i + v_j become edges as well, so that the next look is short
_MOST_EDGES = 1 << 26  # that a round may add
SPREAD = 4.0
"""Prices of columns differ at first by so much at most. Optimal ones differ by no more than 2, as
cosines do."""


@dataclass(frozen=True, eq=False)
class Optimum:
    """A finished assignment of rows to at least as many columns.

    Attributes:
        state: every copy of a row has a slot; prices are exact.
        edges: the graph at the end. Pairs outside of it have S_ij ≤ u_i + v_j (to 1e-12): less by
            a margin (0.001), unless a row has more such near pairs than are listed for it, the
            nearest of them first. So of very many ties some are not in it.
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
    """The assignment of every row of ``a`` to a row of ``b`` with the largest sum of cosines.

    Raises:
        ValueError: more rows in ``a`` than in ``b`` (copies counted).
    """
    if a.count > b.count:
        raise ValueError(f"`a` must not have more rows than `b`; got {a.count} and {b.count}")
    # The bounds take it that sums are accumulated in float32, which CUDA does only if told so.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return _Solver(a, b, absolute, count, torch.device(device), progress).solve()


@dataclass(eq=False)
class _Solver:
    """The state of `solve`: the graph, what is known of the pairs outside, the assignment."""

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
        self.settle()
        while not self.priced():
            self.settle()
        return Optimum(self.state, self.edges)

    def list_candidates(self) -> None:
        """The pass over all pairs: the graph, and bounds for what is not in it."""
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
        """Prices that are about right, and a column for most rows: the auction.

        It starts at prices which the bounds make feasible for all pairs, u_i ≥ r_i/2 and
        v_j ≥ c_j/2. Rows that find nothing worth so much, and columns that nobody bids for, are
        given more edges, before the auction goes on without these limits.
        """
        least_row, prices = (np.maximum(x, -1.0) / 2 for x in (self.bounds.row, self.bounds.column))
        if self.surplus:
            # Columns that are left over cost 0; as a rule they are those with the worst candidates.
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
            if np.count_nonzero(single & (partner < 0)) <= PARKED * len(self.a):
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
        self.state = Assignment.empty(self.a.copies, self.b.copies, _sober(prices))
        rows = np.flatnonzero(partner >= 0)
        self.state.take(self.state.first_copy[rows], partner[rows])

    def settle(self) -> None:
        """The optimum on the graph, which is widened where not every row finds a column."""
        state = self.state
        state.tighten(self.edges)
        self.note(f"paths for {len(state.without):,}")
        while True:
            stuck = augment(self.edges, state, lambda done: self.say(f"shortest paths {done:.0%}"))
            if not len(stuck):
                break
            self.note(f"{len(stuck):,} stuck")
            rows, times = np.unique(state.row_of[stuck], return_counts=True)
            columns = np.flatnonzero(state.has_room)
            columns = columns[np.argsort(state.column_price[columns], kind="stable")]
            self.widen(rows, columns[: 4 * len(rows)], state.row_price, state.column_price)
            # Whatever else: a free place for every one of them.
            room = np.bincount(state.column_of[state.owner < 0], minlength=len(self.b))
            self.add(np.repeat(rows, times), np.repeat(columns, room[columns])[: len(stuck)])
            state.tighten(self.edges)
        if self.surplus:
            release(self.edges, state)
        self.note("settled")

    def priced(self) -> bool:
        """Compute the pairs that are open; True where none of them belongs into the graph."""
        self.centre()
        prices = Prices(self.state.row_price.copy(), self.state.column_price.copy(), _NEAR)
        unclear, worst = self.look(prices)
        if worst > EXACT:
            return False
        # Where a row has more pairs near u_i + v_j than were kept, low precision cannot tell.
        return not len(unclear) or self.look(prices, unclear)[1] <= EXACT

    def centre(self) -> None:
        """Of the prices that are as good, those that leave few pairs open."""
        state = self.state
        partner = np.full(len(self.a), -1)
        column = state.partner
        movable = (self.a.copies[state.row_of] == 1) & (self.b.copies[column] == 1)
        partner[state.row_of[movable]] = column[movable]
        centre(
            self.edges, state.row_price, state.column_price, partner, self.bounds,
            free_columns=self.surplus > 0,
        )  # fmt: skip
        self.note("centred")

    def look(
        self, prices: Prices, rows: Int[np.ndarray, " some"] | None = None
    ) -> tuple[Int[np.ndarray, " unclear"], float]:
        """Compute what is open; list what should be listed, and know more about the rest.

        Args:
            rows: look only at these, and in float64.

        Returns:
            the rows of which pairs were left out that may exceed their prices; and by how much a
            listed pair exceeds them.
        """
        look_at = self.pricer.look_at if rows is None else self.pricer.prove
        # As a rule few pairs are found. Where rounds mount, as in clusters that are larger than
        # the lists, they are let become more, as far as memory goes.
        count = min(self.count << self.rounds, max(self.count, _MOST_EDGES // len(self.a)))
        self.rounds += rows is None
        rest = np.full(len(self.a), -prices.margin)
        found, total = [], 0
        for block in open_pairs(self.bounds, prices, rows):
            total += block.count
            self.say(f"prices: {total:,} open pairs")
            found.append(look_at(block, prices, count))
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
        """More edges for some rows and some columns: their best by price, and one another."""
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
        self.edges = listed_edges(
            self.a, self.b, row, column, absolute=self.absolute, beside=self.edges
        )

    def note(self, what: str) -> None:
        log.debug("%7.2f s  %s", time.perf_counter() - self.started, what)


def _sober(prices: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Prices without what a bidding war made of them.

    Where rows want fewer columns than they are (as where columns stand for many copies, of which
    the auction sells one) they outbid each other until there are no bids left. At prices of a
    million float64 has no 12 digits for a cosine, so that nothing could be proved. What all have in
    common does not matter, and any prices will do for a start.
    """
    prices = prices - max(0.0, float(prices.min()) - 1.0)
    return np.minimum(prices, prices.min() + SPREAD)
