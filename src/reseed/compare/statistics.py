"""Intervals over seeds.

A mean over pairs of seeds is a U-statistic of degree 2: pairs with a common seed depend on each
other. The spread of the pairs therefore underestimates the uncertainty, and so does a bootstrap
over few seeds. Leaving one seed out at a time (the jackknife; Arvesen 1969) does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, sqrt
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import special

from reseed.compare.registry import Interval

MIN_SEEDS = 3
"""Minimum number of seeds for leaving one out: two seeds make only one pair."""


def seed_interval(
    values: Float[np.ndarray, "n n"], confidence: float = 0.95, *, logit: bool = True
) -> Interval:
    """Return the mean over pairs of seeds with its leave-one-seed-out interval.

    SE² = (n−1)/n · Σ_s (θ₋s − θ̄)², where θ₋s is the mean over the pairs without seed s, and the
    interval is θ ± t(n−1)·SE. With ``logit`` (for fractions) the interval is computed on the logit
    scale, with SE converted by the delta method, so that its ends stay within 0 and 1; an estimate
    of exactly 0 or 1 has no interval there (`Interval.reason`).

    Args:
        values: value of each pair; symmetric, the diagonal is not read.

    Raises:
        ValueError: the values are not a symmetric matrix, or a fraction is out of range.
    """
    values = _symmetric(values)
    n = len(values)
    pairs = values[np.triu_indices(n, 1)]
    mean = float(pairs.mean())
    if isnan(mean):
        return Interval(mean, None, None, None, n, "undefined in at least one pair")
    if logit and (pairs.min() < 0 or pairs.max() > 1):
        raise ValueError(f"fractions must lie between 0 and 1; got {pairs.min()} to {pairs.max()}")
    if n < MIN_SEEDS:
        return Interval(mean, None, None, None, n, f"fewer than {MIN_SEEDS} seeds: no interval")
    off = np.where(np.eye(n, dtype=bool), 0.0, values)
    without = (pairs.sum() - off.sum(axis=1)) / ((n - 1) * (n - 2) / 2)
    return leave_one_out_interval(mean, without, confidence, "logit" if logit else "linear")


def leave_one_out_interval(
    mean: float,
    without: Sequence[float] | Float[np.ndarray, " n"],
    confidence: float = 0.95,
    scale: Literal["linear", "logit", "log"] = "linear",
) -> Interval:
    """Return the interval of an estimate from its values without each of the n seeds.

    SE² = (n−1)/n · Σ_s (θ₋s − θ̄)², interval θ ± t(n−1)·SE. On the logit scale SE is converted by
    the delta method; on the log scale (for ratios, from 0 to infinity) θ is the logarithm
    throughout, and the standard error is converted back. An estimate at an end of the scale has no
    interval.
    """
    values, n = np.asarray(without, dtype=np.float64), len(without)
    if isnan(mean) or n < MIN_SEEDS:
        reason = "undefined" if isnan(mean) else f"fewer than {MIN_SEEDS} seeds: no interval"
        return Interval(mean, None, None, None, n, reason)
    if np.isnan(values).any():
        return Interval(mean, None, None, None, n, "undefined without one of the seeds")
    if scale == "log":
        if mean == 0 or values.min() == 0:
            which = "0" if mean == 0 else "0 without one of the seeds"
            return Interval(mean, None, None, None, n, f"{which}: no interval on the log scale")
        values = np.log(values)
    error = sqrt((n - 1) / n * np.square(values - values.mean()).sum())
    reach = _t(confidence, n - 1) * error
    if scale == "log":
        low, high = np.exp([np.log(mean) - reach, np.log(mean) + reach])
        return Interval(mean, float(low), float(high), mean * error, n)
    if scale == "linear":
        return Interval(mean, mean - reach, mean + reach, error, n)
    if mean in (0.0, 1.0):
        reason = f"every pair is {mean:g}: no interval on the logit scale"
        return Interval(mean, None, None, error, n, reason)
    centre, slope = special.logit(mean), 1 / (mean * (1 - mean))
    low, high = special.expit([centre - reach * slope, centre + reach * slope])
    return Interval(mean, float(low), float(high), error, n)


def run_interval(
    values: Sequence[float] | Float[np.ndarray, " n"], confidence: float = 0.95
) -> Interval:
    """Return the mean of one value per run (FVU, L0) with the ordinary t interval."""
    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    if isnan(mean):
        return Interval(mean, None, None, None, n, "unknown for at least one run")
    if n < MIN_SEEDS:
        return Interval(mean, None, None, None, n, f"fewer than {MIN_SEEDS} seeds: no interval")
    error = float(array.std(ddof=1)) / sqrt(n)
    reach = _t(confidence, n - 1) * error
    return Interval(mean, mean - reach, mean + reach, error, n)


def welch_difference(a: Interval, b: Interval, confidence: float = 0.95) -> Interval:
    """Return the interval of ``a.mean − b.mean`` for cells with independent seeds (Welch 1947)."""
    mean, n = a.mean - b.mean, min(a.n, b.n)
    if a.standard_error is None or b.standard_error is None:
        return Interval(mean, None, None, None, n, a.reason or b.reason)
    variances = np.square([a.standard_error, b.standard_error])
    error = sqrt(variances.sum())
    if error == 0:
        return Interval(mean, mean, mean, 0.0, n)
    freedom = variances.sum() ** 2 / (np.square(variances) / [a.n - 1, b.n - 1]).sum()
    reach = _t(confidence, freedom) * error
    return Interval(mean, mean - reach, mean + reach, error, n)


def known_mean(values: Float[np.ndarray, " n"]) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _t(confidence: float, freedom: float) -> float:
    return float(special.stdtrit(freedom, 0.5 + confidence / 2))


def _symmetric(values: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) < 2:
        raise ValueError(f"pair values must be [n, n] with n ≥ 2; got {list(values.shape)}")
    off = ~np.eye(len(values), dtype=bool)
    if not np.allclose(values[off], values.T[off], rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ValueError("pair values must be symmetric: (s, t) and (t, s) are the same pair")
    return values
