"""Functions that compute the measures of a pair; `reseed.compare.columns` describes each measure.

The functions take the two sides of the pair (`PairSide`), which have a value per latent, and the
result of the pass over all pairs of latents (`PairScan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from reseed.compare.columns import LIVE_LIMITS, THRESHOLDS
from reseed.compare.dictionary import Dictionary, Rows, both_cosines
from reseed.compare.matching import Matching
from reseed.compare.nearest import PairScan

DENSE = 0.1
"""A latent that fires on more than this fraction of the tokens is dense."""


@dataclass(frozen=True, eq=False)
class PairSide:
    """One side of a pair, with a value per latent.

    Attributes:
        id, seed: id and seed of the dictionary.
        partner_encoder, partner_decoder: σ_enc and σ_dec; −1 where a latent is unmatched.
        cosine_encoder, cosine_decoder: cosines to these partners; 0 where unmatched.
        agrees: true if there is a partner and σ_enc(i) = σ_dec(i).
        shared: true if `agrees` and both cosines ≥ τ (the paper's strict rule).
        within: number of latents of the other side, matched elsewhere or not, with both cosines
            ≥ τ.
        live_within: the number of live latents among them.
        live: true if the latent fires often enough in the held-out tokens.
    """

    id: str
    seed: str
    partner_encoder: Int[np.ndarray, " num_latents"]
    partner_decoder: Int[np.ndarray, " num_latents"]
    cosine_encoder: Float[np.ndarray, " num_latents"]
    cosine_decoder: Float[np.ndarray, " num_latents"]
    agrees: Bool[np.ndarray, " num_latents"]
    shared: Bool[np.ndarray, " num_latents"]
    within: Int[np.ndarray, " num_latents"]
    live_within: Int[np.ndarray, " num_latents"]
    live: Bool[np.ndarray, " num_latents"]

    @property
    def covered(self) -> Bool[np.ndarray, " num_latents"]:
        """Latents for which some latent of the other side has both cosines ≥ τ."""
        return self.within > 0


class Subset(NamedTuple):
    """Masks of the latents of A and of B that are counted."""

    a: Bool[np.ndarray, " n"]
    b: Bool[np.ndarray, " m"]

    @property
    def size(self) -> int:
        return int(self.a.sum() + self.b.sum())

    def _counts(self, partner: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return (partner >= 0) & self.a & self.b[partner]

    def fraction(self, holds: Bool[np.ndarray, " n"], partner: Int[np.ndarray, " n"]) -> float:
        """Return 2·#/(|A| + |B|), # = number of counted matched pairs with ``holds`` true."""
        return _divided(2 * int((holds & self._counts(partner)).sum()), self.size)

    def mean(self, cosines: Float[np.ndarray, " n"], partner: Int[np.ndarray, " n"]) -> float:
        """Return the mean cosine of the matched pairs with both partners counted."""
        return mean(cosines[self._counts(partner)])

    def of_pairs(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> float:
        """Return 2·#/(|A| + |B|), # = number of given pairs (i, j) with both latents counted."""
        return _divided(2 * int((self.a[i] & self.b[j]).sum()), self.size)

    def of_sides(self, a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " m"]) -> float:
        """Return the fraction of the counted latents of both sides whose flag is set."""
        return _divided(int(a[self.a].sum() + b[self.b].sum()), self.size)

    @property
    def ceiling(self) -> float:
        """Largest fraction that the sizes allow: 2·min/(|A| + |B|)."""
        return _divided(2 * min(int(self.a.sum()), int(self.b.sum())), self.size)


def pair_measures(
    a: Dictionary, b: Dictionary, side_a: PairSide, side_b: PairSide, threshold: float
) -> dict[str, float]:
    """Compute the measures that follow from the two matchings and the coverage."""
    every, live = _every(a, b), Subset(side_a.live, side_b.live)
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
            for limit in LIVE_LIMITS
        },
        "shared_fraction_not_dead": Subset(~a.dead, ~b.dead).fraction(shared, encoder),
        "shared_fraction_decoder": every.fraction(near_decoder, decoder),
        "shared_fraction_decoder_live": live.fraction(near_decoder, decoder),
        "index_agreement": every.fraction(side_a.agrees, encoder),
        "index_agreement_live": live.fraction(side_a.agrees, encoder),
        "coverage": (mean(side_a.covered) + mean(side_b.covered)) / 2,
        "coverage_a": mean(side_a.covered),
        "coverage_b": mean(side_b.covered),
        "coverage_live": (
            mean(side_a.live_within[live.a] > 0) + mean(side_b.live_within[live.b] > 0)
        )
        / 2,
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


def correlation_measures(
    a: Dictionary,
    b: Dictionary,
    side_a: PairSide,
    side_b: PairSide,
    by_correlation: Matching | None,
    threshold: float,
) -> dict[str, float]:
    """Compute the strict rule with correlations instead of encoder cosines; NaN without Σ."""
    names = ("shared_fraction_correlation", "shared_fraction_correlation_live")
    if by_correlation is None:
        return dict.fromkeys((*names, "cosine_correlation"), float("nan"))
    partner = by_correlation.assignment
    near = (by_correlation.cosines >= threshold) & (side_a.cosine_decoder >= threshold)
    shared = near & by_correlation.matched & (partner == side_a.partner_decoder)
    every, live = _every(a, b), Subset(side_a.live, side_b.live)
    fractions = (subset.fraction(shared, partner) for subset in (every, live))
    return {
        **dict(zip(names, fractions, strict=True)),
        "cosine_correlation": every.mean(by_correlation.cosines, partner),
    }


