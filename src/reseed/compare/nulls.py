"""Matched nulls: the measures expected of two dictionaries that have nothing in common.

1. *Isotropic*: rows are drawn from an isotropic Gaussian, so their directions are uniform on the
   sphere.
2. *Covariance*: rows are drawn with the covariance of the activations. Dictionaries of one data set
   share it even without a common feature; rows concentrate on few directions and are nearer to each
   other.
3. The untrained pair, and SAEs trained on Gaussian activations of the same covariance (other runs).

In the first two, rows of A and B are independent, and so are encoder and decoder. This is a choice:
tied rows, as at initialisation, agree by construction; the untrained pair shows that overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from reseed.compare.dictionary import root, unit32
from reseed.compare.matching import Matching, match
from reseed.compare.measures import shared_fraction
from reseed.compare.pair import Pair
from reseed.compare.registry import Column, measure, measures

SURROGATES = {"gaussian": "Gaussian activations", "random_weights": "random weights"}
"""Null models on which SAEs are trained: suffix of the model's label (``embedded+gaussian``) →
name. The null that preserves least of the model comes first."""
MAX_SIMULATED_LATENTS = 4096
"""Maximum number of simulated latents per side. At this size and d_in 768 the six matchings of the
isotropic null take about 5 s of one core; with a covariance, which needs nearest rows too, 11 s. At
16,384 they would take about 40 and 65 s, only to improve a mean cosine that was right within 1%.
"""
_ROWS, _BLOCK, _LEAVES = 2048, 4096, 4096
"""Number of rows over which the mean best cosine of the covariance null is computed; number of
other rows drawn at a time (also the minimum in total); maximum number of their parts, roughly."""
_SIZE_RATIO = 4
"""Size ratio of the simulations from which the covariance null is extrapolated."""


@dataclass(frozen=True)
class Null:
    """Expected values for two unrelated dictionaries.

    Attributes:
        cosine: mean matched cosine. The formula `√(2 ln F/D)` overestimates it: for D = 64 and
            F = 1,024 it gives .465; the mean best cosine is .394, the mean matched cosine .378.
        best: mean cosine to the nearest row, over both sides; the expected MMCS.
        shared_fraction: the strict shared fraction in the simulation; often exactly 0, which means
            less than 1 / number of latents.
        coverage: the one-sided coverage, exact for the isotropic null. Every shared latent is
            covered, so it is an upper bound on the expected shared fraction.
        simulated_latents: the larger side in the simulation. If it is smaller than the number of
            latents compared, `cosine` is extrapolated (see `isotropic_null`, `covariance_null`)
            and `shared_fraction` is that of the smaller problem.
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
    """Simulate the matched isotropic null; deterministic, and the same for (A, B) and (B, A).

    Above `MAX_SIMULATED_LATENTS` both sides are scaled down together, and the mean matched cosine
    is extrapolated to the full size: the mean cosine to the best of m random rows, ``best(m)``, is
    an integral, and matching is about as good as the best of fewer rows, ``matched(m) ≈
    best(κ·m)`` with κ independent of m. In one check (``tests/compare/test_nulls.py`` repeats 256 →
    1,024 of 64 dimensions, within .002) with equal sides of 128 to 8,192 latents and
    d_in of 64 to 768, κ stayed within .62 and .66; a κ fixed at .63 was right within .001.
    """
    smaller, larger = sorted((num_latents_a, num_latents_b))
    n, m = _simulated(smaller, larger)
    rng = np.random.default_rng([seed, n, m, d_in])
    cosine, shared, _ = _draws(rng, draws, n, m, d_in, threshold)
    return Null(
        cosine=cosine if m == larger else _extrapolated(cosine, m, larger, d_in),
        best=(best_cosine(smaller, d_in) + best_cosine(larger, d_in)) / 2,
        shared_fraction=2 * shared / (n + m),
        coverage=(covered_by_chance(smaller, d_in, threshold) / 2)
        + (covered_by_chance(larger, d_in, threshold) / 2),
        simulated_latents=m,
    )


def _simulated(smaller: int, larger: int) -> tuple[int, int]:
    """Return both sizes, scaled down together if the larger exceeds `MAX_SIMULATED_LATENTS`."""
    scale = min(1.0, MAX_SIMULATED_LATENTS / larger)
    return max(1, round(smaller * scale)), round(larger * scale)


