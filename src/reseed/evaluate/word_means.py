"""Means over classes of words, with intervals over words and over prompt seeds.

The value of a class is a ratio of two sums over its words: of its measurements (absorption) or of
twice the right predictions (F1) to their number. Words are the sampling unit within a class; all
spellings of a word, and its records under all prompt seeds, are one unit.

Interval over words: the ratios are linearised (delta method; to first order a stratified
jackknife). Word w contributes e_cw = √(n_c/(n_c−1)) · (top_cw − r_c·bottom_cw) / Σ_w bottom_cw to
the error of the ratio r_c of class c, which has n_c words. With the classes' weights v_c, of sum 1,
Var(mean) = Σ_w (Σ_c v_c e_cw)²: a word may be of several classes (permuted labels). The quantile is
that of t with Satterthwaite's degrees of freedom over classes. Classes, probes and folds are fixed.

Letters: C classes, W different words, S prompt seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan, sqrt

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.special import expit, logit, stdtrit

from reseed.store.results import Metric

MIN_SEEDS = 3
"""Minimum number of prompt seeds for an interval over them."""
_NOTHING = (float("nan"), float("nan"))


@dataclass(frozen=True, eq=False)
class Ratios:
    """A ratio of every class, and each word's part of it.

    Attributes:
        top, bottom: sums over the word's records in a class; 0 where it has none.
        by_seed: the ratio under each prompt seed; NaN for a class without a record there.
    """

    top: Float[np.ndarray, "C W"]
    bottom: Float[np.ndarray, "C W"]
    by_seed: Float[np.ndarray, "S C"]

    @classmethod
    def of(
        cls,
        number: Int[np.ndarray, " n"],
        word: Int[np.ndarray, " n"],
        seed: Int[np.ndarray, " n"],
        top: Float[np.ndarray, " n"],
        bottom: Float[np.ndarray, " n"],
        shape: tuple[int, int, int],
    ) -> Ratios:
        """Sum n records.

        Args:
            number, word, seed: class, word and prompt seed of each record, numbered from 0.
            shape: S, C and W.
        """
        _, classes, words = shape
        sums = np.zeros((2, classes, words))
        seeds = np.zeros((2, *shape[:2]))
        for i, values in enumerate((top, bottom)):
            np.add.at(sums[i], (number, word), values)
            np.add.at(seeds[i], (seed, number), values)
        with np.errstate(invalid="ignore"):
            return cls(sums[0], sums[1], seeds[0] / seeds[1])


@dataclass(frozen=True, eq=False)
class Mean:
    """A mean over classes; NaN where it is not known.

    Attributes:
        mean: mean over the classes that have a value (for a difference, both values).
        low, high: ends of the interval over words.
        prompts_low, prompts_high: ends of the interval over prompt seeds.
        classes: ``mean``, ``low``, ``high`` and ``words`` of each of these classes, by class.
    """

    mean: float
    low: float
    high: float
    prompts_low: float
    prompts_high: float
    classes: pd.DataFrame = field(repr=False)

    def metrics(self, name: str) -> dict[str, float | int | None]:
        """Return the metric ``name`` and the ends of its intervals (`interval_metrics`)."""
        found = {
            name: self.mean,
            f"{name}_words_low": self.low,
            f"{name}_words_high": self.high,
            f"{name}_prompts_low": self.prompts_low,
            f"{name}_prompts_high": self.prompts_high,
        }
        return {name: None if isnan(value) else value for name, value in found.items()}


def interval_metrics(name: str, optional: bool = False) -> tuple[Metric, ...]:
    """Return the metrics that hold the intervals of the metric ``name`` of a run."""
    return tuple(
        Metric(
            f"{name}_{over}_{end}",
            help=f"ends of the run's intervals of `{name}`, over words and over seeds of the "
            "prompts (`prompts`)",
            optional=optional,
        )
        for over in ("words", "prompts")
        for end in ("low", "high")
    )


def mean_over_classes(
    found: Ratios, kept: Mapping[int, float], minus: Ratios | None = None, confidence: float = 0.95
) -> Mean:
    """Compute the mean over the kept classes that have a value, or of differences of two values.

    A fraction has its intervals on the logit scale, so that they stay within 0 and 1; a difference
    on its own. There is no interval where all words (or prompt seeds) agree, or if a class has a
    single word: nothing tells then how much the mean could vary.

    Args:
        kept: class → its weight in the mean.
        minus: a baseline; the differences are paired by class and by word.
    """
    each = [found] if minus is None else [found, minus]
    used = [c for c in kept if all(of.bottom[c].any() for of in each)]
    if not used:
        empty = pd.DataFrame(columns=["mean", "low", "high", "words"], dtype=np.float64)
        return Mean(*[float("nan")] * 5, classes=empty)
    means, errors, counts = _linearised(found, used)
    by_seed = found.by_seed[:, used]
    if minus is not None:
        others, their_errors, their_counts = _linearised(minus, used)
        means, errors = means - others, errors - their_errors
        counts, by_seed = np.minimum(counts, their_counts), by_seed - minus.by_seed[:, used]
    weights = np.array([kept[c] for c in used], dtype=np.float64)
    weights /= weights.sum()
    bounded, mean, variances = minus is None, float(weights @ means), np.square(errors).sum(1)
    variance = float(np.square(weights @ errors).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = variance**2 / (np.square(weights**2 * variances) / (counts - 1)).sum()
    low, high = _interval(mean, sqrt(variance), freedom, confidence, bounded)
    rows = {
        c: (m, *_interval(m, sqrt(v), n - 1, confidence, bounded), n)
        for c, m, v, n in zip(used, means.tolist(), variances, counts.tolist(), strict=True)
    }
    # A prompt seed under which some class has no record would be a mean over other classes.
    complete, seeds = ~np.isnan(by_seed).any(0), len(by_seed)
    prompts = _NOTHING
    if seeds >= MIN_SEEDS and complete.any():
        of_seeds = np.average(by_seed[:, complete], axis=1, weights=weights[complete])
        error = float(of_seeds.std(ddof=1)) / sqrt(seeds)
        prompts = _interval(mean, error, seeds - 1, confidence, bounded)
    columns = ["mean", "low", "high", "words"]
    classes = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return Mean(mean, low, high, *prompts, classes=classes)


def _linearised(
    found: Ratios, used: Sequence[int]
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "C W"], Int[np.ndarray, " C"]]:
    """Return the ratio of each class, each word's part of its error, and the number of words."""
    top, bottom = found.top[used], found.bottom[used]
    whole, counts = bottom.sum(1, keepdims=True), (bottom > 0).sum(1)
    ratios = top.sum(1, keepdims=True) / whole
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.sqrt(counts / (counts - 1))[:, None]
        errors = factor * (top - ratios * bottom) / whole
    return ratios[:, 0], errors, counts


def _interval(
    mean: float, error: float, freedom: float, confidence: float, bounded: bool
) -> tuple[float, float]:
    """Return the ends of the t interval; NaN without an error, or for a fraction of 0 or 1."""
    if not (isfinite(error) and error > 0 and freedom > 0) or (bounded and not 0 < mean < 1):
        return _NOTHING
    reach = float(stdtrit(freedom, 0.5 + confidence / 2)) * error
    if not bounded:
        return mean - reach, mean + reach
    reach /= mean * (1 - mean)
    return float(expit(logit(mean) - reach)), float(expit(logit(mean) + reach))
