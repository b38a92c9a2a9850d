"""Which latents of one dictionary another one has too: the measures of a pair and of n seeds.

Source: Paulo & Belrose, *Sparse Autoencoders Trained on the Same Data Learn Different Features*
(arXiv 2501.16615), with dead latents, one-sided coverage and both sides of a pair spelled out.

Letters: A and B are two dictionaries, c_enc and c_dec the signed cosines of their encoder and
decoder rows, σ_enc and σ_dec the exact matchings under each, τ the threshold, Σ the covariance of
the held-out activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

from reseed.compare.dictionary import Dictionary, root
from reseed.compare.matching import Matching, match, unit_rows

LIVE_SHOWN = (1, 100)
"""Further limits of `live_at_least` at which the live shared fraction is shown."""
_BLOCK_ENTRIES = 1 << 23
"""Cosines held at a time by the coverage: 64 MB a matrix."""


@dataclass(frozen=True, eq=False)
class PairSide:
    """One side of a pair, a value per latent of it.

    Attributes:
        id, seed: the dictionary whose latents these are.
        partner_encoder, partner_decoder: σ_enc and σ_dec; −1 where a latent is unmatched.
        cosine_encoder, cosine_decoder: cosines to these partners; 0 where unmatched.
        agrees: σ_enc(i) = σ_dec(i), with a partner.
        shared: agrees, and both cosines ≥ τ. The paper's strict rule.
        covered: some one latent of the other side, taken or not, has both cosines ≥ τ.
        live: fires often enough in the held-out tokens.
    """

    id: str
    seed: str
    partner_encoder: Int[np.ndarray, " num_latents"]
    partner_decoder: Int[np.ndarray, " num_latents"]
    cosine_encoder: Float[np.ndarray, " num_latents"]
    cosine_decoder: Float[np.ndarray, " num_latents"]
    agrees: Bool[np.ndarray, " num_latents"]
    shared: Bool[np.ndarray, " num_latents"]
    covered: Bool[np.ndarray, " num_latents"]
    live: Bool[np.ndarray, " num_latents"]


@dataclass(frozen=True, eq=False)
class PairResult:
    """All that is measured on one pair.

    Attributes:
        a, b: the two sides, latent by latent.
        measures: the numbers of the pair by name; see `measure_names`.
    """

    a: PairSide
    b: PairSide
    measures: dict[str, float]

    def row(self) -> dict[str, str | float]:
        """The row of ``pairs.csv``."""
        names = {"a": self.a.id, "b": self.b.id, "seed_a": self.a.seed, "seed_b": self.b.seed}
        return {**names, **self.measures}


def compare_pair(
    a: Dictionary, b: Dictionary, threshold: float = 0.7, live_at_least: int = 10
) -> PairResult:
    """Match two dictionaries by encoder and by decoder, and measure what they share.

    A latent whose encoder or decoder row is zero or not finite is left out of both matchings, and
    so never agrees. Matching runs over all other latents; counts over live latents filter it
    afterwards: both partners have to be live.

    Fractions are those of both sides together, 2·#/(|A| + |B|), so that they are the same for
    (A, B) and (B, A); for equally many latents that is the paper's #/F. Only where a dictionary
    repeats a row exactly is the matching, and so the count, one of several that are as good.

    Raises:
        ValueError: dictionaries with different ``d_in``.
        MemoryError: more latents than an exact matching can take.
    """
    if a.d_in != b.d_in:
        raise ValueError(
            f"only dictionaries of the same `d_in` can be compared; {a.id} has {a.d_in}, "
            f"{b.id} has {b.d_in}"
        )
    live_a, live_b = a.live(live_at_least), b.live(live_at_least)
    rows_a, rows_b = _rows(a), _rows(b)
    by_encoder = match(rows_a.encoder, rows_b.encoder)
    # Untrained weights are tied: the second matching is the first.
    by_decoder = (
        by_encoder if rows_a.tied and rows_b.tied else match(rows_a.decoder, rows_b.decoder)
    )
    covered = coverage(rows_a, rows_b, threshold, live_a, live_b)
    sides = (
        _side(a, by_encoder, by_decoder, threshold, covered.a, live_a),
        _side(
            b,
            by_encoder.inverse(),
            by_decoder.inverse(),
            threshold,
            covered.b,
            live_b,
        ),
    )
    correlated = _match_by_correlation(a, b, rows_a, rows_b)
    more = _correlation_measures(a, b, *sides, correlated, threshold)
    return PairResult(*sides, _measures(a, b, *sides, covered, threshold) | more)


def _match_by_correlation(
    a: Dictionary, b: Dictionary, rows_a: UnitRows, rows_b: UnitRows
) -> Matching | None:
    """The matching by eᵀΣe' / √(eᵀΣe · e'ᵀΣe'), the correlation of pre-activations.

    A direction of low variance hardly moves a pre-activation, so training does not identify it
    and the encoder keeps there what it started with; in this metric it hardly counts. It is the
    same matching on rows multiplied by a root of Σ. Two covariances (SAEs of two data sets) are
    averaged; None where one is not known.
    """
    if a.covariance is None or b.covariance is None:
        return None
    scale = root((a.covariance.astype(np.float64) + b.covariance) / 2)
    return match(rows_a.encoder @ scale, rows_b.encoder @ scale)


def _correlation_measures(
    a: Dictionary,
    b: Dictionary,
    side_a: PairSide,
    side_b: PairSide,
    by_correlation: Matching | None,
    threshold: float,
) -> dict[str, float]:
    """The strict rule with correlations in the place of the encoder's cosines; NaN without Σ."""
    names = ("shared_fraction_correlation", "shared_fraction_correlation_live")
    if by_correlation is None:
        return dict.fromkeys((*names, "cosine_correlation"), float("nan"))
    partner = by_correlation.assignment
    near = (by_correlation.cosines >= threshold) & (side_a.cosine_decoder >= threshold)
    shared = near & by_correlation.matched & (partner == side_a.partner_decoder)
    every = Subset(np.ones(a.num_latents, dtype=bool), np.ones(b.num_latents, dtype=bool))
    live = Subset(side_a.live, side_b.live)
    fractions = (subset.fraction(shared, partner) for subset in (every, live))
    return {
        **dict(zip(names, fractions, strict=True)),
        "cosine_correlation": every.mean(by_correlation.cosines, partner),
    }