class _Drawn(NamedTuple):
    """Measures of one random pair, or their means over several pairs.

    Attributes:
        cosine: mean matched cosine.
        shared: number of shared latents.
        lost: mean cosine to the nearest row minus that to the partner; 0 without a covariance.
    """

    cosine: float
    shared: float
    lost: float


def _draw(
    rng: np.random.Generator,
    n: int,
    m: int,
    d_in: int,
    threshold: float,
    scales: Sequence[Float[np.ndarray, "d_in d_in"]] | None = None,
) -> _Drawn:
    """Draw and match one random pair.

    Args:
        scales: roots of the covariances of both sides, or of all rows; without, `lost` is 0.
    """

    def rows(number: int, side: int) -> Float[np.ndarray, "number d_in"]:
        drawn = rng.standard_normal((number, d_in))
        return drawn if scales is None else drawn @ scales[side].T

    def matched() -> tuple[Matching, float]:
        a, b = rows(n, 0), rows(m, -1)
        found = match(a, b)
        return found, 0.0 if scales is None else _nearest(a, b) - float(found.cosines.mean())

    (encoder, lost), (decoder, lost_too) = matched(), matched()
    near = (encoder.cosines >= threshold) & (decoder.cosines >= threshold)
    shared = near & (encoder.assignment == decoder.assignment)
    cosine = (encoder.cosines.mean() + decoder.cosines.mean()) / 2
    return _Drawn(cosine, int(shared.sum()), (lost + lost_too) / 2)


def _nearest(a: Float[np.ndarray, "n d_in"], b: Float[np.ndarray, "m d_in"]) -> float:
    """Return the mean over rows of ``a`` of the cosine to the nearest of ``b``, block by block."""
    unit_a, unit_b = unit32(a), unit32(b)
    blocks = (unit_a[i : i + _ROWS] @ unit_b.T for i in range(0, len(a), _ROWS))
    return float(np.concatenate([block.max(axis=1) for block in blocks]).mean(dtype=np.float64))


def _draws(rng: np.random.Generator, draws: int, *arguments: Any) -> _Drawn:
    """Return the mean over several draws."""
    return _Drawn(*np.mean([_draw(rng, *arguments) for _ in range(draws)], axis=0).tolist())


def covariance_null(
    num_latents_a: int,
    num_latents_b: int,
    covariance: Float[np.ndarray, "d_in d_in"],
    threshold: float = 0.7,
    seed: int = 0,
    draws: int = 3,
    other: Float[np.ndarray, "d_in d_in"] | None = None,
) -> Null:
    """Simulate the matched null of rows from N(0, Σ); deterministic, same for (A, B) and (B, A).
    With ``other``, rows of B have this covariance; (B, A) is then the same but for the draws.

    Above `MAX_SIMULATED_LATENTS` the mean matched cosine is extrapolated as in `isotropic_null`,
    ``matched(m) ≈ best(κ·m)``, with two differences: ``best`` is simulated, as there is no formula,
    and κ falls as a power of m, because rows compete more the more of them there are. The power is
    fitted to two sizes a factor of 4 apart, by ``best − matched``, which varies less over draws
    than either term. In checks with spectra 1/k, 1/√k and 1/k², d_in of 64 and 128, and 256 or 512
    latents extrapolated to 1,536, the result was right within 2%; with a constant κ it was 3% off.

    The coverage is E[1 − (1 − q_enc·q_dec)^F]; q is the probability that another row has a cosine
    ≥ τ to a given row, estimated from the same draws.
    """
    sizes = sorted((num_latents_a, num_latents_b))
    both = [own for own in (covariance, other) if own is not None]
    both = both if num_latents_a <= num_latents_b else both[::-1]
    exact = tuple(np.ascontiguousarray(own, dtype=np.float64).tobytes() for own in both)
    return _covariance_null(*sizes, exact, len(covariance), threshold, seed, draws)


