"""The exact matching of the rows of two matrices by cosine: `match` and its result.

`reseed.compare.matching` describes the algorithm. This file checks the input, lets `solve` assign
the distinct rows, and translates the result to the rows as given, with its ties. `MatchingCache` is
a folder of finished matchings, so that none is computed twice. A matching depends only on the rows
of both sides, so its file is named by their digest. It is reused by a comparison with another
threshold, by two comparisons that have a pair in common, and after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from reseed.compare.matching.candidates import CANDIDATES
from reseed.compare.matching.rows import DistinctRows, distinct_rows
from reseed.compare.matching.solve import Optimum, solve
from reseed.config import digest
from reseed.system.integrity import is_damaged, write_checked

VERSION = 1
"""Version of the algorithm; increase it when the same rows could get another result."""
TIE = 1e-9
"""A pair is tight if its cosine is within this distance of u_i + v_j."""


@dataclass(frozen=True, eq=False)
class Matching:
    """Partners of n rows among m others, with a proof that no other assignment is better.

    **Proof.** u_i + v_j ≥ S_ij for all pairs (to rounding, about 1e-12), and the prices of the side
    with more rows are not negative; so no one-to-one assignment has a larger sum than Σu + Σv. The
    sum of this assignment is smaller by `gap`. Rows without direction are left out.

    Attributes:
        assignment: index of the partner, −1 where a row has none. No partner occurs twice.
        cosines: cosine to the partner (its absolute value, if that was matched), 0 where there is
            none.
        row_prices, column_prices: u [n] and v [m]; NaN for rows without direction.
        gap: Σu + Σv − Σ cosines, the maximum by which another assignment could be better.
        ambiguous: number of matched rows to which an equally good assignment (to 1e-9) gives
            another partner; the choice among them is arbitrary. Only listed pairs are counted: a
            lower bound where a row has more equally good partners than `candidates`.
    """

    assignment: Int[np.ndarray, " n"]
    cosines: Float[np.ndarray, " n"]
    row_prices: Float[np.ndarray, " n"]
    column_prices: Float[np.ndarray, " m"]
    gap: float
    ambiguous: int

    @property
    def matched(self) -> Bool[np.ndarray, " n"]:
        return self.assignment >= 0

    def inverse(self) -> Matching:
        """Return the same matching with rows and columns exchanged."""
        m = len(self.column_prices)
        assignment = np.full(m, -1, dtype=np.int64)
        cosines = np.zeros(m)
        rows = np.flatnonzero(self.matched)
        assignment[self.assignment[rows]] = rows
        cosines[self.assignment[rows]] = self.cosines[rows]
        return replace(
            self,
            assignment=assignment,
            cosines=cosines,
            row_prices=self.column_prices,
            column_prices=self.row_prices,
        )


class Matcher(Protocol):
    """Interface of `match`, which `MatchingCache` implements too."""

    def __call__(
        self,
        a: Float[np.ndarray, "n d_in"],
        b: Float[np.ndarray, "m d_in"],
        *,
        absolute: bool = ...,
    ) -> Matching: ...


def match(
    a: Float[np.ndarray, "n d_in"] | Tensor,
    b: Float[np.ndarray, "m d_in"] | Tensor,
    *,
    absolute: bool = False,
    device: torch.device | str = "cpu",
    candidates: int = CANDIDATES,
    progress: Callable[[str], None] = lambda message: None,
) -> Matching:
    """Find the exact assignment of rows of ``a`` to rows of ``b`` with the largest sum of cosines.

    Cosines are computed in float64 from the rows as given (no mean is subtracted). Rows that are
    zero or not finite stay unmatched, and so does the surplus of the larger side. Every other row
    is matched, whatever its cosine. The result does not depend on the order of the sides, unless
    there are ties (`Matching.ambiguous`) and both sides consist of the same rows.

    No n × m matrix is held: memory is that of the rows in bfloat16 and of about 80 candidates per
    row (131,072 × 768 twice: 2.4 GiB with the rows themselves). The time is that of one to two
    passes of products in bfloat16, 2·n·m·d_in operations each (`benchmarks/matching.py`).

    Args:
        absolute: match by |cosine| instead.
        device: device that computes the products; everything else runs on the CPU.
        candidates: initial number of pairs that are listed per row. It does not change the result.
        progress: called periodically with a short description of the current step.

    Raises:
        ValueError: rows of different length, or numbers that are not real.
        MemoryError: the matching needs more memory than is free.
    """
    rows_a, rows_b = _array(a), _array(b)
    if rows_a.ndim != 2 or rows_b.ndim != 2 or rows_a.shape[1] != rows_b.shape[1]:
        shapes = f"{list(rows_a.shape)} and {list(rows_b.shape)}"
        raise ValueError(f"rows must have equal length; got {shapes}")
    if candidates < 1:
        raise ValueError(f"`candidates` must be at least 1; got {candidates}")
    check_memory(len(rows_a), len(rows_b), rows_a.shape[1], candidates)
    left, right = distinct_rows(rows_a), distinct_rows(rows_b)
    if not left.count or not right.count:
        return _nothing(left, right)
    swapped = (left.count, left.key) > (right.count, right.key)
    short, long = (right, left) if swapped else (left, right)
    optimum = solve(
        short, long, absolute=absolute, count=candidates, device=device, progress=progress
    )
    found = _matching(short, long, optimum)
    return found.inverse() if swapped else found


def _array(rows: np.ndarray | Tensor) -> np.ndarray:
    """Return rows as float32 or float64."""
    if isinstance(rows, Tensor):
        rows = rows.detach().cpu()
        rows = (
            rows.numpy() if rows.dtype in (torch.float32, torch.float64) else rows.float().numpy()
        )
    rows = np.asarray(rows)
    if rows.dtype.kind not in "fiu":
        raise ValueError(f"rows must be real numbers; got {rows.dtype}")
    return rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float64)


def _nothing(left: DistinctRows, right: DistinctRows) -> Matching:
    """Return an empty matching, for a side without any row that has a direction."""
    n = len(left.group)
    rows, columns = (np.where(side.group < 0, np.nan, 0.0) for side in (left, right))
    return Matching(np.full(n, -1, dtype=np.int64), np.zeros(n), rows, columns, 0.0, 0)


def _matching(short: DistinctRows, long: DistinctRows, optimum: Optimum) -> Matching:
    """Translate from distinct rows and their copies to the rows as given."""
    state, edges = optimum.state, optimum.edges
    # Sort input rows by distinct row: this gives the copies of a row and the slots of a column.
    given_row, given_column = (
        np.argsort(np.where(side.group < 0, len(side.group), side.group), kind="stable")[
            : side.count
        ]
        for side in (short, long)
    )
    assignment = np.full(len(short.group), -1, dtype=np.int64)
    assignment[given_row] = given_column[state.slot_of]
    cosines = np.zeros(len(short.group))
    cosines[given_row] = edges.cosine_of(state.row_of, state.partner)
    # With surplus columns no price is negative; rounding may have left −1e-17.
    column_price = state.column_price if short.count == long.count else state.column_price.clip(0)
    prices = [
        np.where(side.group < 0, np.nan, price[np.maximum(side.group, 0)])
        for side, price in ((short, state.row_price), (long, column_price))
    ]
    gap = np.nansum(prices[0]) + np.nansum(prices[1]) - cosines.sum()
    return Matching(
        assignment,
        np.clip(cosines, -1.0, 1.0),
        *prices,
        gap=float(gap),
        ambiguous=int(exchangeable(optimum).sum()),
    )


def exchangeable(optimum: Optimum) -> Bool[np.ndarray, " row_copies"]:
    """Return the copies of rows that an equally good assignment gives another column or copy.

    The graph has an arrow from a row to every tight column, and from a column to the rows matched
    to it. A row is returned if it is on a longer cycle than the one to its own column and back. One
    more node stands for free slots, and for columns that may stay unused because their price is 0.
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


