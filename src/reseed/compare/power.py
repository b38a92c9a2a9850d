"""Power of Welch's test between two cells, the seeds that it needs, and curves over budgets.

The power is exact for normal means, up to the error of the quadrature. With the true standard
errors σ_a and σ_b and the chi-squared variables of both sample variances, the test's degrees of
freedom depend only on the ratio of the two variables (Beta), and the test statistic also on their
sum (χ²). Ratio and sum are independent, so that two one-dimensional quadratures suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import hypot, sqrt

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from reseed.compare.registry import Interval
from reseed.compare.statistics import MIN_SEEDS

_NODES = 32
"""Nodes of each quadrature: the smallest visible difference is then right to 1e-4 of itself."""
_BENDS = np.linspace(-1, 0, 21)
"""Powers λ of the tokens in the curves over budgets; see `predict_budget`."""
_LIKELY = 0.3
"""Least likelihood of λ, relative to the largest, whose interval is part of a prediction's."""
MOST_SEEDS = 100_000
"""The largest number of seeds that is looked for."""


def welch_power(
    difference: float, n_a: int, n_b: int, se_a: float, se_b: float, confidence: float = 0.95
) -> float:
    """Return the probability that Welch's two-sided test finds a true difference of two means.

    Args:
        n_a, n_b: seeds of each cell, at least 2.
        se_a, se_b: true standard errors of the two means, on the scale of the difference; one of
            them may be 0.
    """
    return _power_of(n_a, n_b, se_a, se_b, confidence)(difference)


def _power_of(
    n_a: int, n_b: int, se_a: float, se_b: float, confidence: float
) -> Callable[[float], float]:
    """Return the function from a true difference to the power; see `welch_power`."""
    f_a, f_b = n_a - 1, n_b - 1
    nodes, weights = special.roots_legendre(_NODES)
    quantiles = (1 + nodes) / 2
    ratio = special.betaincinv(f_a / 2, f_b / 2, quantiles)
    total = 2 * special.gammaincinv((f_a + f_b) / 2, quantiles)
    # Estimated squared standard errors, divided by the sum of the two chi-squared variables.
    a, b = se_a**2 * ratio / f_a, se_b**2 * (1 - ratio) / f_b
    freedom = (a + b) ** 2 / (a**2 / f_a + b**2 / f_b)
    error = hypot(se_a, se_b)
    critical = special.stdtrit(freedom, 0.5 + confidence / 2)
    needed = critical * np.sqrt(np.multiply.outer(total, a + b)) / error

    def power(difference: float) -> float:
        found = special.ndtr(difference / error - needed) + special.ndtr(
            -difference / error - needed
        )
        return float(weights @ found @ weights) / 4

    return power


