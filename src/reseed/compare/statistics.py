"""Intervals over seeds.

A mean over pairs of seeds is a U-statistic of degree 2: pairs with a common seed depend on each
other. The spread of the pairs therefore underestimates the uncertainty, and so does a bootstrap
over few seeds. Leaving one seed out at a time (the jackknife; Arvesen 1969) does not. Runs that
differ in two random axes, such as the seed and the data order, are left out by one axis after the
other (`crossed_interval`).

No function returns an interval of width zero. A spread of 0 over few seeds is a coincidence of
rounded numbers, not an error of 0; the result then has no ends, and the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan, sqrt
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import special

from reseed.compare.registry import Interval

MIN_SEEDS = 3
"""Minimum number of seeds for leaving one out: two seeds make only one pair."""
Scale = Literal["linear", "logit", "log"]
_ROUNDING = 1e-12
"""Values whose relative spread is at most this differ by rounding alone."""
NO_SPREAD = "no interval, because a spread of 0 is no estimate of the error"
"""Reason for estimates whose values are all equal."""


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
    found = leave_one_out_interval(
        mean, means_without_each(values), confidence, "logit" if logit else "linear"
    )
    if found.standard_error is None and is_constant(pairs):
        return replace(found, reason=f"all pairs are equal: {NO_SPREAD}")
    return found


def means_without_each(values: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """Return, for each of n ≥ 3 seeds, the mean over the pairs without it.

    Args:
        values: value of each pair; symmetric, the diagonal is not read.
    """
    n = len(values)
    off = np.where(np.eye(n, dtype=bool), 0.0, values)
    return (values[np.triu_indices(n, 1)].sum() - off.sum(axis=1)) / ((n - 1) * (n - 2) / 2)


def leave_one_out_interval(
    mean: float,
    without: Sequence[float] | Float[np.ndarray, " n"],
    confidence: float = 0.95,
    scale: Scale = "linear",
) -> Interval:
    """Return the interval of an estimate from its values without each of the n seeds.

    SE² = (n−1)/n · Σ_s (θ₋s − θ̄)², interval θ ± t(n−1)·SE. On the logit scale SE is converted by
    the delta method; on the log scale (for ratios, from 0 to infinity) θ is the logarithm
    throughout, and the standard error is converted back. An estimate at an end of the scale has no
    interval.
    """
    return crossed_interval(mean, {"seed": without}, confidence, scale)


def crossed_interval(
    mean: float,
    without: Mapping[str, Sequence[float] | Float[np.ndarray, " n"]],
    confidence: float = 0.95,
    scale: Scale = "linear",
) -> Interval:
    """Return the interval of an estimate from runs that cross several random axes.

    Every axis has a variance V = (n−1)/n · Σ (θ₋s − θ̄)² of its own, from the values of the estimate
    without each of its n levels. The squared standard error is their sum, with Satterthwaite's
    degrees of freedom (ΣV)² / Σ V²/(n−1). What two levels of different axes do only together is
    counted in both variances: the interval is then too wide rather than too narrow. (Subtracting
    it, as Cameron, Gelbach & Miller 2011 do for many clusters, covers too rarely with 3 × 3 runs.)
    With one axis this is the jackknife of `leave_one_out_interval`.

    Args:
        without: axis → value of the estimate without each level of the axis.
    """
    values = {axis: np.asarray(each, dtype=np.float64) for axis, each in without.items()}
    n = min(map(len, values.values()))

    def none(reason: str) -> Interval:
        return Interval(mean, None, None, None, n, reason)

    if isnan(mean):
        return none("undefined")
    few = next((axis for axis, each in values.items() if len(each) < MIN_SEEDS), None)
    if few is not None:
        over = f" over {' and '.join(values)}" if len(values) > 1 else ""
        return none(f"fewer than {MIN_SEEDS} {_plural(few)}: no interval{over}")
    lacking = next((axis for axis, each in values.items() if np.isnan(each).any()), None)
    if lacking is not None:
        return none(f"undefined without one of the {_plural(lacking)}")
    if scale == "log":
        if mean == 0 or min(each.min() for each in values.values()) == 0:
            which = "0" if mean == 0 else "0 without one of the seeds"
            return none(f"{which}: no interval on the log scale")
        values = {axis: np.log(each) for axis, each in values.items()}
    if scale == "logit" and mean in (0.0, 1.0):
        reason = f"every pair is {mean:g}: no interval on the logit scale"
        return replace(none(reason), standard_error=0.0)
    if all(map(is_constant, values.values())):
        words = " and ".join(map(_plural, values))
        return none(f"the same without any one of the {words}: {NO_SPREAD}")
    variances, freedoms = zip(*map(_jackknife, values.values()), strict=True)
    freedom = _satterthwaite(variances, freedoms) if len(values) > 1 else None
    found = Interval(mean, None, None, sqrt(sum(variances)), n, "", freedom)
    return _bounded(found, confidence, scale)


def _jackknife(without: Float[np.ndarray, " n"]) -> tuple[float, int]:
    """Return the variance of an estimate from its values without each level, and its degrees of
    freedom."""
    n = len(without)
    return (n - 1) / n * float(np.square(without - without.mean()).sum()), n - 1


def _satterthwaite(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """Return the degrees of freedom of a sum of independent variances (Satterthwaite 1946)."""
    shares = np.asarray(variances) / sum(variances)
    return 1 / float((np.square(shares) / freedoms).sum())


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
    if is_constant(array):
        return Interval(mean, None, None, None, n, f"all runs are equal: {NO_SPREAD}")
    error = float(array.std(ddof=1)) / sqrt(n)
    return _bounded(Interval(mean, None, None, error, n), confidence)


def welch_difference(a: Interval, b: Interval, confidence: float = 0.95) -> Interval:
    """Return the interval of ``a.mean − b.mean`` for cells with independent seeds (Welch 1947).

    There is none if the error of either cell is not known (`unknown_error`).
    """
    mean, n = a.mean - b.mean, min(a.n, b.n)
    reason = unknown_error(a, b)
    if reason:
        return Interval(mean, None, None, None, n, reason)
    assert a.standard_error
    assert b.standard_error
    variances = [a.standard_error**2, b.standard_error**2]
    freedom = _satterthwaite(variances, [a.degrees_of_freedom, b.degrees_of_freedom])
    return _bounded(Interval(mean, None, None, sqrt(sum(variances)), n, "", freedom), confidence)


def unknown_error(a: Interval, b: Interval) -> str:
    """Return why the difference of two cells has no interval; empty if both errors are known.

    A cell in which every pair is 0, or every pair is 1, has a standard error of 0. Three such pairs
    are a coincidence of rounded numbers, so that the error of the other cell is not that of the
    difference.
    """
    reasons = ["" if e.standard_error else _no_error(e) for e in (a, b)]
    if reasons[0] == reasons[1]:
        return reasons[0]
    sides = zip(("first", "second"), reasons, strict=True)
    return "; ".join(f"in the {side} cell, {reason}" for side, reason in sides if reason)


def _no_error(estimate: Interval) -> str:
    if estimate.standard_error == 0:
        return f"every pair is {estimate.mean:g}: {NO_SPREAD}"
    return estimate.reason or "no standard error"


def holm_intervals(differences: Sequence[Interval], confidence: float = 0.95) -> list[Interval]:
    """Widen the intervals of m differences so that those that exclude 0 are Holm's rejections.

    Holm (1979): the smallest p-value is compared with α/m, the next with α/(m−1), and so on, until
    one is not rejected; neither are those after it. The interval of each difference is that at the
    level of its step, 1 − α/(m−i+1), and after the first that is not rejected, at the level of that
    step. An interval excludes 0 if and only if Holm rejects the difference, so that the probability
    of any false rejection is at most α, whatever the dependence between the differences. Each
    interval is at least as wide as that of the difference alone. Together they need not cover all
    differences with probability 1 − α; Bonferroni's would, all at the level 1 − α/m.

    Args:
        differences: intervals on the linear scale, with the t distribution of their degrees of
            freedom. Those without an interval stay as they are and do not count in m.
    """
    found = list(differences)
    tested = [i for i, one in enumerate(found) if one.low is not None]
    left = len(tested)
    for i in sorted(tested, key=lambda i: p_value(differences[i])):
        found[i] = one = _bounded(differences[i], 1 - (1 - confidence) / left)
        assert one.low is not None
        assert one.high is not None
        if one.low > 0 or one.high < 0:
            left -= 1
    return found


def p_value(difference: Interval) -> float:
    """Return the two-sided p-value of no difference: of t = mean/SE with its degrees of freedom."""
    assert difference.standard_error
    t = abs(difference.mean) / difference.standard_error
    return 2 * float(special.stdtr(difference.degrees_of_freedom, -t))


def at_level(estimate: Interval, confidence: float, scale: Scale = "linear") -> Interval:
    """Return an estimate with the ends of its interval at another level, from its standard error.
    Without an interval it stays as it is.

    Args:
        scale: the scale of the interval, "linear" or "logit".
    """
    return estimate if estimate.low is None else _bounded(estimate, confidence, scale)


def _bounded(estimate: Interval, confidence: float, scale: Scale = "linear") -> Interval:
    """Return an estimate with the ends of its t interval, from its standard error.

    Args:
        estimate: its standard error is on the scale of the mean, on the log scale that of the
            logarithm.
    """
    mean, error = estimate.mean, estimate.standard_error
    assert error is not None
    reach = _t(confidence, estimate.degrees_of_freedom) * error
    low, high = mean - reach, mean + reach
    if scale == "log":
        low, high = np.exp([np.log(mean) - reach, np.log(mean) + reach])
        error = mean * error
    elif scale == "logit":
        centre, slope = special.logit(mean), 1 / (mean * (1 - mean))
        low, high = special.expit([centre - reach * slope, centre + reach * slope])
    if not low < high:
        return replace(estimate, low=None, high=None, standard_error=None, reason=NO_SPREAD)
    return replace(estimate, low=float(low), high=float(high), standard_error=error)


def with_width(estimate: Interval) -> Interval:
    """Return an estimate that is read from a file, without its ends if they are equal: older
    versions wrote intervals of width 0."""
    if estimate.low is None or estimate.high is None:
        return estimate
    if not is_constant(np.array([estimate.low, estimate.high])):
        return estimate
    reason = f"all values are equal: {NO_SPREAD}"
    return replace(estimate, low=None, high=None, standard_error=None, reason=reason)


def is_constant(values: Float[np.ndarray, " n"]) -> bool:
    """Return whether values differ by rounding at most."""
    # The second bound is for differences of fractions, whose rounding is not relative to them.
    spread = float(np.ptp(values))
    return spread <= max(_ROUNDING * float(np.abs(values).max()), 1e-15)


def _plural(axis: str) -> str:
    return "seeds" if axis == "seed" else f"values of {axis}"


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
