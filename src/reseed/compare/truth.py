"""Is a shared latent a true one? Statistics of labels against sharing, where the truth is known.

In a world whose features are known, each latent has a label (`LABELS`; made by
``reseed.evaluate.truth``). Counted are live latents of every ordered pair of seeds (s, t): those of
s, by label, by whether t shares them, and by how often they fire. Estimates are of the counts
summed over pairs; intervals leave one seed out.

Adjusted estimates compare latents of the same firing decile only (Mantel & Haenszel 1959; the risk
difference of Greenland & Robins 1985): frequent latents are both more often shared and more often
true, which alone would make sharing look like truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from reseed.compare.statistics import Interval, leave_one_out_interval
from reseed.compare.strata import DECILES

if TYPE_CHECKING:
    from reseed.compare.config import ComparisonConfig
    from reseed.compare.dictionary import Dictionary
    from reseed.compare.stability import PairSide

LABELS = ("neither", "composite", "atom", "group")
"""The labels, as ``truth_label`` counts them from 0."""
PREFIX = "truth_"
"""Of the names of estimates and of the metrics of runs."""
LABEL_COLUMN = "truth"
"""The column of ``latents.parquet`` with the labels in words."""

Table = Int[np.ndarray, "strata labels 2"]
"""Numbers of latents by firing decile, label and whether shared."""


class _Undefined(Exception):
    """An estimate that the counts do not define; the message says why."""


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
    """What sharing says of the truth, and what the truth says of sharing.

    - ``truth_atom_given_shared``, ``truth_atom_given_orphan``: P(atom | shared with the other
      seed) and P(atom | not shared); ``truth_difference``: the first minus the second;
      ``truth_difference_adjusted``: over firing deciles.
    - ``truth_likelihood_ratio``: P(shared | atom) / P(shared | no atom), and
      ``truth_likelihood_ratio_adjusted``.
    - ``truth_shared_given_atom``, ``…_composite``, ``…_group``, ``…_neither``: P(shared | label).

    Fractions have intervals on the logit scale, differences on the linear, ratios on the log one.
    One that the counts do not define (no live latent is shared) is NaN, with the reason.

    Args:
        labels, firing, live: of each of n ≥ 2 seeds, a value per latent.
        shared: for each ordered pair (s, t), which latents of s seed t shares.
    """
    counts = _counts(labels, firing, live, shared)
    n = len(labels)
    if not counts.any():
        nothing = Interval(float("nan"), None, None, None, n, "no latent is live")
        return {PREFIX + name: nothing for name in STATISTICS}
    without = [np.delete(np.arange(n), s) for s in range(n)] if n > 2 else []
    everything = counts.sum((0, 1))  # deciles stay those of all seeds when one is left out
    reduced = [counts[np.ix_(kept, kept)].sum((0, 1)) for kept in without]
    found = {}
    for name, (estimate, scale) in STATISTICS.items():
        try:
            value = estimate(everything)
        except _Undefined as reason:
            found[PREFIX + name] = Interval(float("nan"), None, None, None, n, str(reason))
            continue
        rest = [_or_nan(estimate, table) for table in reduced] or [value] * n
        found[PREFIX + name] = leave_one_out_interval(value, rest, confidence, scale)
    return found


def _counts(
    labels: Sequence[Int[np.ndarray, " num_latents"]],
    firing: Sequence[Int[np.ndarray, " num_latents"]],
    live: Sequence[Bool[np.ndarray, " num_latents"]],
    shared: Mapping[tuple[int, int], Bool[np.ndarray, " num_latents"]],
) -> Int[np.ndarray, "n n strata labels 2"]:
    """The table of every ordered pair; the diagonal is 0.

    Deciles are of the firing counts of all seeds' live latents together.
    """
    n, shape = len(labels), (DECILES, len(LABELS), 2)
    pooled = np.concatenate([f[kept] for f, kept in zip(firing, live, strict=True)])
    edges = np.quantile(pooled, np.arange(1, DECILES) / DECILES) if pooled.size else []
    counts = np.zeros((n, n, *shape), dtype=np.int64)
    for (s, t), flags in shared.items():
        kept = live[s]
        stratum = np.searchsorted(edges, firing[s][kept], side="right")
        cell = np.ravel_multi_index((stratum, labels[s][kept], flags[kept].astype(np.int64)), shape)
        counts[s, t] = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
    return counts


def _or_nan(estimate: Callable[[Table], float], table: Table) -> float:
    try:
        return estimate(table)
    except _Undefined:
        return float("nan")


class _Margins(NamedTuple):
    """A value per decile."""

    shared_atoms: Int[np.ndarray, " strata"]
    shared: Int[np.ndarray, " strata"]
    atoms: Int[np.ndarray, " strata"]
    all: Int[np.ndarray, " strata"]

    @classmethod
    def of(cls, table: Table) -> _Margins:
        atoms, shared = table[:, LABELS.index("atom")], table[:, :, 1]
        return cls(atoms[:, 1], shared.sum(1), atoms.sum(1), table.sum((1, 2)))


def _divided(part: Any, whole: Any, otherwise: str) -> float:
    """The ratio of two sums, or the reason why there is none."""
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
    """Σ (a·n₀ − c·n₁)/T / Σ n₁·n₀/T, of n₁ shared a atoms, of n₀ orphans c atoms, T = n₁ + n₀."""
    _difference(table)  # its reasons come first
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
    """Σ a·m₀/T / Σ b·m₁/T, of m₁ atoms a shared, of m₀ others b shared, T = m₁ + m₀."""
    _likelihood_ratio(table)  # its reasons come first
    m = _Margins.of(table)
    total = np.maximum(m.all, 1)
    return _divided(
        m.shared_atoms * (m.all - m.atoms) / total,
        (m.shared - m.shared_atoms) * m.atoms / total,
        "no firing decile has both atoms and shared latents that are none",
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


def cell_truth(
    trained: Sequence[Dictionary],
    sides: Mapping[tuple[int, int], PairSide],
    settings: ComparisonConfig,
) -> dict[str, Interval]:
    """`truth_estimates` of the runs of a cell; empty unless all of them have labels.

    A latent counts as shared if its partner is live too, as in ``shared_fraction_live``.

    Args:
        sides: for each ordered pair (s, t), what s shares with t.
    """
    labels = _labels(trained)
    if labels is None:
        return {}
    live = [x.live(settings.live_at_least) for x in trained]
    shared = {
        (s, t): side.shared & (side.partner_encoder >= 0) & live[t][side.partner_encoder]
        for (s, t), side in sides.items()
    }
    return truth_estimates(labels, [x.firing for x in trained], live, shared, settings.confidence)


def label_column(table: pa.Table, trained: Sequence[Dictionary]) -> pa.Table:
    """The rows of all runs with their labels in words as the column ``truth``, where all have."""
    labels = _labels(trained)
    if labels is None:
        return table
    return table.append_column(LABEL_COLUMN, pa.array(np.array(LABELS)[np.concatenate(labels)]))


def _labels(trained: Sequence[Dictionary]) -> list[Int[np.ndarray, " num_latents"]] | None:
    labels = [x.truth for x in trained if x.truth is not None]
    return labels if len(labels) == len(trained) else None


def truth_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run's ``truth`` entry, named ``truth_…``; null (undefined) as NaN."""
    there = metrics.get("truth") or {}
    return {
        PREFIX + name: float("nan") if value is None else value for name, value in there.items()
    }


def checked_labels(
    labels: Int[np.ndarray, " num_latents"], num_latents: int, run: str
) -> Int[np.ndarray, " num_latents"]:
    """The labels as int8.

    Raises:
        ValueError: not one of `LABELS` for every latent.
    """
    values = np.asarray(labels)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{run}: `truth` must be integers; got {values.dtype}")
    if values.shape != (num_latents,):
        raise ValueError(
            f"{run}: `truth` must have one value per latent [{num_latents}]; got "
            f"{list(values.shape)}"
        )
    if values.min() < 0 or values.max() >= len(LABELS):
        raise ValueError(
            f"{run}: `truth` must lie between 0 and {len(LABELS) - 1} ({', '.join(LABELS)}); it "
            f"runs from {values.min()} to {values.max()}"
        )
    return np.ascontiguousarray(values, dtype=np.int8)