def visible_difference(
    n_a: int, n_b: int, se_a: float, se_b: float, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Return the smallest true difference of two cells that Welch's test finds with this power.

    Args:
        n_a, n_b: seeds of each cell, at least 2.
        se_a, se_b: true standard errors of the two means; the result has their scale.
        power: above 1 − confidence, below 1.
    """
    found = _power_of(n_a, n_b, se_a, se_b, confidence)
    unit = hypot(se_a, se_b)
    high = 4.0
    while found(high * unit) < power:
        high *= 2
    root = optimize.root_scalar(lambda x: found(x * unit) - power, bracket=(0.0, high)).root
    return unit * root


def error_ratios(n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of an estimated standard error as a multiple of the true one: with this
    probability s/σ of n seeds lies within (χ² with n − 1 degrees of freedom)."""
    ends = special.chdtri(n - 1, [0.5 + confidence / 2, 0.5 - confidence / 2])
    low, high = np.sqrt(ends / (n - 1))
    return float(low), float(high)


def seeds_needed(
    spread: float, difference: float, power: float = 0.8, confidence: float = 0.95
) -> int | None:
    """Return the seeds that each of two cells needs for Welch's test to find a true difference.

    The standard error of n seeds is taken to be ``spread``/√n. For a mean over pairs of seeds, a
    U-statistic, this holds to leading order in n.

    Args:
        spread: standard deviation per seed, the same in both cells.

    Returns:
        at least `MIN_SEEDS`, below which there is no test; None if `MOST_SEEDS` do not suffice.
    """

    def suffices(n: int) -> bool:
        return _equal_power(n, difference / spread, confidence) >= power

    low, high = MIN_SEEDS - 1, MIN_SEEDS
    while not suffices(high):
        if high == MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


@lru_cache(maxsize=4_096)
def _equal_power(n: int, difference: float, confidence: float) -> float:
    return welch_power(difference, n, n, 1 / sqrt(n), 1 / sqrt(n), confidence)


def predict_budget(
    tokens: Sequence[float], estimates: Sequence[Interval], at: float, confidence: float = 0.95
) -> Interval:
    """Predict the mean that a cell with another budget would have.

    A curve logit S = a + b·(t^λ − 1)/λ over tokens t is fitted by least squares for each λ of
    `_BENDS`: from a straight line in log t (λ = 0, sharing grows with every doubling) to one in 1/t
    (λ = −1, sharing levels off). Every budget has the same weight. (Weights from standard errors of
    3 seeds follow the errors of these estimates: the interval then covers .89 instead of .95.)
    The prediction of each λ has a t distribution with Satterthwaite's degrees of freedom, whose
    variance is the sum of

    - the sampling variance of each budget, from its own standard error by the delta method;
    - the sampling variance of the predicted mean, which is taken to be their mean;
    - with three budgets or more, the variance of the budgets about the curve beyond their sampling
      errors (method of moments, at least 0), for the fitted budgets and for the predicted one.

    The interval is the union of the intervals of all λ whose likelihood, given the residuals and
    the sampling errors, is at least `_LIKELY` of the largest, and of the central interval of their
    mixture with the likelihood as weight. Two budgets fit every λ equally well: the union is then
    over all λ. (The mixture alone covers .50 to .90 of what is measured if λ is at an end and the
    errors are small.) The mean is the median of the mixture. The interval holds for curves of this
    family. Cells of different budgets are taken to be independent; a common effect of the seed
    (seed_scope=shared) makes the interval too wide.

    Args:
        tokens: budgets of the fitted cells, at least two of them distinct.
        estimates: their fractions, each with a standard error above 0.
        at: the budget to predict.

    Returns:
        the fraction with its interval and without a standard error; ``n`` is the smallest number of
        seeds of the fitted cells.
    """
    means = np.array([e.mean for e in estimates])
    errors = np.array([e.standard_error for e in estimates], dtype=np.float64)
    value, sampling = special.logit(means), np.square(errors / (means * (1 - means)))
    freedom = np.array([e.n - 1 for e in estimates])
    # Relative to the geometric mean, so that all powers of the tokens are of moderate size.
    scale = np.exp(np.log(tokens).mean())
    budgets, target = np.asarray(tokens) / scale, at / scale
    fits = [_fitted(power, budgets, value, sampling, freedom, target) for power in _BENDS]
    centre, error, degrees, weight = (np.array(column) for column in zip(*fits, strict=True))
    likely = weight >= _LIKELY * weight.max()
    weight = weight / weight.sum()

    def quantile(level: float) -> float:
        reach = error * special.stdtrit(degrees, max(level, 1 - level))
        ends = float((centre - reach).min()) - 1, float((centre + reach).max()) + 1
        return optimize.root_scalar(
            lambda x: float(weight @ special.stdtr(degrees, (x - centre) / error)) - level,
            bracket=ends,
        ).root

    levels = (0.5 - confidence / 2, 0.5, 0.5 + confidence / 2)
    low, middle, high = (quantile(level) for level in levels)
    reach = error * special.stdtrit(degrees, levels[-1])
    low = min(low, float((centre - reach)[likely].min()))
    high = max(high, float((centre + reach)[likely].max()))
    mean, low, high = map(float, special.expit([middle, low, high]))
    return Interval(mean, low, high, None, int(freedom.min()) + 1)


def _fitted(
    power: float,
    tokens: Float[np.ndarray, " budgets"],
    value: Float[np.ndarray, " budgets"],
    sampling: Float[np.ndarray, " budgets"],
    freedom: Int[np.ndarray, " budgets"],
    at: float,
) -> tuple[float, float, float, float]:
    """Fit the curve of one λ; see `predict_budget`.

    Args:
        value: logit of the means; ``sampling``: their variances, with ``freedom`` degrees each.

    Returns:
        centre, standard error and degrees of freedom of the prediction, and the likelihood of λ up
        to a common factor.
    """
    k = len(tokens)
    grown = special.boxcox([*tokens, at], power)
    design = np.stack([np.ones(k), grown[:-1]], axis=1)
    solve = np.linalg.pinv(design)
    weights = np.array([1.0, grown[-1]]) @ solve
    outside = np.eye(k) - design @ solve
    squares = float(np.square(outside @ value).sum())

    shares = np.square(weights) + 1 / k
    variance = float(shares @ sampling)
    scatter = 0.0  # squared term of the residuals in Satterthwaite's denominator
    if k > 2:
        residual, expected = squares / (k - 2), np.diag(outside) / (k - 2)
        excess = residual - float(expected @ sampling)
        if excess > 0:
            factor = 1 + float(weights @ weights)
            variance += factor * excess
            shares = shares - factor * expected
            scatter = (factor * residual) ** 2 / (k - 2)
    parts = float((np.square(shares * sampling) / freedom).sum()) + scatter
    degrees = max(1.0, variance**2 / parts)
    # Residuals of normal data, whose variance is known only from the pooled sampling variances.
    known = float(freedom @ sampling)
    likelihood = (1 + squares / known) ** (-(float(freedom.sum()) + k - 2) / 2)
    return float(weights @ value), sqrt(variance), degrees, likelihood
