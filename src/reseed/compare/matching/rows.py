"""Rows of one side of an assignment: directions, norms and groups of identical rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.system.compiling import in_ranges, njit

_BLOCK = 4096  # number of rows that are normalised at a time


@dataclass(frozen=True, eq=False)
class DistinctRows:
    """Distinct rows that have a direction.

    A row that is zero or has an entry that is not finite has no direction and is left out.
    Identical rows are stored once, as copies of one row, so that the assignment does not search
    among equal alternatives.

    Attributes:
        values: the distinct rows as given, float32 or float64.
        inverse_norms: their 1/‖row‖, float64.
        group: index in `values` of each row of the input, −1 for a row without direction.
        key: a number that depends on the rows but not on their order.
    """

    values: Float[np.ndarray, "groups d_in"]
    inverse_norms: Float[np.ndarray, " groups"]
    group: Int[np.ndarray, " rows"]
    key: int

    def __len__(self) -> int:
        return len(self.values)

    @property
    def d_in(self) -> int:
        return self.values.shape[1]

    @cached_property
    def copies(self) -> Int[np.ndarray, " groups"]:
        """Number of input rows per distinct row."""
        return np.bincount(self.group[self.group >= 0], minlength=len(self)).astype(np.int64)

    @property
    def count(self) -> int:
        """Number of input rows that have a direction."""
        return int(self.copies.sum())

    @cached_property
    def rounded(self) -> Rounded:
        """The unit rows in bfloat16, with the rounding errors."""
        values = torch.empty(self.values.shape, dtype=torch.bfloat16)
        errors = np.empty(len(self))
        for start in range(0, len(self), _BLOCK):
            block = slice(start, start + _BLOCK)
            rows = torch.from_numpy(self.values[block])
            unit = rows * torch.from_numpy(self.inverse_norms[block, None])
            values[block] = unit.to(torch.float32).to(torch.bfloat16)
            errors[block] = torch.linalg.vector_norm(unit - values[block].double(), dim=1).numpy()
        return Rounded(values, errors)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Unit rows in bfloat16.

    Attributes:
        values: the rounded rows.
        errors: ‖unit row − rounded row‖.
    """

    values: Float[Tensor, "groups d_in"]
    errors: Float[np.ndarray, " groups"]


def distinct_rows(rows: Float[np.ndarray, "rows d_in"]) -> DistinctRows:
    """Return the distinct rows that have a direction."""
    rows = np.ascontiguousarray(rows)
    if rows.dtype != np.float32:
        rows = scaled_rows(rows)
    keys, norms = np.empty(len(rows), dtype=np.uint64), np.empty(len(rows))
    weights = np.random.default_rng(0).integers(0, 1 << 63, rows.shape[1], dtype=np.uint64) | 1
    in_ranges(
        lambda start, stop: _keys_and_norms(rows, weights, keys, norms, start, stop), len(rows)
    )
    directed = np.flatnonzero((norms > 0) & np.isfinite(norms))
    first = _first_equal(rows, keys, directed)
    kept = np.unique(first)
    group = np.full(len(rows), -1, dtype=np.int64)
    group[directed] = np.searchsorted(kept, first)
    values = rows if len(kept) == len(rows) else rows[kept]
    return DistinctRows(
        values, 1 / norms[kept], group, int(np.sum(keys[directed], dtype=np.uint64))
    )


def scaled_rows(rows: Float[np.ndarray, "rows d_in"]) -> Float[np.ndarray, "rows d_in"]:
    """Return rows in float64, each divided by its largest entry so that all squares stay in range.

    A row that is not finite becomes zero. (Squares of float32 numbers always fit float64.)
    """
    rows = np.asarray(rows, dtype=np.float64)
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    scale = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    return np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)


@njit(nogil=True, cache=True)
def _keys_and_norms(rows, weights, keys, norms, start, stop):  # pragma: no cover
    """Write a hash of each row, equal for equal rows, and its norm (NaN if not finite)."""
    for i in range(start, stop):
        square, key = 0.0, np.uint64(0)
        for k in range(rows.shape[1]):
            x = np.float64(rows[i, k])
            square += x * x
            # Mix the bits (−0 counts as 0; SplitMix, Steele et al. 2014), because the lower half
            # of the bits of small integers is empty.
            bits = np.uint64(np.float64(x + 0.0).view(np.int64)) + weights[k]
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            key += (bits ^ (bits >> np.uint64(31))) * weights[k]
        keys[i] = key
        norms[i] = np.sqrt(square)


def _first_equal(
    rows: Float[np.ndarray, "rows d_in"],
    keys: Int[np.ndarray, " rows"],
    directed: Int[np.ndarray, " some"],
) -> Int[np.ndarray, " some"]:
    """Return the first equal row of each of the rows ``directed``."""
    order = np.argsort(keys[directed], kind="stable")
    ordered, sorted_keys = directed[order], keys[directed][order]
    starts = np.flatnonzero(np.diff(sorted_keys, prepend=~sorted_keys[:1]))
    first_sorted = np.repeat(ordered[starts], np.diff(np.r_[starts, len(ordered)]))
    # Rows with the same key differ with a chance of one in 2⁶⁴, so they are compared.
    for block in np.array_split(np.flatnonzero(first_sorted != ordered), max(1, len(rows) // 4096)):
        same = (rows[ordered[block]] == rows[first_sorted[block]]).all(axis=1)
        first_sorted[block[~same]] = ordered[block[~same]]
    first = np.empty_like(directed)
    first[order] = first_sorted
    return first
