"""Measurements of each word, and their means over classes with intervals.

A record is one word that the probe gets right, in one repetition (a prompt seed). Intervals over
words (a bootstrap) and over prompt seeds are separate; the spread over SAEs is not computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.special import stdtrit
from torch import Tensor

from reseed.evaluate.absorption.projection import Absorption, Alignment, Thresholds, absorption
from reseed.evaluate.sparse_latents import SparseLatents
from reseed.evaluate.splitting import MainLatents
from reseed.evaluate.word_task import ProbedTask
from reseed.sae.base import SAE

MIN_SEEDS = 3
"""Minimum number of prompt seeds for an interval over them."""


def word_records(
    sae: SAE,
    probed: ProbedTask,
    fold: int,
    codes: SparseLatents,
    splits: Sequence[MainLatents | None],
    thresholds: dict[str, Thresholds],
    *,
    permuted: bool = False,
) -> pd.DataFrame:
    """Measure the test words of one fold that the probe gets right.

    Columns: ``word`` (index), ``class``, ``prompt_seed``, ``fold``, ``score``, ``projection``,
    ``main``, and with the suffix of each of the thresholds: ``fraction``, ``full``, ``absorbing``,
    ``absorbers``, ``contributions``, ``top``.

    Args:
        codes: latents of all words.
        splits: main latents of every class in this fold.
        thresholds: suffix of the column names → thresholds.
        permuted: use permuted labels and their probes.
    """
    prefix = "permuted_" if permuted else ""
    labels = probed.probes["permuted"][fold] if permuted else probed.words.labels
    scores = probed.permuted_scores if permuted else probed.test_scores
    weight = probed.probes[f"{prefix}weight"][fold]
    test = torch.from_numpy(probed.folds[fold].test)
    own = scores[test, labels[test]]
    known = torch.tensor([split is not None for split in splits])
    words = test[(own > 0) & known[labels[test]]]
    alignment = Alignment.of(sae.W_dec, weight)
    main = main_latents(splits)
    some, x, classes = codes.rows(words), probed.x[words], labels[words]
    table: dict[str, object] = {
        "word": words.numpy(),
        "class": classes.numpy(),
        "prompt_seed": probed.prompt_seed,
        "fold": fold,
        "score": scores[words, classes].numpy(),
    }
    for name, rule in thresholds.items():
        found = absorption(some, x, classes, weight, alignment, main, rule)
        table |= _columns(found, name)
    return pd.DataFrame(table)


def _columns(found: Absorption, name: str) -> dict[str, object]:
    return {
        "projection": found.projection.cpu().numpy(),
        "main": found.main.cpu().numpy(),
        f"fraction{name}": found.fraction.cpu().numpy(),
        f"full{name}": found.full.double().cpu().numpy(),
        f"absorbing{name}": found.absorbing.cpu().numpy(),
        f"absorbers{name}": found.absorbers.cpu().tolist(),
        f"contributions{name}": found.contributions.cpu().tolist(),
        f"top{name}": found.top.cpu().numpy(),
    }


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of one column of records.

    Attributes:
        mean: mean over classes of their means over records; NaN without a class.
        low, high: ends of the interval over words.
        seeds_low, seeds_high: ends of the interval over prompt seeds, NaN with fewer than
            `MIN_SEEDS`.
        classes: ``mean``, ``low`` and ``high`` of each class, by class.
    """

    mean: float
    low: float
    high: float
    seeds_low: float
    seeds_high: float
    classes: pd.DataFrame = field(repr=False)


def mean_over_classes(
    records: pd.DataFrame,
    column: str,
    kept: Sequence[int],
    *,
    bootstrap: int = 1_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Mean:
    """Compute the mean over the kept classes that have a record.

    The bootstrap draws words within each class, with all their records; classes are fixed.

    Args:
        bootstrap: number of draws.
        seed: seed of the draws.
    """
    number, word, prompt_seed = (
        records[name].to_numpy() for name in ("class", "word", "prompt_seed")
    )
    value = records[column].to_numpy(dtype=np.float64)
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    random = np.random.default_rng([0x626F6F74, seed])
    rows: dict[int, tuple[float, float, float]] = {}
    draws, by_seed = [], []
    for each in kept:
        here = number == each
        if not here.any():
            continue
        drawn = _drawn_means(_by_word(word[here], value[here]), bootstrap, random)
        low, high = np.quantile(drawn, ends)
        rows[each] = (float(value[here].mean()), float(low), float(high))
        draws.append(drawn)
        by_seed.append([_mean(value[here & (prompt_seed == s)]) for s in np.unique(prompt_seed)])
    classes = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])
    if not rows:
        return Mean(*[float("nan")] * 5, classes=classes)
    mean = float(np.mean([row[0] for row in rows.values()]))
    low, high = np.quantile(np.mean(draws, axis=0), ends)
    reach = _reach(np.nanmean(by_seed, axis=0), confidence)
    return Mean(mean, float(low), float(high), mean - reach, mean + reach, classes)


def _by_word(
    word: Int[np.ndarray, " records"], value: Float[np.ndarray, " records"]
) -> Float[np.ndarray, "n 2"]:
    """Return the sum and the number of the records of each word."""
    _, place = np.unique(word, return_inverse=True)
    return np.stack([np.bincount(place, weights=value), np.bincount(place)], axis=1)


def _mean(values: Float[np.ndarray, " n"]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _drawn_means(
    by_word: Float[np.ndarray, "n 2"], number: int, random: np.random.Generator
) -> Float[np.ndarray, " number"]:
    n = len(by_word)
    counts = random.multinomial(n, np.full(n, 1 / n), size=number)
    return (counts @ by_word[:, 0]) / (counts @ by_word[:, 1])


def _reach(values: Float[np.ndarray, " n"], confidence: float) -> float:
    """Return half the width of the t interval of a mean."""
    n = len(values)
    if n < MIN_SEEDS:
        return float("nan")
    quantile = float(stdtrit(n - 1, 0.5 + confidence / 2))
    return quantile * float(values.std(ddof=1)) / sqrt(n)


def main_latents(splits: Sequence[MainLatents | None]) -> list[Tensor]:
    """Return the main latents S of each class; empty for a class without a split."""
    return [torch.zeros(0, dtype=torch.long) if s is None else s.main for s in splits]
