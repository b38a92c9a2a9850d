"""Null columns of a pair: nulls of its weights, kappa, and fractions of repeated latents."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan, nan

import numpy as np

from reseed.compare.apart import apart
from reseed.compare.columns import UNTRAINED
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary
from reseed.compare.measures import Subset
from reseed.compare.nulls import covariance_null, isotropic_null, kappa
from reseed.compare.repeats import Repeats
from reseed.compare.stability import PairResult


def beside(
    measures: Mapping[str, float],
    a: Dictionary,
    b: Dictionary,
    start: Mapping[str, float],
    settings: ComparisonConfig,
) -> dict[str, float]:
    """Return the null columns of a pair.

    ``null_…`` for isotropic rows, ``null_covariance_…`` for rows with the activations' covariance,
    ``untrained_…`` for the initial weights, and κ against each of them. NaN if not known.

    Args:
        start: the measures of the untrained pair; empty if there is none.
    """
    sizes = a.num_latents, b.num_latents
    drawn = settings.threshold, settings.null_seed, settings.null_draws
    shared = measures["shared_fraction"]
    null, correlated = None, None
    if not apart(a, b):
        null = isotropic_null(*sizes, a.d_in, *drawn)
        if a.covariance is not None and b.covariance is not None:
            covariance = (a.covariance.astype(np.float64) + b.covariance) / 2
            correlated = covariance_null(*sizes, covariance, *drawn)
    return {
        "null_cosine": null.cosine if null else nan,
        "null_mmcs": null.best if null else nan,
        "null_shared_fraction": null.shared_fraction if null else nan,
        "null_coverage": null.coverage if null else nan,
        "null_simulated_latents": null.simulated_latents if null else nan,
        "kappa": kappa(shared, null.shared_fraction) if null else nan,
        "null_covariance_cosine": correlated.cosine if correlated else nan,
        "null_covariance_mmcs": correlated.best if correlated else nan,
        "null_covariance_shared_fraction": correlated.shared_fraction if correlated else nan,
        "null_covariance_coverage": correlated.coverage if correlated else nan,
        "kappa_covariance": kappa(shared, correlated.shared_fraction) if correlated else nan,
        "kappa_untrained": kappa(shared, start.get("shared_fraction", nan)),
        **{f"untrained_{name}": start.get(name, nan) for name in UNTRAINED},
    }


def of_repeats(pair: PairResult, a: Repeats, b: Repeats) -> dict[str, float]:
    """Return the shared fraction among duplicate latents, and among antipodal ones."""
    if isnan(pair.measures["shared_fraction"]):  # no common space
        return {f"shared_fraction_{word}": nan for word in ("duplicate", "antipodal")}
    return {
        f"shared_fraction_{word}": Subset(getattr(a, word), getattr(b, word)).of_sides(
            pair.a.shared, pair.b.shared
        )
        for word in ("duplicate", "antipodal")
    }