def needed_memory(n: int, m: int, d_in: int, candidates: int = CANDIDATES) -> int:
    """Return the bytes of a matching besides its input: rows in bfloat16, lists and graph."""
    listed = min(candidates, max(n, m))
    return (n + m) * (2 * d_in + 2 * listed * (4 + 2) + listed * (4 + 8 + 4 + 16) + 200)


def check_memory(n: int, m: int, d_in: int, candidates: int = CANDIDATES) -> None:
    """Refuse a matching that would run out of memory.

    Raises:
        MemoryError: the matching needs more memory than is free.
    """
    needed, free = needed_memory(n, m, d_in, candidates), free_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"a matching of {n:,} with {m:,} rows of {d_in:,} needs about {needed / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB of memory are free"
        )


def free_memory() -> int | None:
    """Return the bytes available without swapping, or None if the system does not report them."""
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


_BLOCK = 4096  # number of rows that are hashed at a time


class MatchingCache:
    """Store of matchings in one folder, called like `match`.

    Each file, ``<digest>.safetensors``, is written atomically. If a file cannot be read, its
    matching is computed again. Deleting files costs only time.

    Args:
        folder: created when the first matching is written.
        least: minimum product of the numbers of rows; smaller matchings are not stored, because
            computing them is faster than reading them.
        device, progress: passed to `match`.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        least: int = 1 << 22,
        device: str = "cpu",
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.folder = Path(folder)
        self.least, self.device, self.progress = least, device, progress

    def __call__(
        self,
        a: Float[np.ndarray, "n d_in"],
        b: Float[np.ndarray, "m d_in"],
        *,
        absolute: bool = False,
    ) -> Matching:
        """Return the matching from the folder, or compute it with `match`."""
        if len(a) * len(b) < self.least:
            return match(a, b, absolute=absolute, device=self.device, progress=self.progress)
        one, other = _fingerprint(a), _fingerprint(b)
        # (A, B) and (B, A) share one file.
        turned = one > other
        name = digest([*sorted((one, other)), absolute, VERSION], length=32)
        path = self.folder / f"{name}.safetensors"
        found = None if is_damaged(path) else _read(path)
        if found is not None:
            return found.inverse() if turned else found
        made = match(a, b, absolute=absolute, device=self.device, progress=self.progress)
        write_checked(path, lambda file: _write(made.inverse() if turned else made, file))
        return made


def _fingerprint(rows: Float[np.ndarray, "n d_in"]) -> str:
    found = hashlib.sha256(f"{rows.dtype} {rows.shape}".encode())
    for start in range(0, len(rows), _BLOCK):
        found.update(np.ascontiguousarray(rows[start : start + _BLOCK]).data)
    return found.hexdigest()


def _write(matching: Matching, path: Path) -> None:
    arrays = {
        "assignment": matching.assignment,
        "cosines": matching.cosines,
        "row_prices": matching.row_prices,
        "column_prices": matching.column_prices,
    }
    numbers = {"gap": matching.gap, "ambiguous": matching.ambiguous}
    save_file(arrays, path, metadata={"matching": json.dumps(numbers)})


def _read(path: Path) -> Matching | None:
    """Read the matching in a file; None if the file is missing or cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return Matching(**arrays, **json.loads(file.metadata()["matching"]))
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None
