"""Shared fractions by firing: weighted, of kinds of latents, by stratum, at equal firing rates.

The rarest latents are mostly orphans and the most frequent mostly shared (Paulo & Belrose, arXiv
2501.16615), so the shared fractions of two cells may differ because their latents fire differently.
Direct standardisation (as for age-adjusted rates in epidemiology) averages a cell's fractions at
each density with weights that are equal for all cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from reseed.compare.dictionary import Dictionary
from reseed.compare.pair import Pair, PairSide, RunInCell, Subset, divided
from reseed.compare.registry import Interval, measure
from reseed.compare.statistics import leave_one_out_interval

Kind = Literal["decile", "density"]
DENSE = 0.1
"""A latent that fires on more than this fraction of the tokens is dense."""
DECILES = 10
"""Number of quantile bins of firing, wherever latents of equal firing are compared."""
DENSITY_EDGES = 10.0 ** np.arange(-6, -0.9, 0.5)
"""Half decades from 1e-6 to 0.1. A density at an edge belongs to the lower bin, so that the last
bin holds the dense latents (> 0.1)."""


@measure(
    "shared_fraction_by_firing",
    scale="fraction",
    heading="shared by firing",
    table="firing",
    help="the strict rule with each latent weighted by how often it fires",
    advice="The part of the SAE's activity that is shared. A few dense latents may carry it.",
)
def shared_fraction_by_firing(pair: Pair) -> float:
    return _weighted(pair, pair.first.firing, pair.second.firing)


@measure(
    "shared_fraction_by_variance",
    needs=("weights", "variance"),
    scale="fraction",
    heading="shared by variance",
    table="firing",
    help="the same, weighted by the variance of the latent's contribution to reconstructions",
    advice="As `shared_fraction_by_firing`.",
)
def shared_fraction_by_variance(pair: Pair) -> float:
    a, b = pair.first.variance, pair.second.variance
    assert a is not None
    assert b is not None
    return _weighted(pair, a, b)


def _weighted(pair: Pair, *weights: np.ndarray) -> float:
    flags = pair.a.shared, pair.b.shared
    total = sum(float(w.sum()) for w in weights)
    part = sum(float(w[f].sum()) for f, w in zip(flags, weights, strict=True))
    return divided(min(part, total), total)  # rounding could make the fraction exceed 1


def _dense(pair: Pair) -> Subset:
    return Subset(pair.first.density > DENSE, pair.second.density > DENSE)


@measure(
    "shared_fraction_dense",
    scale="fraction",
    heading="shared dense",
    table="firing",
    help="the strict rule over latents that fire on more than a tenth of the tokens",
    advice="Dense latents alone, because they are few and count much in the weighted fractions.",
)
def shared_fraction_dense(pair: Pair) -> float:
    return _dense(pair).of_sides(pair.a.shared, pair.b.shared)


@measure(
    "shared_fraction_sparse",
    scale="fraction",
    heading="shared other firing",
    table="firing",
    help="the strict rule over the other latents that fired",
)
def shared_fraction_sparse(pair: Pair) -> float:
    dense = _dense(pair)
    sparse = Subset((pair.first.firing > 0) & ~dense.a, (pair.second.firing > 0) & ~dense.b)
    return sparse.of_sides(pair.a.shared, pair.b.shared)


@measure("dense_{}", family="ab", needs=(), table="counts", help="dense latents of each run")
def dense(pair: Pair, side: str) -> int:
    return int((pair.side(side).dictionary.density > DENSE).sum())


@measure(
    "shared_fraction_{}",
    family=("duplicate", "antipodal"),
    scale="fraction",
    heading="shared {}",
    table="firing",
    help="the strict rule over latents that their own dictionary has twice, with the same or the "
    "opposite sign",
    formula="latents i with another j of the same run with c_enc·c_dec ≥ τ², both cosines positive "
    "(duplicate) or negative (antipodal)",
    advice="A one-to-one matching takes any of several duplicates: their cosines are good, their "
    "index is chance. `duplicate_fraction`, `antipodal_fraction`: the fraction of such latents.",
)
def shared_fraction_of_repeated(pair: Pair, kind: str) -> float:
    repeated = Subset(*(getattr(x, kind) for x in pair.duplicates))
    return repeated.of_sides(pair.a.shared, pair.b.shared)


@measure(
    "duplicate_fraction",
    level="run",
    scale="number",
    table="firing",
    help="fraction of the latents of a run that its dictionary has twice",
)
def duplicate_fraction(run: RunInCell) -> float:
    return float(run.duplicates.duplicate.mean())


@measure(
    "antipodal_fraction",
    level="run",
    scale="number",
    table="firing",
    help="fraction of the latents of a run that its dictionary has with the opposite sign, too",
)
def antipodal_fraction(run: RunInCell) -> float:
    return float(run.duplicates.antipodal.mean())


def decile_edges(firing: Int[np.ndarray, " n"]) -> Float[np.ndarray, " edges"]:
    """Return the ends of the deciles of firing counts, `DECILES` + 1 values; 0 without counts."""
    levels = np.arange(DECILES + 1) / DECILES
    return np.quantile(firing, levels) if firing.size else np.zeros(len(levels))


def decile_of(
    firing: Int[np.ndarray, " n"], edges: Float[np.ndarray, " edges"]
) -> Int[np.ndarray, " n"]:
    """Return the decile of each count, from 0; equal counts are in the same decile."""
    return np.searchsorted(edges[1:-1], firing, side="right")


class Stratum(NamedTuple):
    """A stratum: latents with a firing count (or density) from ``low`` to ``high``."""

    name: str
    low: float
    high: float


def strata_table(
    trained: Sequence[Dictionary],
    sides: Mapping[tuple[int, int], PairSide],
    live_at_least: int,
) -> pd.DataFrame:
    """Count the latents and the shared latents of each pair of runs and stratum.

    Columns: ``a``, ``b`` (run ids), ``kind``, ``stratum``, ``name``, ``low``, ``high``, ``latents``
    and ``shared`` (by the strict rule, whatever the partner's stratum), summed over both sides.

    - kind ``decile``: latents that never fired; that fired less often than ``live_at_least``; and
      ten deciles of the firing counts of the live latents of all runs together (equal counts stay
      together). ``low`` and ``high`` are firing counts.
    - kind ``density``: latents that never fired, and bins that are equal for every cell
      (`DENSITY_EDGES`). ``low`` and ``high`` are firings per token.
    """
    frames = []
    for kind, (names, of_run) in {
        "decile": _deciles(trained, live_at_least),
        "density": _densities(trained),
    }.items():
        for s, t in sorted(pair for pair in sides if pair[0] < pair[1]):
            latents, shared = (np.zeros(len(names), dtype=np.int64) for _ in range(2))
            for x, y in ((s, t), (t, s)):
                latents += np.bincount(of_run[x], minlength=len(names))
                shared += np.bincount(of_run[x][sides[x, y].shared], minlength=len(names))
            frame = pd.DataFrame(names, columns=list(Stratum._fields))
            frame.insert(0, "stratum", np.arange(len(names)))
            frame.insert(0, "kind", kind)
            frame.insert(0, "b", trained[t].id)
            frame.insert(0, "a", trained[s].id)
            frames.append(frame.assign(latents=latents, shared=shared))
    if not frames:  # no two runs have comparable rows
        named = ("a", "b", "kind", "stratum", *Stratum._fields, "latents", "shared")
        return pd.DataFrame(columns=list(named))
    return pd.concat(frames, ignore_index=True)


def _deciles(
    trained: Sequence[Dictionary], live_at_least: int
) -> tuple[list[Stratum], list[Int[np.ndarray, " num_latents"]]]:
    pooled = np.concatenate([x.firing[x.live(live_at_least)] for x in trained])
    edges = decile_edges(pooled)
    names = [Stratum("never fired", 0, 0), Stratum("not live", 1, live_at_least - 1)]
    names += [
        Stratum(f"decile {i + 1}", float(edges[i]), float(edges[i + 1])) for i in range(DECILES)
    ]
    of_run = [
        np.where(
            x.live(live_at_least),
            2 + decile_of(x.firing, edges),
            (x.firing > 0).astype(np.int64),
        )
        for x in trained
    ]
    return names, of_run


def _densities(
    trained: Sequence[Dictionary],
) -> tuple[list[Stratum], list[Int[np.ndarray, " num_latents"]]]:
    edges = [0.0, *DENSITY_EDGES.tolist(), 1.0]
    names = [Stratum("never fired", 0, 0)]
    names += [Stratum(f"{low:.2g} to {high:.2g}", low, high) for low, high in pairwise(edges)]
    of_run = [
        np.where(x.firing > 0, 1 + np.searchsorted(DENSITY_EDGES, x.density, side="left"), 0)
        for x in trained
    ]
    return names, of_run


def shared_by_stratum(table: pd.DataFrame, kind: Kind, confidence: float = 0.95) -> pd.DataFrame:
    """Return the shared fraction of each stratum of a cell, a row per stratum.

    Columns: ``stratum``, ``name``, ``low``, ``high``, ``latents`` (mean number in a run),
    ``shared_fraction``, ``shared_low``, ``shared_high``. Counts are summed over pairs. Intervals
    leave one seed out; missing intervals (fewer than 3 seeds, a fraction of 0 or 1) are NaN.
    """
    counts = _Counts.of(table, kind)
    columns = ["stratum", "name", "low", "high"]
    rows = table.loc[table["kind"] == kind, columns].iloc[: counts.latents.shape[1]]
    found = [_interval(counts, np.eye(len(rows))[i], confidence) for i in range(len(rows))]
    pairs = counts.latents.shape[0]
    return rows.assign(
        latents=counts.latents.sum(axis=0) / (2 * pairs),
        shared_fraction=[x.mean for x in found],
        shared_low=[np.nan if x.low is None else x.low for x in found],
        shared_high=[np.nan if x.high is None else x.high for x in found],
    ).reset_index(drop=True)


@dataclass(frozen=True)
class Standardised:
    """The shared fraction of a cell at the reference distribution of densities.

    Attributes:
        estimate: the fraction with its interval over seeds; the reference is treated as fixed.
        coverage: the fraction of the reference in bins where every cell has latents. The rest is
            left out for all cells.
    """

    estimate: Interval
    coverage: float


def standardised(tables: Sequence[pd.DataFrame], confidence: float = 0.95) -> list[Standardised]:
    """Return the shared fractions of several cells at one distribution of firing densities.

    Latents that never fired are left out. The reference is the mean of the cells' distributions
    over the bins of `DENSITY_EDGES`.

    Args:
        tables: `strata_table` of each cell.
    """
    counts = [_Counts.of(table, "density") for table in tables]
    totals = np.array([c.latents.sum(axis=0) for c in counts], dtype=np.float64)
    totals[:, 0] = 0
    sums = totals.sum(axis=1, keepdims=True)
    shares = np.divide(totals, sums, out=np.zeros_like(totals), where=sums > 0)
    reference = shares.mean(axis=0)
    common = (totals > 0).all(axis=0)
    kept = float(reference[common].sum())
    weights = np.where(common, reference, 0.0)
    return [Standardised(_interval(c, weights, confidence), kept) for c in counts]


@dataclass(frozen=True, eq=False)
class _Counts:
    """Counts of latents and of shared latents by pair and stratum, and the runs of each pair."""

    runs: list[str]
    pairs: list[tuple[str, str]]
    latents: Int[np.ndarray, "pairs strata"]
    shared: Int[np.ndarray, "pairs strata"]

    @classmethod
    def of(cls, table: pd.DataFrame, kind: Kind) -> _Counts:
        part = {name: table.loc[table["kind"] == kind, name].to_numpy() for name in table.columns}
        pairs = list(dict.fromkeys(zip(part["a"], part["b"], strict=True)))
        runs = list(dict.fromkeys(run for pair in pairs for run in pair))
        latents, shared = (part[name].reshape(len(pairs), -1) for name in ("latents", "shared"))
        return cls(runs, pairs, latents, shared)

    def fraction(self, weights: Float[np.ndarray, " strata"], without: str | None = None) -> float:
        """Return the weighted mean of the strata's fractions, leaving out pairs of one run."""
        kept = np.array([without not in pair for pair in self.pairs])
        used = weights > 0
        latents = self.latents[kept].sum(axis=0)[used]
        if not used.any() or not latents.all():
            return float("nan")
        fractions = self.shared[kept].sum(axis=0)[used] / latents
        mean = fractions @ weights[used] / weights[used].sum()
        # Rounding must not make the mean of ones greater than 1.
        return float(np.clip(mean, fractions.min(), fractions.max()))


def _interval(
    counts: _Counts, weights: Float[np.ndarray, " strata"], confidence: float
) -> Interval:
    mean = counts.fraction(weights)
    n = len(counts.runs)
    if np.isnan(mean):
        return Interval(mean, None, None, None, n, "no latents")
    # Two seeds make one pair; without one of them no pair is left.
    without = [counts.fraction(weights, run) for run in counts.runs] if n > 2 else [mean] * n
    return leave_one_out_interval(mean, without, confidence, "logit")