class UnitRows(NamedTuple):
    """Encoder and decoder rows of length 1; both are zero where one of them has no direction."""

    encoder: Float[np.ndarray, "n d_in"]
    decoder: Float[np.ndarray, "n d_in"]

    @property
    def tied(self) -> bool:
        return np.array_equal(self.encoder, self.decoder)


def _rows(x: Dictionary) -> UnitRows:
    kept = ~x.zero[:, None]
    encoder = unit_rows(np.where(kept, x.encoder, 0.0))
    if np.array_equal(x.encoder, x.decoder):
        return UnitRows(encoder, encoder)
    return UnitRows(encoder, unit_rows(np.where(kept, x.decoder, 0.0)))


class Coverage(NamedTuple):
    """Per latent of A and of B: does one latent of the other side have both cosines ≥ τ?

    ``live_a`` and ``live_b`` ask for a live one.
    """

    a: Bool[np.ndarray, " n"]
    b: Bool[np.ndarray, " m"]
    live_a: Bool[np.ndarray, " n"]
    live_b: Bool[np.ndarray, " m"]


def coverage(
    a: UnitRows,
    b: UnitRows,
    threshold: float,
    live_a: Bool[np.ndarray, " n"],
    live_b: Bool[np.ndarray, " m"],
) -> Coverage:
    """max_j min(c_enc(i, j), c_dec(i, j)) ≥ τ for every i of either side, without any assignment.

    Blocked over A, so that no matrix of all pairs is held.
    """
    n, m = len(a.encoder), len(b.encoder)
    found = Coverage(*(np.zeros(size, dtype=bool) for size in (n, m, n, m)))
    step = max(1, _BLOCK_ENTRIES // m)
    for start in range(0, n, step):
        block = slice(start, start + step)
        near = a.encoder[block] @ b.encoder.T >= threshold
        near &= a.decoder[block] @ b.decoder.T >= threshold
        found.a[block] = near.any(axis=1)
        found.live_a[block] = near[:, live_b].any(axis=1)
        found.b[:] |= near.any(axis=0)
        found.live_b[:] |= near[live_a[block]].any(axis=0)
    return found


def _side(
    x: Dictionary,
    by_encoder: Matching,
    by_decoder: Matching,
    threshold: float,
    covered: Bool[np.ndarray, " n"],
    live: Bool[np.ndarray, " n"],
) -> PairSide:
    agrees = by_encoder.matched & (by_encoder.assignment == by_decoder.assignment)
    near = (by_encoder.cosines >= threshold) & (by_decoder.cosines >= threshold)
    return PairSide(
        id=x.id,
        seed=x.seed,
        partner_encoder=by_encoder.assignment,
        partner_decoder=by_decoder.assignment,
        cosine_encoder=by_encoder.cosines,
        cosine_decoder=by_decoder.cosines,
        agrees=agrees,
        shared=agrees & near,
        covered=covered,
        live=live,
    )


def _measures(
    a: Dictionary,
    b: Dictionary,
    side_a: PairSide,
    side_b: PairSide,
    covered: Coverage,
    threshold: float,
) -> dict[str, float]:
    """The numbers of a pair, in the order of the columns of ``pairs.csv``."""
    every = Subset(np.ones(a.num_latents, dtype=bool), np.ones(b.num_latents, dtype=bool))
    live = Subset(side_a.live, side_b.live)
    encoder, decoder = side_a.partner_encoder, side_a.partner_decoder
    near_decoder = (decoder >= 0) & (side_a.cosine_decoder >= threshold)
    shared = side_a.shared
    return {
        "num_latents_a": a.num_latents,
        "num_latents_b": b.num_latents,
        "shared_latents": int(shared.sum()),
        "shared_fraction": every.fraction(shared, encoder),
        "shared_fraction_live": live.fraction(shared, encoder),
        "ceiling_live": live.ceiling,
        **{
            f"shared_fraction_live_{limit}": Subset(a.live(limit), b.live(limit)).fraction(
                shared, encoder
            )
            for limit in LIVE_SHOWN
        },
        "shared_fraction_not_dead": Subset(~a.dead, ~b.dead).fraction(shared, encoder),
        "shared_fraction_decoder": every.fraction(near_decoder, decoder),
        "shared_fraction_decoder_live": live.fraction(near_decoder, decoder),
        "index_agreement": every.fraction(side_a.agrees, encoder),
        "index_agreement_live": live.fraction(side_a.agrees, encoder),
        "coverage": (_mean(covered.a) + _mean(covered.b)) / 2,
        "coverage_a": _mean(covered.a),
        "coverage_b": _mean(covered.b),
        "coverage_live": (_mean(covered.live_a[live.a]) + _mean(covered.live_b[live.b])) / 2,
        "cosine_encoder": every.mean(side_a.cosine_encoder, encoder),
        "cosine_decoder": every.mean(side_a.cosine_decoder, decoder),
        "cosine_encoder_live": live.mean(side_a.cosine_encoder, encoder),
        "cosine_decoder_live": live.mean(side_a.cosine_decoder, decoder),
        **{
            f"{word}_{letter}": int(flags.sum())
            for word, both in {
                "live": live,
                "dead": (a.dead, b.dead),
                "zero": (a.zero, b.zero),
            }.items()
            for letter, flags in zip("ab", both, strict=True)
        },
    }


class Subset(NamedTuple):
    """The latents of A and of B that are counted."""

    a: Bool[np.ndarray, " n"]
    b: Bool[np.ndarray, " m"]

    def _counts(self, partner: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return (partner >= 0) & self.a & self.b[partner]

    def fraction(self, holds: Bool[np.ndarray, " n"], partner: Int[np.ndarray, " n"]) -> float:
        """2·#/(|A| + |B|), # the matched pairs that hold with both partners counted."""
        size = int(self.a.sum() + self.b.sum())
        return 2 * int((holds & self._counts(partner)).sum()) / size if size else float("nan")

    def mean(self, cosines: Float[np.ndarray, " n"], partner: Int[np.ndarray, " n"]) -> float:
        """Mean cosine of the matched pairs with both partners counted."""
        return _mean(cosines[self._counts(partner)])

    @property
    def ceiling(self) -> float:
        """The largest fraction that the sizes allow: 2·min/(|A| + |B|)."""
        sizes = int(self.a.sum()), int(self.b.sum())
        return 2 * min(sizes) / sum(sizes) if sum(sizes) else float("nan")


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


@dataclass(frozen=True, eq=False)
class SeedProfile:
    """In how many other seeds latents are shared.

    Attributes:
        shared_with: per base seed, m_i of each of its latents (0 … n−1).
        p: p_m for m = 0 … n−1, the distribution of m_i, averaged over base seeds.
        u: u_k for k = 2 … n, the fraction of latents that none of k−1 other seeds share, averaged
            over bases and over the choices of the k−1.
    """

    shared_with: tuple[Int[np.ndarray, " num_latents"], ...]
    p: Float[np.ndarray, " n"]
    u: Float[np.ndarray, " n-1"]

    @property
    def k(self) -> Int[np.ndarray, " n-1"]:
        """The numbers of seeds that `u` is of."""
        return np.arange(2, len(self.p) + 1)


def seed_profile(shared: Sequence[Bool[np.ndarray, "num_latents n-1"]]) -> SeedProfile:
    """p_m and u_k of n seeds.

    Args:
        shared: for each base seed, whether each of its latents is shared with each of the others.
    """
    n = len(shared)
    if n < 2 or any(flags.ndim != 2 or flags.shape[1] != n - 1 for flags in shared):
        shapes = [list(flags.shape) for flags in shared]
        raise ValueError(f"each of n ≥ 2 seeds needs flags [num_latents, n−1]; got {shapes}")
    shared_with = tuple(flags.sum(axis=1, dtype=np.int64) for flags in shared)
    p = np.mean([np.bincount(m, minlength=n) / len(m) for m in shared_with], axis=0)
    return SeedProfile(shared_with, p, unshared_fractions(p))


def unshared_fractions(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n-1"]:
    """u_k for k = 2 … n from p_m: u_k = Σ_m p_m · C(n−1−m, k−1) / C(n−1, k−1).

    A latent that m of the n−1 others share is missed by k−1 of them drawn at random with the odds
    of drawing all from the n−1−m that do not share it.
    """
    n = len(p)
    m, k = np.arange(n), np.arange(2, n + 1)[:, None]
    return (special.comb(n - 1 - m, k - 1) / special.comb(n - 1, k - 1)) @ np.asarray(p)


class PowerLaw(NamedTuple):
    """u_k ≈ a·k^(−b) + c: c is the fraction that no number of seeds would find again."""

    a: float
    b: float
    c: float

    def __call__(self, k: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        return self.a * np.asarray(k, dtype=np.float64) ** -self.b + self.c


def fit_power_law(u: Float[np.ndarray, " n-1"]) -> PowerLaw | None:
    """Least squares of a·k^(−b) + c on u_k for k = 2 … n, with a, b ≥ 0 and 0 ≤ c ≤ 1.

    None with fewer than 4 values (the curve has 3 parameters), where they fall by less than 0.01
    (a flat line does not say where it ends), or where no fit is found.
    """
    if len(u) < 4 or u[0] - u[-1] < 0.01:
        return None
    k = np.arange(2.0, len(u) + 2)
    bounds = ([0, 0, 0], [np.inf, np.inf, 1])
    start = (max(float(u[0] - u[-1]), 1e-3) * 2, 1.0, float(np.clip(u[-1], 0, 1)) / 2)
    try:
        found, _ = optimize.curve_fit(lambda k, a, b, c: a * k**-b + c, k, u, start, bounds=bounds)
    except (RuntimeError, ValueError):
        return None
    return PowerLaw(*map(float, found))
