"""What two dictionaries with nothing in common would show: the matched isotropic null.

Rows are drawn from an isotropic Gaussian (so, once normalised, uniformly on the sphere): those of
A and B, and those of encoder and decoder, all independently of each other. The last is a choice:
with tied rows, as at initialisation, the two matchings are one and the index agrees by
construction; the overlap of the untrained pair, which is measured for itself, shows that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from reseed.compare.matching import match

MAX_SIMULATED_LATENTS = 4096
"""Largest side that is simulated; six matchings of it take about 12 s on one core."""


@dataclass(frozen=True)
class Null:
    """Expected values for two unrelated dictionaries.

    Attributes:
        cosine: mean matched cosine. `√(2 ln F/D)` is not it: at 64 × 1,024 that gives .465, the
            mean best cosine is .394 and the mean matched cosine .378.
        shared_fraction: the strict shared fraction found in the simulation; often exactly 0, which
            says that it is below one in the number of latents.
        coverage: the one-sided coverage, exactly. No latent is shared that is not covered, so it
            bounds the expected shared fraction from above.
        simulated_latents: the larger side in the simulation. Where it is below the number of
            latents compared, `cosine` is extended (see `isotropic_null`), and `shared_fraction`
            is that of the smaller problem.
    """

    cosine: float
    shared_fraction: float
    coverage: float
    simulated_latents: int


@lru_cache(maxsize=256)
def isotropic_null(
    num_latents_a: int,
    num_latents_b: int,
    d_in: int,
    threshold: float = 0.7,
    seed: int = 0,
    draws: int = 3,
) -> Null:
    """The matched isotropic null by simulation; deterministic, and the same for (A, B) and (B, A).

    Above `MAX_SIMULATED_LATENTS` both sides are scaled down together, and the mean matched cosine
    is carried to the full size by an approximation: the mean cosine to the best of m random rows,
    ``best(m)``, is an integral, and matching costs about as much as having fewer rows to choose
    from, ``matched(m) ≈ best(κ·m)`` with κ independent of m. In a check with equal sides of 128 to
    8,192 latents and d_in of 64 to 768, κ stayed within .62 and .66; a κ fixed at .63 was right
    within .001 everywhere, and at d_in = 128, 4,096 → 8,192 carried by the κ of 4,096 within .001.
    """
    smaller, larger = sorted((num_latents_a, num_latents_b))
    scale = min(1.0, MAX_SIMULATED_LATENTS / larger)
    n, m = max(1, round(smaller * scale)), round(larger * scale)
    rng = np.random.default_rng([seed, n, m, d_in])
    drawn = [_draw(rng, n, m, d_in, threshold) for _ in range(draws)]
    cosine, shared = np.mean(drawn, axis=0)
    return Null(
        cosine=float(cosine) if m == larger else _carried(float(cosine), m, larger, d_in),
        shared_fraction=2 * float(shared) / (n + m),
        coverage=(covered_by_chance(smaller, d_in, threshold) / 2)
        + (covered_by_chance(larger, d_in, threshold) / 2),
        simulated_latents=m,
    )


def _draw(
    rng: np.random.Generator, n: int, m: int, d_in: int, threshold: float
) -> tuple[float, int]:
    """Mean matched cosine and number of shared latents of one random pair."""
    encoder, decoder = (
        match(rng.standard_normal((n, d_in)), rng.standard_normal((m, d_in))) for _ in range(2)
    )
    near = (encoder.cosines >= threshold) & (decoder.cosines >= threshold)
    shared = near & (encoder.assignment == decoder.assignment)
    return (encoder.cosines.mean() + decoder.cosines.mean()) / 2, int(shared.sum())


def above(cosine: Float[np.ndarray, "*shape"] | float, d_in: int) -> Float[np.ndarray, "*shape"]:
    """P(cosine of two random directions > ``cosine``): ½·I(1 − c²; (D−1)/2, ½) for c ≥ 0."""
    cosine = np.asarray(cosine, dtype=np.float64)
    if d_in == 1:
        return np.where(cosine < 1, np.where(cosine < -1, 1.0, 0.5), 0.0)
    tail = special.betainc((d_in - 1) / 2, 0.5, 1 - np.minimum(np.square(cosine), 1)) / 2
    return np.where(cosine >= 0, tail, 1 - tail)


def covered_by_chance(num_latents: int, d_in: int, threshold: float) -> float:
    """P(one of ``num_latents`` random rows has encoder and decoder cosine ≥ τ) = 1 − (1 − p²)^F."""
    return float(-np.expm1(num_latents * np.log1p(-np.square(above(threshold, d_in)))))


def best_cosine(num_latents: float, d_in: int) -> float:
    """Mean cosine of a direction to the nearest of so many random ones: ∫ c dP(c)^F."""
    cosines = np.linspace(-1, 1, 100_001)
    below = np.exp(num_latents * np.log1p(-np.minimum(above(cosines, d_in), 1 - 1e-16)))
    return float(1 - np.trapezoid(below, cosines))


def _carried(cosine: float, simulated: int, wanted: int, d_in: int) -> float:
    """The mean matched cosine at ``wanted`` latents from that at ``simulated``, at the same κ."""

    def missing(kappa: float) -> float:
        return best_cosine(kappa * simulated, d_in) - cosine

    kappa = optimize.root_scalar(missing, bracket=(1e-3, 4.0), xtol=1e-4).root
    return best_cosine(kappa * wanted, d_in)


def kappa(shared: float, null: float) -> float:
    """κ = (S − S₀)/(1 − S₀): 0 at the null, 1 where everything is shared."""
    return (shared - null) / (1 - null) if null < 1 else float("nan")
