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

from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from reseed.compare.dictionary import root
from reseed.compare.matching import Matching, match
from reseed.compare.rows import unit32

MAX_SIMULATED_LATENTS = 4096
"""Largest side that is simulated. Of this size and d_in 768 the six matchings of the isotropic null
take about 5 s of one core, and with a covariance, where the nearest are looked for too, 11 s. At
16,384 it would be about 40 and 65 s, for each size and covariance (of every layer, say), and would
better a mean cosine that is right within .001, and with a covariance within 1% on average."""
_ROWS = 2048
"""Of which the mean best cosine of the covariance's null is taken."""
_BLOCK, _LEAVES = 4096, 4096
"""Others drawn at a time (and at least), and at most about so many parts whose maxima are kept."""
_SHORTER = 4
"""How much smaller the second simulation is from which the first is carried on."""


@dataclass(frozen=True)
class Null:
    """Expected values for two unrelated dictionaries.

    Attributes:
        cosine: mean matched cosine. `√(2 ln F/D)` is not it: at 64 × 1,024 that gives .465, the
            mean best cosine is .394 and the mean matched cosine .378.
        best: mean cosine to the nearest, over both sides: what MMCS would be.
        shared_fraction: the strict shared fraction found in the simulation; often exactly 0, which
            says that it is below one in the number of latents.
        coverage: the one-sided coverage, of the isotropic null exactly. No latent is shared that is
            not covered, so it bounds the expected shared fraction from above.
        simulated_latents: the larger side in the simulation. Where it is below the number of
            latents compared, `cosine` is extended (see `isotropic_null`, `covariance_null`), and
            `shared_fraction` is that of the smaller problem.
    """

    cosine: float
    best: float
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
    cosine, shared, _ = _draws(rng, draws, n, m, d_in, threshold)
    return Null(
        cosine=cosine if m == larger else _carried(cosine, m, larger, d_in),
        best=(best_cosine(smaller, d_in) + best_cosine(larger, d_in)) / 2,
        shared_fraction=2 * shared / (n + m),
        coverage=(covered_by_chance(smaller, d_in, threshold) / 2)
        + (covered_by_chance(larger, d_in, threshold) / 2),
        simulated_latents=m,
    )


def _simulated(smaller: int, larger: int) -> tuple[int, int]:
    """Both sides, scaled down together where the larger is above `MAX_SIMULATED_LATENTS`."""
    scale = min(1.0, MAX_SIMULATED_LATENTS / larger)
    return max(1, round(smaller * scale)), round(larger * scale)


class _Drawn(NamedTuple):
    """Of one random pair or of the mean of several: mean matched cosine, number of shared latents,
    and how much nearer the nearest row is than the partner (0 if not asked for)."""

    cosine: float
    shared: float
    lost: float


def _draw(
    rng: np.random.Generator,
    n: int,
    m: int,
    d_in: int,
    threshold: float,
    scale: Float[np.ndarray, "d_in d_in"] | None = None,
) -> _Drawn:
    """One random pair.

    Args:
        scale: root of the covariance of the rows; the identity by default. With one, what matching
            loses is asked for.
    """

    def rows(number: int) -> Float[np.ndarray, "number d_in"]:
        drawn = rng.standard_normal((number, d_in))
        return drawn if scale is None else drawn @ scale.T

    def matched() -> tuple[Matching, float]:
        a, b = rows(n), rows(m)
        found = match(a, b)
        return found, 0.0 if scale is None else _nearest(a, b) - float(found.cosines.mean())

    (encoder, lost), (decoder, lost_too) = matched(), matched()
    near = (encoder.cosines >= threshold) & (decoder.cosines >= threshold)
    shared = near & (encoder.assignment == decoder.assignment)
    cosine = (encoder.cosines.mean() + decoder.cosines.mean()) / 2
    return _Drawn(cosine, int(shared.sum()), (lost + lost_too) / 2)


def _nearest(a: Float[np.ndarray, "n d_in"], b: Float[np.ndarray, "m d_in"]) -> float:
    """Mean over rows of ``a`` of the cosine to the nearest of ``b``, block by block."""
    unit_a, unit_b = unit32(a), unit32(b)
    blocks = (unit_a[i : i + _ROWS] @ unit_b.T for i in range(0, len(a), _ROWS))
    return float(np.concatenate([block.max(axis=1) for block in blocks]).mean(dtype=np.float64))


def _draws(rng: np.random.Generator, draws: int, *arguments: Any) -> _Drawn:
    """The mean of several."""
    return _Drawn(*np.mean([_draw(rng, *arguments) for _ in range(draws)], axis=0).tolist())


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
    the more of them there are. (What matching loses against ``best`` is taken within a draw: it
    varies less from draw to draw than either.) In checks with spectra 1/k, 1/√k and 1/k², d_in of
    64 and 128, and 256 or 512 latents carried on to 1,536, it was right within 1% on average over
    draws and within 2% always; by a κ taken as constant it was 3% off.

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
    cosine, shared, lost = _draws(rng, draws, n, m, d_in, threshold, scale)
    pool = _Pool.drawn(rng, max(larger, _BLOCK), scale, threshold)
    if m < larger:
        few_n, few_m = max(1, n // _SHORTER), max(1, m // _SHORTER)
        few = _draws(rng, _SHORTER * draws, few_n, few_m, d_in, threshold, scale)
        kappa_of_few = pool.rows_for(pool.best(few_m) - few.lost) / few_m
        kappa_of_many = pool.rows_for(pool.best(m) - lost) / m
        power = log(kappa_of_many / kappa_of_few) / log(m / few_m)
        cosine = pool.best(larger * kappa_of_many * (larger / m) ** power)
    return Null(
        cosine=cosine,
        best=(pool.best(smaller) + pool.best(larger)) / 2,
        shared_fraction=2 * shared / (n + m),
        coverage=(pool.covered(smaller) + pool.covered(larger)) / 2,
        simulated_latents=m,
    )


@dataclass(frozen=True, eq=False)
class _Pool:
    """How near some rows drawn with a covariance have the nearest of many others.

    Attributes:
        counts: numbers of others, each twice the one before up to all of them.
        cosines: mean over the rows, and over parts of that size, of the largest cosine.
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

        rows, leaf = draw(_ROWS), max(1, others // _LEAVES)
        near, maxima = np.zeros(_ROWS), []
        for start in range(0, others, _BLOCK // leaf * leaf):
            number = min(_BLOCK // leaf * leaf, others - start)
            products = rows @ draw(number).T
            near += (products >= threshold).sum(axis=1)
            maxima.append(np.maximum.reduceat(products, np.arange(0, number, leaf), axis=1))
        leaves = np.concatenate(maxima, axis=1)
        whole = float(leaves.max(axis=1).mean(dtype=np.float64))
        counts, cosines, count = [], [], leaf
        parts = leaves[:, : others // leaf]
        while count < others:
            counts.append(count)
            cosines.append(float(parts.mean(dtype=np.float64)))
            count, even = 2 * count, parts.shape[1] // 2 * 2
            parts = np.maximum(parts[:, 0:even:2], parts[:, 1:even:2])
        return cls(np.array([*counts, others]), np.array([*cosines, whole]), near / others)

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
