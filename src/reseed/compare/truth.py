"""Association of sharing with truth, for worlds whose true features are known.

In such a world each latent has a label (`LABELS`; made by ``reseed.evaluate.true_features``). For
every ordered pair of seeds (s, t), the live latents of s are counted by label, by sharing with t,
and by firing decile. Estimates use the counts summed over pairs; intervals leave one seed out.

Adjusted estimates compare only latents of the same firing decile (Mantel & Haenszel 1959; the risk
difference of Greenland & Robins 1985). Frequent latents may be both more often shared and more
often true features, which alone would associate sharing with truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from reseed.compare.dictionary import LABELS, TRUTH_PREFIX, Dictionary
from reseed.compare.pair import CellRuns
from reseed.compare.registry import Column, Interval, measures
from reseed.compare.statistics import leave_one_out_interval
from reseed.compare.strata import DECILES, decile_edges, decile_of

LABEL_COLUMN = "truth"
"""The column of ``latents.parquet`` with the names of the labels."""

Table = Int[np.ndarray, "strata labels 2"]
"""Numbers of latents by firing decile, label and sharing (0 no, 1 yes)."""


class _Undefined(Exception):
    """The counts do not define an estimate; the message says why."""


class _Statistic(NamedTuple):
    estimate: Callable[[Table], float]
    scale: Literal["linear", "logit", "log"]


def truth_estimates(
    labels: Sequence[Int[np.ndarray, " num_latents"]],
    firing: Sequence[Int[np.ndarray, " num_latents"]],
    live: Sequence[Bool[np.ndarray, " num_latents"]],
    shared: Mapping[tuple[int, int], Bool[np.ndarray, " num_latents"]],
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Estimate P(label | shared) and P(shared | label), with differences and ratios.

    - ``truth_atom_given_shared``, ``truth_atom_given_orphan``: P(atom | shared with the other
      seed) and P(atom | not shared); ``truth_difference``: the first minus the second;
      ``truth_difference_adjusted``: the difference adjusted for firing deciles.
    - ``truth_likelihood_ratio``: P(shared | atom) / P(shared | no atom), and
      ``truth_likelihood_ratio_adjusted``.
    - ``truth_shared_given_atom``, ``…_composite``, ``…_group``, ``…_neither``: P(shared | label).

    Intervals are on the logit scale for fractions, linear for differences, log for ratios. An
    estimate that the counts do not define (no live latent is shared) is NaN, with the reason.

    Args:
        labels, firing, live: for each of n ≥ 2 seeds, a value per latent.
        shared: ordered pair (s, t) → true for the latents of s that t shares.
    """
    counts = _counts(labels, firing, live, shared)
    n = len(labels)
    if not counts.any():
        nothing = Interval(float("nan"), None, None, None, n, "no latent is live")
        return {TRUTH_PREFIX + name: nothing for name in STATISTICS}
    without = [np.delete(np.arange(n), s) for s in range(n)] if n > 2 else []
    everything = counts.sum((0, 1))  # leaving a seed out does not change the deciles
    reduced = [counts[np.ix_(kept, kept)].sum((0, 1)) for kept in without]
    found = {}
    for name, (estimate, scale) in STATISTICS.items():
        try:
            value = estimate(everything)
        except _Undefined as reason:
            found[TRUTH_PREFIX + name] = Interval(float("nan"), None, None, None, n, str(reason))
            continue
        rest = [_or_nan(estimate, table) for table in reduced] or [value] * n
        found[TRUTH_PREFIX + name] = leave_one_out_interval(value, rest, confidence, scale)
    return found


def _counts(
    labels: Sequence[Int[np.ndarray, " num_latents"]],
    firing: Sequence[Int[np.ndarray, " num_latents"]],
    live: Sequence[Bool[np.ndarray, " num_latents"]],
    shared: Mapping[tuple[int, int], Bool[np.ndarray, " num_latents"]],
) -> Int[np.ndarray, "n n strata labels 2"]:
    """Return the table of every ordered pair; the diagonal is 0.

    Deciles are those of the firing counts of all seeds' live latents together.
    """
    n, shape = len(labels), (DECILES, len(LABELS), 2)
    pooled = np.concatenate([f[kept] for f, kept in zip(firing, live, strict=True)])
    edges = decile_edges(pooled)
    counts = np.zeros((n, n, *shape), dtype=np.int64)
    for (s, t), flags in shared.items():
        kept = live[s]
        stratum = decile_of(firing[s][kept], edges)
        cell = np.ravel_multi_index((stratum, labels[s][kept], flags[kept].astype(np.int64)), shape)
        counts[s, t] = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
    return counts


def _or_nan(estimate: Callable[[Table], float], table: Table) -> float:
    try:
        return estimate(table)
    except _Undefined:
        return float("nan")


class _Margins(NamedTuple):
    """Numbers of latents per firing decile."""

    shared_atoms: Int[np.ndarray, " strata"]
    shared: Int[np.ndarray, " strata"]
    atoms: Int[np.ndarray, " strata"]
    all: Int[np.ndarray, " strata"]

    @classmethod
    def of(cls, table: Table) -> _Margins:
        atoms, shared = table[:, LABELS.index("atom")], table[:, :, 1]
        return cls(atoms[:, 1], shared.sum(1), atoms.sum(1), table.sum((1, 2)))


def _divided(part: Any, whole: Any, otherwise: str) -> float:
    """Return the ratio of two sums; raise _Undefined with ``otherwise`` if the second is 0."""
    if not np.sum(whole):
        raise _Undefined(otherwise)
    return float(np.sum(part) / np.sum(whole))


