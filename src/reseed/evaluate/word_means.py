"""Means over classes of words, with intervals over words and over prompt seeds.

The value of a class is a ratio of two sums over its words: of its measurements (absorption) or of
twice the right predictions (F1) to their number. Words are the sampling unit within a class; all
spellings of a word, and its records under all prompt seeds, are one unit.

Interval over words: the ratios are linearised (delta method; to first order a stratified
jackknife). Word w contributes e_cw = √(n_c/(n_c−1)) · (top_cw − r_c·bottom_cw) / Σ_w bottom_cw to
the error of the ratio r_c of class c, which has n_c words. With the classes' weights v_c, of sum 1,
Var(mean) = Σ_w (Σ_c v_c e_cw)²: a word may be of several classes (permuted labels). The quantile is
that of t with Satterthwaite's degrees of freedom over classes. Classes, probes and folds are fixed.

Permuted labels are drawn at random for each fold and prompt seed. The variance over these draws,
computed as that over words, is added, with n − 1 degrees of freedom for n draws; what a word and a
draw have in common counts twice, so the interval is rather too wide.

Letters: C classes, W different words, S prompt seeds, G draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan, nan, sqrt

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
        draws: ``top`` and ``bottom`` of each draw of permuted labels; None for true labels.
    """

    top: Float[np.ndarray, "C W"]
    bottom: Float[np.ndarray, "C W"]
    by_seed: Float[np.ndarray, "S C"]
    draws: tuple[Float[np.ndarray, "C G"], Float[np.ndarray, "C G"]] | None = None

    @classmethod
    def of(
        cls,
        number: Int[np.ndarray, " n"],
        word: Int[np.ndarray, " n"],
        seed: Int[np.ndarray, " n"],
        top: Float[np.ndarray, " n"],
        bottom: Float[np.ndarray, " n"],
        shape: tuple[int, int, int],
        draw: Int[np.ndarray, " n"] | None = None,
    ) -> Ratios:
        """Sum n records.

        Args:
            number, word, seed: class, word and prompt seed of each record, numbered from 0.
            shape: S, C and W.
            draw: draw of permuted labels of each record, numbered from 0.
        """
        seeds, classes, words = shape

        def sums(unit: Int[np.ndarray, " n"], size: int) -> tuple[np.ndarray, np.ndarray]:
            found = np.zeros((2, classes, size))
            for i, values in enumerate((top, bottom)):
                np.add.at(found[i], (number, unit), values)
            return found[0], found[1]

        of_seeds = sums(seed, seeds)
        of_draws = None if draw is None else sums(draw, int(draw.max(initial=0)) + 1)
        with np.errstate(invalid="ignore"):
            return cls(*sums(word, words), (of_seeds[0] / of_seeds[1]).T, of_draws)


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
    means, errors, counts = _linearised(found.top[used], found.bottom[used])
    by_seed = found.by_seed[:, used]
    if minus is not None:
        others, their_errors, theirs = _linearised(minus.top[used], minus.bottom[used])
        means, errors = means - others, errors - their_errors
        counts, by_seed = np.minimum(counts, theirs), by_seed - minus.by_seed[:, used]
    weights = np.array([kept[c] for c in used], dtype=np.float64)
    weights /= weights.sum()
    parts = [(errors, counts, False)]
    for of in each:
        if of.draws is not None:
            parts.append((*_linearised(*(sums[used] for sums in of.draws))[1:], True))
    bounded, mean = minus is None, float(weights @ means)
    low, high = _interval(mean, *_error(parts, weights), confidence, bounded)
    rows = {
        c: (
            m,
            *_interval(
                m, *_error([(e[[i]], n[[i]], d) for e, n, d in parts], one), confidence, bounded
            ),
            counts[i],
        )
        for i, (c, m, one) in enumerate(
            zip(used, means.tolist(), np.ones((len(used), 1)), strict=True)
        )
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
    top: Float[np.ndarray, "C U"], bottom: Float[np.ndarray, "C U"]
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "C U"], Int[np.ndarray, " C"]]:
    """Return the ratio of each class, each unit's part of its error, and the number of units."""
    whole, counts = bottom.sum(1, keepdims=True), (bottom > 0).sum(1)
    ratios = top.sum(1, keepdims=True) / whole
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.sqrt(counts / (counts - 1))[:, None]
        errors = factor * (top - ratios * bottom) / whole
    return ratios[:, 0], errors, counts


def _error(
    parts: Sequence[tuple[Float[np.ndarray, "C U"], Int[np.ndarray, " C"], bool]],
    weights: Float[np.ndarray, " C"],
) -> tuple[float, float]:
    """Return the standard error of the weighted mean and its degrees of freedom.

    Args:
        parts: for each kind of unit (words, draws), the units' parts of the errors of the classes,
            the number of units of each class, and whether these are common to all classes.
    """
    total = lost = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for errors, counts, common in parts:
            variance = float(np.square(weights @ errors).sum())
            each = np.square(weights**2 * np.square(errors).sum(1)) / (counts - 1)
            # A draw gives all classes their labels, so no class adds degrees of freedom.
            lost += variance**2 / (counts.max() - 1) if common else each.sum()
            total += variance
        return sqrt(total) if total >= 0 else nan, float(np.float64(total) ** 2 / lost)


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
