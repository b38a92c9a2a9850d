"""The exact assignment: solve on a graph of candidates, price what is outside of it, repeat."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from reseed.compare.assignment.auction import auction
from reseed.compare.assignment.candidates import CANDIDATES, candidates
from reseed.compare.assignment.edges import Edges, listed_edges, no_edges
from reseed.compare.assignment.paths import Assignment, augment, release
from reseed.compare.assignment.pricing import (
    EXACT,
    Bounds,
    Pricer,
    Prices,
    centre,
    open_pairs,
)
from reseed.compare.assignment.rows import Rows

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
STEPS = (6e-3, 2e-3, 6e-4, 2e-4, 5e-5)
"""ε of the rounds of the auction."""
PARKED = 0.03
"""At most so many rows may be left without a column by the first auction."""
_NEAR = 1e-3  # pairs so near to mattering become edges as well


@dataclass(frozen=True, eq=False)
class Optimum:
    """A finished assignment of rows to at least as many columns.

    Attributes:
        state: every copy of a row has a slot; prices are exact.
        edges: the graph at the end. Every pair outside of it has S_ij < u_i + v_j, by a margin
            (0.001) that leaves no doubt which pairs are tight.
    """

    state: Assignment
    edges: Edges


def solve(
    a: Rows,
    b: Rows,
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
    return _Solver(a, b, absolute, count, torch.device(device), progress).solve()


class _Solver:
    def __init__(
        self,
        a: Rows,
        b: Rows,
        absolute: bool,
        count: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.a, self.b, self.absolute, self.device = a, b, absolute, device
        self.count, self.say = count, progress
        self.pricer = Pricer(a, b, absolute, device)
        self.surplus = b.count - a.count
        self.edges: Edges = no_edges(len(a), len(b))
        self.started = time.perf_counter()

    def solve(self) -> Optimum:
        a, b = self.a, self.b
        by_row, by_column = lists = candidates(
            a, b, absolute=self.absolute, count=self.count, device=self.device,
            progress=lambda done: self.say(f"candidates {done:.0%}"),
        )  # fmt: skip
        self.note("candidates")
        self.bounds = Bounds(by_row.bound, by_column.bound)
        own_row, own_column = by_row.pairs()
        back_column, back_row = by_column.pairs()
        self.add(np.concatenate([own_row, back_row]), np.concatenate([own_column, back_column]))
        del lists, by_row, by_column
        self.note(f"edges {len(self.edges):,}")
        self.start()
        self.settle()
        while not self.priced():
            self.settle()
        return Optimum(self.state, self.edges)

    def note(self, what: str) -> None:
        log.debug("%7.2f s  %s", time.perf_counter() - self.started, what)

    def add(self, row: Int[np.ndarray, " new"], column: Int[np.ndarray, " new"]) -> None:
        self.edges = listed_edges(
            self.a, self.b, row, column, absolute=self.absolute, beside=self.edges
        )

    def start(self) -> None:
        """Prices that are about right, and most rows with a column."""
        bounds = self.bounds
        half_row, half_column = _finite(bounds.row) / 2, _finite(bounds.column) / 2
        # Columns that are left over have the price 0; as a rule those whose candidates are worst.
        shift = np.quantile(half_column, self.surplus / self.b.count) if self.surplus else 0.0
        prices = np.maximum(half_column - shift, 0.0) if self.surplus else half_column
        least = half_row + shift
        # Rows and columns of several copies are left to the shortest paths.
        least[self.a.copies > 1] = np.inf
        owner, partner = np.full(len(self.b), -1), np.full(len(self.a), -1)
        bids = 40 * len(self.a)
        singles = int((self.a.copies == 1).sum())
        for _ in range(8):
            without = auction(self.edges, prices, owner, partner, least, STEPS[0], bids)
            self.note(f"auction {STEPS[0]}: {without} without")
            if without - (len(self.a) - singles) <= PARKED * len(self.a):
                break
            least -= 0.01
        # Who found nothing worth its while is given more to choose from.
        rows = np.flatnonzero((partner < 0) & (self.a.copies == 1))
        columns = np.flatnonzero(owner < 0)
        columns = columns[np.argsort(-prices[columns])][: max(len(rows), 1)]
        if len(rows):
            self.widen(rows, columns, _profit(self.edges, prices), prices)
        least[self.a.copies == 1] = -np.inf
        for step in STEPS:
            without = auction(self.edges, prices, owner, partner, least, step, bids)
            self.note(f"auction {step}: {without} without")
        self.state = Assignment.empty(self.a.copies, self.b.copies, prices)
        rows = np.flatnonzero(partner >= 0)
        self.state.take(self.state.first_copy[rows], partner[rows])

    def widen(
        self,
        rows: Int[np.ndarray, " rows"],
        columns: Int[np.ndarray, " columns"],
        row_price: Float[np.ndarray, " n"],
        column_price: Float[np.ndarray, " m"],
    ) -> None:
        """More edges for some rows and some columns: their best by price, and each other."""
        more = 2 * self.count
        found = self.pricer.best_partners(rows, column_price, more)
        back = self.pricer.best_partners(columns, row_price, more, of_columns=True)
        pairs = min(len(rows), len(columns))
        self.add(
            np.concatenate([np.repeat(rows, found.shape[1]), back.ravel(), rows[:pairs]]),
            np.concatenate([found.ravel(), np.repeat(columns, back.shape[1]), columns[:pairs]]),
        )
        self.note(f"widened {len(rows)} rows, {len(columns)} columns: edges {len(self.edges):,}")

    def settle(self) -> None:
        """The optimum on the graph, which is widened where it has none."""
        state = self.state
        state.tighten(self.edges)
        self.note(f"paths for {len(state.without)}")
        while True:
            stuck = augment(self.edges, state, lambda done: self.say(f"shortest paths {done:.0%}"))
            if not len(stuck):
                break
            self.note(f"{len(stuck)} stuck")
            rows, times = np.unique(state.row_of[stuck], return_counts=True)
            columns = np.flatnonzero(state.has_room)
            columns = columns[np.argsort(state.column_price[columns], kind="stable")]
            self.widen(rows, columns[: 4 * len(rows)], state.row_price, state.column_price)
            # Whatever else: room for every one of them.
            room = np.bincount(state.column_of[state.owner < 0], minlength=len(self.b))
            places = np.repeat(columns, room[columns])
            self.add(np.repeat(rows, times), places[: len(stuck)])
            state.tighten(self.edges)
        if self.surplus:
            release(self.edges, state)
        self.note(f"settled: {self.objective():.9f}")

    def objective(self) -> float:
        return float(
            (self.state.row_price * self.a.copies).sum()
            + (self.state.column_price * self.b.copies).sum()
        )

    def priced(self) -> bool:
        """Compute the pairs that are open; True where none of them belongs into the graph."""
        state = self.state
        u, v = state.row_price, state.column_price
        partner = np.full(len(self.a), -1)
        single = (self.a.copies == 1)[state.row_of]
        partner[state.row_of[single]] = state.partner[single]
        partner[partner >= 0] = np.where(
            self.b.copies[partner[partner >= 0]] == 1, partner[partner >= 0], -1
        )
        centre(self.edges, u, v, partner, self.bounds, free_columns=self.surplus > 0)
        self.note("centred")
        prices = Prices(u.copy(), v.copy(), _NEAR)
        before = len(self.edges)
        unclear, worst = self.looked(prices)
        self.note(f"edges {before:,} -> {len(self.edges):,}, worst {worst:.1e}")
        if worst > EXACT:
            return False
        if not len(unclear):
            return True
        worst = self.looked(prices, unclear)[1]
        self.note(f"proved for {len(unclear):,} rows, worst {worst:.1e}")
        return worst <= EXACT

    def looked(
        self, prices: Prices, rows: Int[np.ndarray, " some"] | None = None
    ) -> tuple[Int[np.ndarray, " unclear"], float]:
        """Compute what is open; list what should be listed, and know more about the rest.

        Args:
            rows: prove it in float64, for these.

        Returns:
            rows of which pairs that may exceed their prices were left out, and by how much a
            pair that is listed exceeds them.
        """
        rest = np.full(len(self.a), -prices.margin)
        found = []
        total = 0
        for block in open_pairs(self.bounds, prices, rows):
            total += block.count
            self.say(f"prices: {total:,} open pairs")
            one = (
                self.pricer.look_at(block, prices, self.count)
                if rows is None
                else self.pricer.prove(block, prices)
            )
            rest[block.row] = one.rest
            found.append(one)
        self.note(f"open {total / (len(self.a) * len(self.b)):.3%}")
        if found:
            self.add(
                np.concatenate([one.row for one in found]),
                np.concatenate([one.column for one in found]),
            )
        if rows is None:
            self.bounds.add(prices.u + rest, prices.v)
        edges = self.edges
        worst = float((edges.cosine - prices.u[edges.row] - prices.v[edges.column]).max())
        return np.flatnonzero(rest > 0), worst


def _finite(bound: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Bounds with −1, the least cosine, for −inf."""
    return np.maximum(bound, -1.0)


def _profit(edges: Edges, prices: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
    """What its best column is worth to each row."""
    profits = np.full(edges.rows, -np.inf)
    np.maximum.at(profits, edges.row, edges.cosine - prices[edges.column])
    return profits