def threshold_measures(side_a: PairSide, side_b: PairSide) -> dict[str, float]:
    """Apply the strict rule at each of `THRESHOLDS`, with the same matchings."""
    every = Subset(np.ones_like(side_a.live), np.ones_like(side_b.live))
    live = Subset(side_a.live, side_b.live)
    smaller = np.minimum(side_a.cosine_encoder, side_a.cosine_decoder)
    return {
        f"{name}_at_{tau}": subset.fraction(
            side_a.agrees & (smaller >= tau), side_a.partner_encoder
        )
        for name, subset in (("shared_fraction", every), ("shared_fraction_live", live))
        for tau in THRESHOLDS
    }


def similarity_measures(found: PairScan, side_a: PairSide, side_b: PairSide) -> dict[str, float]:
    """Compute the measures that need no assignment: splitting, mutual nearest neighbours, MMCS."""
    live = Subset(side_a.live, side_b.live)
    every = Subset(np.ones_like(live.a), np.ones_like(live.b))
    split = found.within_a >= 2, found.within_b >= 2
    live_split = found.live_within_a >= 2, found.live_within_b >= 2
    best = [np.clip(x.astype(np.float64), -1, 1) for x in found.by_decoder[:2]]
    return {
        "split_fraction": every.of_sides(*split),
        "split_fraction_a": mean(split[0]),
        "split_fraction_b": mean(split[1]),
        "split_fraction_live": live.of_sides(*live_split),
        "mutual_nearest": every.of_pairs(*found.mutual_both),
        "mutual_nearest_live": live.of_pairs(*found.mutual_both),
        "mutual_nearest_decoder": every.of_pairs(*found.mutual_decoder),
        "mutual_nearest_decoder_live": live.of_pairs(*found.mutual_decoder),
        "mmcs": (mean(best[0]) + mean(best[1])) / 2,
        "mmcs_a": mean(best[0]),
        "mmcs_b": mean(best[1]),
        "mmcs_live": (mean(best[0][live.a]) + mean(best[1][live.b])) / 2,
    }


def matching_measures(
    rows_a: Rows,
    rows_b: Rows,
    by_decoder: Matching,
    by_absolute: Matching,
    by_joint: Matching,
    live: Subset,
    threshold: float,
) -> dict[str, float]:
    """Compute PW-MCC, and the fractions shared by the joint matching of encoder and decoder."""
    every = Subset(np.ones_like(live.a), np.ones_like(live.b))
    smaller = min(len(rows_a), len(rows_b))
    partner = by_joint.assignment
    i = np.flatnonzero(by_joint.matched)
    near = np.zeros(len(rows_a), dtype=bool)
    near[i] = both_cosines(rows_a, rows_b, i, partner[i]) >= threshold
    return {
        "pw_mcc_signed": float(by_decoder.cosines.sum()) / smaller,
        "pw_mcc_absolute": float(by_absolute.cosines.sum()) / smaller,
        "shared_fraction_joint": every.fraction(near, partner),
        "shared_fraction_joint_live": live.fraction(near, partner),
    }


def weighted_measures(
    a: Dictionary, b: Dictionary, side_a: PairSide, side_b: PairSide
) -> dict[str, float]:
    """Apply the strict rule with weights, and separately to dense and to sparse latents."""
    shared = side_a.shared, side_b.shared
    dense = Subset(a.density > DENSE, b.density > DENSE)
    sparse = Subset((a.firing > 0) & ~dense.a, (b.firing > 0) & ~dense.b)
    variances = (a.variance, b.variance)
    return {
        "shared_fraction_by_firing": _weighted(shared, (a.firing, b.firing)),
        "shared_fraction_by_variance": float("nan")
        if variances[0] is None or variances[1] is None
        else _weighted(shared, (variances[0], variances[1])),
        "shared_fraction_dense": dense.of_sides(*shared),
        "shared_fraction_sparse": sparse.of_sides(*shared),
        "dense_a": int(dense.a.sum()),
        "dense_b": int(dense.b.sum()),
    }


def _weighted(flags: tuple[np.ndarray, np.ndarray], weights: tuple[np.ndarray, np.ndarray]):
    total = sum(float(w.sum()) for w in weights)
    part = sum(float(w[f].sum()) for f, w in zip(flags, weights, strict=True))
    return _divided(min(part, total), total)  # rounding could make the fraction exceed 1


def _every(a: Dictionary, b: Dictionary) -> Subset:
    return Subset(np.ones(a.num_latents, dtype=bool), np.ones(b.num_latents, dtype=bool))


def mean(values: np.ndarray) -> float:
    """Return the mean; NaN if there are no values."""
    return float(values.mean()) if values.size else float("nan")


def _divided(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
