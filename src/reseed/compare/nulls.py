"""What two dictionaries with nothing in common would show: a ladder of matched nulls.

1. *Isotropic*: rows are drawn from an isotropic Gaussian (so, once normalised, uniformly on the
   sphere).
2. *Covariance*: rows are drawn with the covariance of the activations, which dictionaries of one
   data set have in common without having a feature in common. Two sides crowd into few directions
   and come closer.
3. The untrained pair, whose overlap `reseed.compare.cell` measures, and SAEs trained on Gaussian
   activations of the same covariance, which are runs of their own.

In both of the first, rows of A and B, and of encoder and decoder, are independent of each other.
The last is a choice: with tied rows, as at initialisation, the two matchings are one and the index
agrees by construction; the overlap of the untrained pair shows that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import log

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from reseed.compare.dictionary import root
from reseed.compare.matching import match
from reseed.compare.rows import unit32

MAX_SIMULATED_LATENTS = 4096
"""Largest side that is simulated; six matchings of it take about 12 s on one core."""
_ROWS = 2048
"""Of which the mean best cosine of the covariance's null is taken."""
_SHORTER = 4
"""How much smaller the second simulation is from which the first is carried on."""


@dataclass(frozen=True)
class Null:
    """Expected values for two unrelated dictionaries.

    Attributes:
        cosine: mean matched cosine. `√(2 ln F/D)` is not it: at 64 × 1,024 that gives .465, the
            mean best cosine is .394 and the mean matched cosine .378.
        shared_fraction: the strict shared fraction found in the simulation; often exactly 0, which
            says that it is below one in the number of latents.
        coverage: the one-sided coverage, of the isotropic null exactly. No latent is shared that is
            not covered, so it bounds the expected shared fraction from above.
        simulated_latents: the larger side in the simulation. Where it is below the number of
            latents compared, `cosine` is extended (see `isotropic_null`, `covariance_null`), and
            `shared_fraction` is that of the smaller problem.
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
    n, m = _simulated(smaller, larger)
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


def _simulated(smaller: int, larger: int) -> tuple[int, int]:
    """Both sides, scaled down together where the larger is above `MAX_SIMULATED_LATENTS`."""
    scale = min(1.0, MAX_SIMULATED_LATENTS / larger)
    return max(1, round(smaller * scale)), round(larger * scale)


def _draw(
    rng: np.random.Generator,
    n: int,
    m: int,
    d_in: int,
    threshold: float,
    scale: Float[np.ndarray, "d_in d_in"] | None = None,
) -> tuple[float, int]:
    """Mean matched cosine and number of shared latents of one random pair.

    Args:
        scale: root of the covariance of the rows; the identity by default.
    """

    def rows(number: int) -> Float[np.ndarray, "number d_in"]:
        drawn = rng.standard_normal((number, d_in))
        return drawn if scale is None else drawn @ scale.T

    encoder, decoder = (match(rows(n), rows(m)) for _ in range(2))
    near = (encoder.cosines >= threshold) & (decoder.cosines >= threshold)
    shared = near & (encoder.assignment == decoder.assignment)
    return (encoder.cosines.mean() + decoder.cosines.mean()) / 2, int(shared.sum())


def covariance_null(
    num_latents_a: int,
    num_latents_b: int,
    covariance: Float[np.ndarray, "d_in d_in"],
    threshold: float = 0.7,
    seed: int = 0,
    draws: int = 3,
) -> Null:
    """The matched null of rows drawn from N(0, Σ); as deterministic and symmetric as the other.

    Above `MAX_SIMULATED_LATENTS` the mean matched cosine is carried on as `isotropic_null` does it,
    ``matched(m) ≈ best(κ·m)``, but with ``best`` by drawing, as no formula gives it, and with κ
    falling as a power of m, which two sizes a factor of 4 apart tell: crowded rows compete more
    the more of them there are. In checks with spectra 1/k, 1/√k, 1/k² and that of real
    activations, d_in of 64 to 256, carried by a factor of 4 it was right within 1%; by a κ taken
    as constant only within 3%.

    The coverage is E[1 − (1 − q_enc·q_dec)^F], q the chance of a row that another is within τ of
    it, found in the same draws.
    """
    exact = np.ascontiguousarray(covariance, dtype=np.float64)
    sizes = sorted((num_latents_a, num_latents_b))
    return _covariance_null(*sizes, exact.tobytes(), len(exact), threshold, seed, draws)


@lru_cache(maxsize=4)
def _covariance_null(
    smaller: int,
    larger: int,
    covariance: bytes,
    d_in: int,
    threshold: float,
    seed: int,
    draws: int,
) -> Null:
    scale = root(np.frombuffer(covariance).reshape(d_in, d_in))
    n, m = _simulated(smaller, larger)
    rng = np.random.default_rng([seed, n, m, d_in, 1])
    drawn = [_draw(rng, n, m, d_in, threshold, scale) for _ in range(draws)]
    cosine, shared = np.mean(drawn, axis=0)
    pool = _Pool.drawn(rng, larger, scale, threshold)
    if m < larger:
        fewer = max(1, n // _SHORTER), max(1, m // _SHORTER)
        short = np.mean([_draw(rng, *fewer, d_in, threshold, scale)[0]
                         for _ in range(_SHORTER * draws)])  # fmt: skip
        kappas = [pool.rows_for(float(c)) / size for c, size in ((short, fewer[1]), (cosine, m))]
        power = log(kappas[1] / kappas[0]) / log(m / fewer[1])
        cosine = pool.best(larger * kappas[1] * (larger / m) ** power)
    return Null(
        cosine=float(cosine),
        shared_fraction=2 * float(shared) / (n + m),
        coverage=(pool.covered(smaller) + pool.covered(larger)) / 2,
        simulated_latents=m,
    )


@dataclass(frozen=True, eq=False)
class _Pool:
    """How near some rows drawn with a covariance have the nearest of many others.

    Attributes:
        counts: numbers of others, rising.
        cosines: mean over the rows of the largest cosine with so many.
        near: for each row the part of the others with a cosine ≥ τ.
    """

    counts: Int[np.ndarray, " sizes"]
    cosines: Float[np.ndarray, " sizes"]
    near: Float[np.ndarray, " rows"]

    @classmethod
    def drawn(
        cls,
        rng: np.random.Generator,
        others: int,
        scale: Float[np.ndarray, "d_in d_in"],
        threshold: float,
    ) -> _Pool:
        def draw(number: int) -> Float[np.ndarray, "number d_in"]:
            return unit32(rng.standard_normal((number, len(scale))) @ scale.T)

        rows = draw(_ROWS)
        best = np.full(_ROWS, -np.inf, dtype=np.float32)
        near, counts, cosines, seen = np.zeros(_ROWS), [], [], 0
        for size in _blocks(others):
            products = rows @ draw(size).T
            near += (products >= threshold).sum(axis=1)
            best = np.maximum(best, products.max(axis=1))
            seen += size
            counts.append(seen)
            cosines.append(best.mean(dtype=np.float64))
        return cls(np.array(counts), np.array(cosines), near / others)

    def best(self, others: float) -> float:
        """Mean cosine to the nearest of so many, straight between sizes on the log scale."""
        return float(np.interp(log(others), np.log(self.counts), self.cosines))

    def rows_for(self, cosine: float) -> float:
        """Of how many the nearest has this mean cosine."""
        return float(np.exp(np.interp(cosine, self.cosines, np.log(self.counts))))

    def covered(self, others: int) -> float:
        """P(one of so many is within τ by encoder and by decoder): two independent chances."""
        both = self.near * np.roll(self.near, 1)
        return float(np.mean(-np.expm1(others * np.log1p(-np.minimum(both, 1 - 1e-16)))))


def _blocks(total: int) -> Iterator[int]:
    """Sizes of blocks that grow by an eighth of what was there, up to 4,096; they sum to total."""
    seen = 0
    while seen < total:
        size = min(max(1, seen // 8), 4096, total - seen)
        yield size
        seen += size


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