def _atom_given_shared(table: Table) -> float:
    m = _Margins.of(table)
    return _divided(m.shared_atoms, m.shared, "no live latent is shared")


def _atom_given_orphan(table: Table) -> float:
    m = _Margins.of(table)
    return _divided(m.atoms - m.shared_atoms, m.all - m.shared, "every live latent is shared")


def _difference(table: Table) -> float:
    return _atom_given_shared(table) - _atom_given_orphan(table)


def _difference_adjusted(table: Table) -> float:
    """Return Σ (a·n₀ − c·n₁)/T / Σ n₁·n₀/T.

    Per decile: a atoms among n₁ shared latents, c atoms among n₀ orphans, T = n₁ + n₀.
    """
    _difference(table)  # raises the more basic reasons first
    m = _Margins.of(table)
    total, orphans = np.maximum(m.all, 1), m.all - m.shared
    orphan_atoms = m.atoms - m.shared_atoms
    return _divided(
        (m.shared_atoms * orphans - orphan_atoms * m.shared) / total,
        m.shared * orphans / total,
        "no firing decile has both shared latents and others",
    )


def _likelihood_ratio(table: Table) -> float:
    m = _Margins.of(table)
    given_atom = _divided(m.shared_atoms, m.atoms, "no live latent is an atom")
    given_other = _divided(
        m.shared - m.shared_atoms, m.all - m.atoms, "every live latent is an atom"
    )
    return _divided(given_atom, given_other, _ONLY_ATOMS if given_atom else _NONE_SHARED)


def _likelihood_ratio_adjusted(table: Table) -> float:
    """Return Σ a·m₀/T / Σ b·m₁/T.

    Per decile: a shared among m₁ atoms, b shared among m₀ other latents, T = m₁ + m₀.
    """
    _likelihood_ratio(table)  # raises the more basic reasons first
    m = _Margins.of(table)
    total = np.maximum(m.all, 1)
    return _divided(
        m.shared_atoms * (m.all - m.atoms) / total,
        (m.shared - m.shared_atoms) * m.atoms / total,
        "no firing decile has both atoms and shared latents that are not atoms",
    )


def _shared_given(label: str) -> Callable[[Table], float]:
    def estimate(table: Table) -> float:
        of_label = table[:, LABELS.index(label)]
        return _divided(of_label[:, 1], of_label, f"no live latent is labelled {label}")

    return estimate


_NONE_SHARED = "no live latent is shared"
_ONLY_ATOMS = "only atoms are shared: the likelihood ratio is infinite"
STATISTICS: dict[str, _Statistic] = {
    "atom_given_shared": _Statistic(_atom_given_shared, "logit"),
    "atom_given_orphan": _Statistic(_atom_given_orphan, "logit"),
    "difference": _Statistic(_difference, "linear"),
    "difference_adjusted": _Statistic(_difference_adjusted, "linear"),
    "likelihood_ratio": _Statistic(_likelihood_ratio, "log"),
    "likelihood_ratio_adjusted": _Statistic(_likelihood_ratio_adjusted, "log"),
    **{f"shared_given_{word}": _Statistic(_shared_given(word), "logit") for word in LABELS},
}


_SHARED_GIVEN = "fraction of the live latents with the label {} that another run shares"
_ADJUSTED = "the same adjusted for firing deciles"


@measures(
    Column("truth_atom_given_shared", "fraction of atoms among live latents that another run "
           "shares", formula="P(atom | shared)"),
    Column("truth_atom_given_orphan", "fraction of atoms among the other live latents",
           formula="P(atom | not shared)"),
    Column("truth_difference", "the first minus the second"),
    Column("truth_difference_adjusted", _ADJUSTED, source="Greenland & Robins 1985",
           advice="Frequent latents may be both more often shared and more often true features, "
           "which alone would associate sharing with truth."),
    Column("truth_likelihood_ratio", "how much sharing is evidence of an atom",
           formula="P(shared | atom)/P(shared | no atom)",
           advice="1 means that sharing says nothing about truth."),
    Column("truth_likelihood_ratio_adjusted", _ADJUSTED, source="Mantel & Haenszel 1959"),
    *(Column(f"truth_shared_given_{label}", _SHARED_GIVEN.format(label)) for label in LABELS),
    level="cell",
    needs=("weights", "truth"),
    table="truth",
)  # fmt: skip
def truth(cell: CellRuns) -> tuple[Interval, ...]:
    """Return `truth_estimates` of a cell's runs.

    A latent counts as shared only if its partner is live too, as in ``shared_fraction_live``.
    """
    labels = _labels(cell.trained)
    assert labels is not None
    live = [run.live for run in cell.runs]
    shared = {
        (s, t): side.shared & (side.partner_encoder >= 0) & live[t][side.partner_encoder]
        for (s, t), side in cell.sides.items()
    }
    firing = [x.firing for x in cell.trained]
    found = truth_estimates(labels, firing, live, shared, cell.settings.confidence)
    return tuple(found[TRUTH_PREFIX + name] for name in STATISTICS)


def label_column(table: pa.Table, trained: Sequence[Dictionary]) -> pa.Table:
    """Append the names of the labels as the column ``truth``, if all runs have labels."""
    labels = _labels(trained)
    if labels is None:
        return table
    return table.append_column(LABEL_COLUMN, pa.array(np.array(LABELS)[np.concatenate(labels)]))


def _labels(trained: Sequence[Dictionary]) -> list[Int[np.ndarray, " num_latents"]] | None:
    labels = [x.truth for x in trained if x.truth is not None]
    return labels if len(labels) == len(trained) else None
