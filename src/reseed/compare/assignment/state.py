"""A partial assignment with its prices, used by the shortest paths and the pricing.

Rows and columns are distinct and may have several copies; a column has one slot per copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from reseed.compare.assignment.edges import Edges
from reseed.compiling import njit


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
    def without(self) -> Int[np.ndarray, " some"]:
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
        """Set row prices to their best profit; rows that are not at a best column leave it."""
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
