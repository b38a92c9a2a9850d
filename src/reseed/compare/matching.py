"""One-to-one matching of the rows of two matrices by cosine.

Paulo & Belrose (arXiv 2501.16615), section 3: rows are normalised, S = A·Bᵀ, and σ is the
assignment that maximises Σ S[i, σ(i)], found exactly (the Hungarian problem).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

from reseed.config import ConfigError

MAX_LATENTS = 32_768
"""Largest side of a matching: the dense solver needs n·m·8 bytes (8.6 GB here) and cubic time."""


@dataclass(frozen=True, eq=False)
class Matching:
    """The partner of each of n rows among m others.

    Attributes:
        assignment: index of the partner, −1 where a row has none. No partner occurs twice.
        cosines: cosine to the partner, 0 where there is none.
    """

    assignment: Int[np.ndarray, " n"]
    cosines: Float[np.ndarray, " n"]

    @property
    def matched(self) -> Bool[np.ndarray, " n"]:
        return self.assignment >= 0

    def inverse(self, m: int) -> Matching:
        """The same matching seen from the m others."""
        assignment = np.full(m, -1, dtype=np.int64)
        cosines = np.zeros(m)
        rows = np.flatnonzero(self.matched)
        assignment[self.assignment[rows]] = rows
        cosines[self.assignment[rows]] = self.cosines[rows]
        return Matching(assignment, cosines)


def match(a: Float[np.ndarray, "n d_in"], b: Float[np.ndarray, "m d_in"]) -> Matching:
    """The exact assignment of rows of ``a`` to rows of ``b`` with the largest sum of cosines.

    Cosines are signed, in float64, about the origin (no mean is taken off). Rows that are zero or
    not finite stay unmatched; of n ≠ m rows the surplus does. Where rows are equal the assignment
    is one of several that are as good. Memory: n·m·8 bytes.

    Raises:
        ValueError: rows of different length.
        MemoryError: more than `MAX_LATENTS` rows, or than fit the memory that is free.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"rows must have equal length; got {list(a.shape)} and {list(b.shape)}")
    check_memory(len(a), len(b))
    unit_a, unit_b = unit_rows(a), unit_rows(b)
    rows_a, rows_b = (np.flatnonzero(unit.any(axis=1)) for unit in (unit_a, unit_b))
    swapped = len(rows_a) > len(rows_b)
    short, long = (unit_b[rows_b], unit_a[rows_a]) if swapped else (unit_a[rows_a], unit_b[rows_b])
    # The solver copies a matrix that it has to negate or to transpose: it is given neither.
    cost = short @ -long.T
    i, j = linear_sum_assignment(cost)
    cosines = np.clip(-cost[i, j], -1.0, 1.0)
    if swapped:
        i, j = j, i
    assignment = np.full(len(a), -1, dtype=np.int64)
    assignment[rows_a[i]] = rows_b[j]
    matched_cosines = np.zeros(len(a))
    matched_cosines[rows_a[i]] = cosines
    return Matching(assignment, matched_cosines)


def unit_rows(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "n d_in"]:
    """Rows of length 1 in float64; a row that is zero or not finite becomes zero."""
    rows = np.asarray(rows, dtype=np.float64)
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    # The largest entry first, so that the squares of tiny or huge rows stay in range.
    scale = np.abs(rows).max(axis=1, keepdims=True)
    rows = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def check_width(num_latents: int) -> None:
    """Refuse a comparison that could not be matched, before its SAEs are trained.

    Raises:
        ConfigError: more than `MAX_LATENTS`.
    """
    if num_latents > MAX_LATENTS:
        raise ConfigError(
            f"{{key}} must not exceed {MAX_LATENTS:,} in a comparison: the matching needs a dense "
            f"matrix; got {num_latents:,}",
            "sae.num_latents",
        )


def check_memory(n: int, m: int) -> None:
    """Refuse a matching that would be killed instead of ending.

    Raises:
        MemoryError: more than `MAX_LATENTS` rows, or a matrix larger than the free memory.
    """
    needed = n * m * 8
    if max(n, m) > MAX_LATENTS:
        raise MemoryError(
            f"an exact matching of {n:,} with {m:,} latents needs a dense matrix of "
            f"{needed / 1e9:.1f} GB; the largest side allowed is {MAX_LATENTS:,} latents"
        )
    free = free_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"an exact matching of {n:,} with {m:,} latents needs a dense matrix of "
            f"{needed / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory are free"
        )


def free_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
