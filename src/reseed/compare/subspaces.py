"""Comparison of the subspaces that groups of latents span; no latent needs a partner.

A group of latents that describes a subspace without preferred directions can be rotated in every
seed: no latent has a partner, yet together they span the same subspace. Groups are the orphan
latents (live, shared with no other run), the shared latents (live, shared with at least one other
run) and the dense latents.

A group with more latents than dimensions spans the whole space, so its span is uninformative. The
second moments of unit decoder rows, M = WᵀW/F, are compared instead. *Overlap* is ⟨M_A, M_B⟩ /
(‖M_A‖·‖M_B‖): 1 for equal moments, 0 for orthogonal ones. It is high whenever both are close to a
multiple of the identity; compare it with the overlap of equally many random live latents. *Angles*
compares the spans of the leading eigenvectors that hold 90% of each moment: the mean squared cosine
of the principal angles, about k/D for random spans, where k is the larger number of directions.

Each group of each run needs one decomposition of a D × D matrix: in float64 up to `EXACT_WIDTH`, in
float32 above, which halves the memory. Above that width, a group of fewer than D latents is
decomposed through the smaller Gram matrix of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int

from reseed.compare.alignment import Alignment
from reseed.compare.dictionary import Dictionary, incompatible, unit_rows
from reseed.compare.pair import CellRuns, Pair, RunInCell
from reseed.compare.registry import Column, measure, measures
from reseed.compare.strata import DENSE
from reseed.config import digest

GROUPS = ("orphan", "shared", "dense")
"""Sets of latents whose spans are compared."""
TRACE_FRACTION = 0.9
"""Fraction of a moment's trace that its leading directions hold."""
EXACT_WIDTH = 1024
"""Maximum width ``d_in`` that is computed in float64."""
_MEASURES = (
    "subspace_overlap",
    "null_subspace_overlap",
    "subspace_angles",
    "null_subspace_angles",
)
_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Measures of the subspaces that groups of latents span.

    Attributes:
        pairs: columns of the table of pairs, a value per pair (s, t), s < t, in order:
            ``subspace_overlap_<group>``, ``null_subspace_overlap_<group>``,
            ``subspace_angles_<group>``, ``null_subspace_angles_<group>``. NaN if a group is empty
            or the runs have no common space.
        runs: columns of the table of runs: ``directions_<group>``, the number of eigenvectors that
            hold 90% of the group's moment.
    """

    pairs: dict[str, list[float]]
    runs: dict[str, list[float]]


def subspaces(
    trained: Sequence[Dictionary],
    shared_with: Sequence[Int[np.ndarray, " num_latents"]],
    live_at_least: int,
    seed: int = 0,
    maps: Mapping[tuple[int, int], Alignment] | None = None,
) -> Subspaces:
    """Compare the groups of every pair of runs, holding the moments of one group at a time.

    Args:
        maps: pair of runs → the map into the basis of the second, where their bases differ.
    """
    pairs: dict[str, list[float]] = {}
    runs: dict[str, list[float]] = {}
    which = list(combinations(range(len(trained)), 2))
    for group in GROUPS:
        spans, nulls = [], []
        for x, m in zip(trained, shared_with, strict=True):
            mask = _group_masks(x, m, live_at_least)[group]
            spans.append(_Span.of(x.decoder[mask]))
            live = np.flatnonzero(x.live(live_at_least) & ~x.zero)
            # Seed by the run's id, so that the order of the runs does not matter.
            rng = np.random.default_rng([seed, int(digest(x.id), 16)])
            drawn = rng.choice(live, mask.sum(), replace=False)
            nulls.append(moment(x.decoder[np.sort(drawn)]))
        runs[f"directions_{group}"] = [span.directions for span in spans]
        measured = [
            _compared((spans[s], nulls[s]), (spans[t], nulls[t]), (maps or {}).get((s, t)))
            if not incompatible(trained[s], trained[t])
            else (float("nan"),) * len(_MEASURES)
            for s, t in which
        ]
        columns = zip(_MEASURES, zip(*measured, strict=True), strict=True)
        pairs |= {f"{name}_{group}": list(values) for name, values in columns}
    return Subspaces(pairs, runs)


def _of_cell(cell: CellRuns) -> Subspaces:
    settings = cell.settings
    drawn = settings.live_at_least, settings.null_seed
    return subspaces(cell.trained, cell.shared_with, *drawn, cell.alignments)


@measures(
    Column("subspace_overlap_{}", "overlap of the second moments of the unit decoder rows of a "
           "group / of as many random live latents", "cosine", "overlap, {}",
           null="null_subspace_overlap_{}", formula="⟨M_A, M_B⟩/(‖M_A‖·‖M_B‖), M = WᵀW/F",
           advice="High already if both are nearly a multiple of the identity: compare it with its "
           "null."),
    Column("null_subspace_overlap_{}", "the overlap of as many random live latents", "mean"),
    Column("subspace_angles_{}", "mean squared cosine of the principal angles between the spans of "
           "the leading directions that hold 90% of the second moment / of random spans", "cosine",
           "angles, {}", null="null_subspace_angles_{}",
           advice="Random spans of k directions have k/D. With k near D it is near 1 whatever the "
           "data."),
    Column("null_subspace_angles_{}", "the angles of random spans", "mean"),
    family=GROUPS,
    needs="cell",
    table="subspaces",
)  # fmt: skip
def subspace_columns(pair: Pair, group: str) -> tuple[float, ...]:
    assert pair.cell is not None
    found = pair.cell.once(_of_cell).pairs
    which = list(combinations(range(len(pair.cell.trained)), 2)).index(pair.place)
    return tuple(found[f"{name}_{group}"][which] for name in _MEASURES)


@measure(
    "directions_{}",
    level="run",
    family=GROUPS,
    scale="count",
    heading="directions, {}",
    table="subspaces",
    help="number of these directions",
)
def directions(run: RunInCell, group: str) -> float:
    return run.cell.once(_of_cell).runs[f"directions_{group}"][run.index]


def _compared(
    first: tuple[_Span, np.ndarray], second: tuple[_Span, np.ndarray], found: Alignment | None
) -> tuple[float, ...]:
    """Return the values of `_MEASURES` for two groups, each with the moment of random latents."""
    (a, null_a), (b, null_b) = first, second
    by_chance = _by_chance(a, b)
    if found is not None:
        a = _Span(found.of_covariance(a.moment), found.rotation.T @ a.basis)
        null_a = found.of_covariance(null_a)
    return (
        overlap(a.moment, b.moment),
        overlap(null_a, null_b),
        mean_squared_principal_cosine(a.basis, b.basis),
        by_chance,
    )


def _by_chance(a: _Span, b: _Span) -> float:
    """Return the `mean_squared_principal_cosine` expected of two random spans of these sizes."""
    fewer, more = sorted((a.directions, b.directions))
    return more / len(a.moment) if fewer else float("nan")


def _group_masks(
    x: Dictionary, shared_with: Int[np.ndarray, " num_latents"], live_at_least: int
) -> Mapping[str, Bool[np.ndarray, " num_latents"]]:
    live = x.live(live_at_least) & ~x.zero
    return {
        "orphan": live & (shared_with == 0),
        "shared": live & (shared_with > 0),
        "dense": live & (x.density > DENSE),
    }


def moment(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "d_in d_in"]:
    """Return WᵀW/F of unit rows; zero if there are no rows.

    Products and their sum are in float64 up to `EXACT_WIDTH`, else in float32.
    """
    width = rows.shape[1]
    dtype = np.float64 if width <= EXACT_WIDTH else np.float32
    total = np.zeros((width, width), dtype=dtype)
    for start in range(0, len(rows), _BLOCK_ROWS):
        unit = unit_rows(rows[start : start + _BLOCK_ROWS]).astype(dtype, copy=False)
        total += unit.T @ unit
    return total / dtype(max(len(rows), 1))


def overlap(a: Float[np.ndarray, "d_in d_in"], b: Float[np.ndarray, "d_in d_in"]) -> float:
    """Return ⟨A, B⟩ / (‖A‖·‖B‖); NaN if either is zero."""
    if a.dtype == np.float64:
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(np.vdot(a, b)) / norms if norms else float("nan")
    norms = (_inner(a, a) * _inner(b, b)) ** 0.5
    return _inner(a, b) / norms if norms else float("nan")


def _inner(a: Float[np.ndarray, "d_in d_in"], b: Float[np.ndarray, "d_in d_in"]) -> float:
    """Return ⟨A, B⟩ of float32 matrices: products within rows in float32, their sum in float64."""
    return float(np.einsum("ij,ij->i", a, b).sum(dtype=np.float64))


def mean_squared_principal_cosine(
    a: Float[np.ndarray, "d_in j"], b: Float[np.ndarray, "d_in k"]
) -> float:
    """Return the mean squared cosine of the principal angles between spans of orthonormal columns.

    The squares sum to ‖aᵀb‖² (Björck & Golub 1973), so the angles themselves are not needed.
    """
    number = min(a.shape[1], b.shape[1])
    return float(np.square(a.T @ b).sum()) / number if number else float("nan")


@dataclass(frozen=True, eq=False)
class _Span:
    """A moment and the leading eigenvectors that hold `TRACE_FRACTION` of its trace."""

    moment: Float[np.ndarray, "d_in d_in"]
    basis: Float[np.ndarray, "d_in directions"]

    @classmethod
    def of(cls, rows: Float[np.ndarray, "n d_in"]) -> _Span:
        """Decompose the moment of ``rows``."""
        matrix = moment(rows)
        if rows.shape[1] > EXACT_WIDTH and len(rows) < rows.shape[1]:
            return cls(matrix, _directions_from_gram(rows))
        values, vectors = np.linalg.eigh(matrix)
        return cls(matrix, vectors[:, ::-1][:, : _number(values[::-1])])

    @property
    def directions(self) -> int:
        return self.basis.shape[1]


def _number(values: Float[np.ndarray, " n"]) -> int:
    """Return how many descending eigenvalues hold `TRACE_FRACTION` of their sum; 0 if it is 0."""
    sums = np.cumsum(np.maximum(values, 0.0), dtype=np.float64)
    wanted = TRACE_FRACTION * sums[-1] * (1 - 1e-12)
    return int(np.searchsorted(sums, wanted) + 1) if sums[-1] else 0


def _directions_from_gram(
    rows: Float[np.ndarray, "n d_in"],
) -> Float[np.ndarray, "d_in directions"]:
    """Return the leading eigenvectors of WᵀW, for n < d_in unit rows W, from those of WWᵀ: an
    eigenvector u of WWᵀ gives Wᵀu/√λ."""
    if not len(rows):
        return np.zeros((rows.shape[1], 0), dtype=np.float32)
    unit = unit_rows(rows)
    values, vectors = np.linalg.eigh(unit @ unit.T)
    number = _number(values[::-1])
    leading = slice(None, -number - 1, -1)
    return (unit.T @ (vectors[:, leading] / np.sqrt(values[leading]))).astype(np.float32)