@lru_cache(maxsize=4)
def _covariance_null(
    smaller: int,
    larger: int,
    covariances: tuple[bytes, ...],
    d_in: int,
    threshold: float,
    seed: int,
    draws: int,
) -> Null:
    scales = [root(np.frombuffer(own).reshape(d_in, d_in)) for own in covariances]
    n, m = _simulated(smaller, larger)
    rng = np.random.default_rng([seed, n, m, d_in, 1])
    cosine, shared, lost = _draws(rng, draws, n, m, d_in, threshold, scales)
    pool = _Pool.drawn(rng, max(larger, _BLOCK), scales, threshold)
    if m < larger:
        few_n, few_m = max(1, n // _SIZE_RATIO), max(1, m // _SIZE_RATIO)
        few = _draws(rng, _SIZE_RATIO * draws, few_n, few_m, d_in, threshold, scales)
        kappa_of_few = pool.rows_for(pool.best(few_m) - few.lost) / few_m
        kappa_of_many = pool.rows_for(pool.best(m) - lost) / m
        power = log(kappa_of_many / kappa_of_few) / log(m / few_m)
        cosine = pool.best(larger * kappa_of_many * (larger / m) ** power)
    others = max(smaller, _BLOCK)
    back = pool if len(scales) == 1 else _Pool.drawn(rng, others, scales[::-1], threshold)
    return Null(
        cosine=cosine,
        best=(back.best(smaller) + pool.best(larger)) / 2,
        shared_fraction=2 * shared / (n + m),
        coverage=(back.covered(smaller) + pool.covered(larger)) / 2,
        simulated_latents=m,
    )


@dataclass(frozen=True, eq=False)
class _Pool:
    """Cosines of some rows, drawn with a covariance, to the nearest of many with it or another.

    Attributes:
        counts: numbers of other rows, doubling up to all of them.
        cosines: for each number, the mean of the largest cosine over the rows and over parts of the
            other rows of that size.
        near: for each row the fraction of the others with a cosine ≥ τ.
    """

    counts: Int[np.ndarray, " sizes"]
    cosines: Float[np.ndarray, " sizes"]
    near: Float[np.ndarray, " rows"]

    @classmethod
    def drawn(
        cls,
        rng: np.random.Generator,
        others: int,
        scales: Sequence[Float[np.ndarray, "d_in d_in"]],
        threshold: float,
    ) -> _Pool:
        def draw(number: int, side: int) -> Float[np.ndarray, "number d_in"]:
            return unit32(rng.standard_normal((number, len(scales[side]))) @ scales[side].T)

        rows, leaf = draw(_ROWS, 0), max(1, others // _LEAVES)
        near, maxima = np.zeros(_ROWS), []
        for start in range(0, others, _BLOCK // leaf * leaf):
            number = min(_BLOCK // leaf * leaf, others - start)
            products = rows @ draw(number, -1).T
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
        """Return the mean cosine to the nearest of ``others`` rows, interpolated in log(others)."""
        return float(np.interp(log(others), np.log(self.counts), self.cosines))

    def rows_for(self, cosine: float) -> float:
        """Return the number of other rows at which `best` is this cosine."""
        return float(np.exp(np.interp(cosine, self.cosines, np.log(self.counts))))

    def covered(self, others: int) -> float:
        """Return P(one of ``others`` has encoder and decoder cosine ≥ τ), both independent."""
        both = self.near * np.roll(self.near, 1)
        return float(np.mean(-np.expm1(others * np.log1p(-np.minimum(both, 1 - 1e-16)))))


def cosine_tail(
    cosine: Float[np.ndarray, "*shape"] | float, d_in: int
) -> Float[np.ndarray, "*shape"]:
    """Return P(cosine of two random directions > ``cosine``): ½·I(1 − c²; (D−1)/2, ½) for c ≥ 0."""
    cosine = np.asarray(cosine, dtype=np.float64)
    if d_in == 1:
        return np.where(cosine < 1, np.where(cosine < -1, 1.0, 0.5), 0.0)
    tail = special.betainc((d_in - 1) / 2, 0.5, 1 - np.minimum(np.square(cosine), 1)) / 2
    return np.where(cosine >= 0, tail, 1 - tail)


def covered_by_chance(num_latents: int, d_in: int, threshold: float) -> float:
    """Return P(one of F random rows has encoder and decoder cosine ≥ τ) = 1 − (1 − p²)^F."""
    return float(-np.expm1(num_latents * np.log1p(-np.square(cosine_tail(threshold, d_in)))))


def best_cosine(num_latents: float, d_in: int) -> float:
    """Return the mean cosine of a direction to the nearest of F random ones: ∫ c dP(c)^F."""
    cosines = np.linspace(-1, 1, 100_001)
    below = np.exp(num_latents * np.log1p(-np.minimum(cosine_tail(cosines, d_in), 1 - 1e-16)))
    return float(1 - np.trapezoid(below, cosines))


def _extrapolated(cosine: float, simulated: int, wanted: int, d_in: int) -> float:
    """Extrapolate the mean matched cosine from ``simulated`` to ``wanted`` latents, at equal κ."""

    def missing(kappa: float) -> float:
        return best_cosine(kappa * simulated, d_in) - cosine

    kappa = optimize.root_scalar(missing, bracket=(1e-3, 4.0), xtol=1e-4).root
    return best_cosine(kappa * wanted, d_in)


def kappa(shared: float, null: float) -> float:
    """Return κ = (S − S₀)/(1 − S₀): 0 at the null, 1 if everything is shared."""
    return (shared - null) / (1 - null) if null < 1 else float("nan")


KAPPA = "(S − S₀)/(1 − S₀), S the shared fraction and S₀ that of {}"
_OF_KAPPA = (
    "0 at the null, 1 if everything is shared. Its interval is that of S, with S₀ taken as exact."
)


@measures(
    Column("null_cosine", "mean matched cosine of two dictionaries of random isotropic rows of the "
           "same sizes", "mean", "cos, isotropic",
           advice="`√(2 ln F/D)` is an upper bound on it. Above 4,096 latents it is extrapolated."),
    Column("null_mmcs", "MMCS of the same random dictionaries", "mean"),
    Column("null_shared_fraction", "strict shared fraction of the same random dictionaries",
           "mean", "isotropic S₀", advice="The least that chance gives. 0 means that no "
           "latent was shared in the simulation. Above 4,096 latents it is that of the smaller "
           "problem."),
    Column("null_coverage", "coverage of the same random dictionaries", "mean",
           "covered, isotropic"),
    Column("null_simulated_latents", "latents of the larger of the random dictionaries", "mean"),
    Column("kappa", KAPPA.format("isotropic rows"), "mean", "κ, isotropic", advice=_OF_KAPPA),
    table="nulls",
)  # fmt: skip
def isotropic(pair: Pair) -> tuple[float, ...]:
    drawn = pair.threshold, pair.null_seed, pair.null_draws
    sizes = pair.first.num_latents, pair.second.num_latents
    null = isotropic_null(*sizes, pair.first.d_in, *drawn)
    found = null.cosine, null.best, null.shared_fraction, null.coverage, null.simulated_latents
    return (*found, kappa(shared_fraction(pair), null.shared_fraction))


@measures(
    Column("null_covariance_cosine", "mean matched cosine of rows that are sampled with the "
           "covariance of the held-out activations", "mean", "cos, covariance",
           advice="The chance that the data's shape alone gives: the harder null."),
    Column("null_covariance_mmcs", "MMCS of such rows", "mean"),
    Column("null_covariance_shared_fraction", "strict shared fraction of such rows", "mean",
           "covariance S₀"),
    Column("null_covariance_coverage", "coverage of such rows", "mean", "covered, covariance"),
    Column("kappa_covariance", KAPPA.format("rows sampled with the covariance"), "mean",
           "κ, covariance", advice=_OF_KAPPA),
    needs=("weights", "covariance"),
    table="nulls",
)  # fmt: skip
def of_covariance(pair: Pair) -> tuple[float, ...]:
    drawn = pair.threshold, pair.null_seed, pair.null_draws
    sizes = pair.first.num_latents, pair.second.num_latents
    own, *other = pair.covariances
    null = covariance_null(*sizes, own, *drawn, *other)
    found = null.cosine, null.best, null.shared_fraction, null.coverage
    return (*found, kappa(shared_fraction(pair), null.shared_fraction))


@measures(
    Column("kappa_untrained", KAPPA.format("the untrained weights of the same pairs"), "mean",
           "κ, untrained", advice=_OF_KAPPA),
    Column("untrained_shared_fraction", "strict shared fraction of the initial weights of the same "
           "pairs", "mean", "untrained S₀", advice="Near 1 if the runs start alike: stability may "
           "then be memory of the start. In summary.csv also as `shared_fraction_untrained`, its "
           "former name."),
    needs=("weights", "untrained"),
    table="nulls",
)  # fmt: skip
def untrained_fraction(pair: Pair) -> tuple[float, float]:
    assert pair.start is not None
    by_start = shared_fraction(pair.start)
    return kappa(shared_fraction(pair), by_start), by_start


@measure(
    "untrained_{}",
    family=("index_agreement", "coverage", "cosine_encoder", "cosine_decoder"),
    needs=("weights", "untrained"),
    scale="mean",
    table="nulls",
    help="the measure of this name of the initial weights",
)
def untrained(pair: Pair, name: str) -> float:
    assert pair.start is not None
    return pair.start.value(name)
