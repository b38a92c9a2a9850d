"""Comparison of a pair of dictionaries: their matchings, and the latents that both share.

Source: Paulo & Belrose, *Sparse Autoencoders Trained on the Same Data Learn Different Features*
(arXiv 2501.16615), extended by dead latents, one-sided coverage and both sides of a pair.

Letters: A and B are two dictionaries, c_enc and c_dec the signed cosines of their encoder and
decoder rows, σ_enc and σ_dec the exact matchings under each, τ the threshold, Σ the covariance of
the held-out activations. `reseed.compare.columns` lists the measures of a pair,
`reseed.compare.sharing_profile` has those of several seeds.

The rows of dictionaries that differ in ``d_in`` have no cosine. The weights of such a pair are not
compared: every column is NaN, and no latent has a partner (`incompatible_pair`). The pair is only
compared by its activations on the same tokens (`reseed.compare.activations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isnan, nan
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from reseed.compare.dictionary import Dictionary, Rows, incompatible, root
from reseed.compare.matching import Matcher, Matching, match
from reseed.compare.measures import (
    DENSE,
    PairSide,
    Subset,
    correlation_measures,
    matching_measures,
    pair_measures,
    similarity_measures,
    threshold_measures,
    weighted_measures,
)
from reseed.compare.nearest import Duplicates, scan_pairs

NO_COMMON_SPACE = "runs of different `d_in` have no common space"
"""Reason shown for estimates that are unknown because runs of the cell differ in ``d_in``."""
WEIGHTS_NOTE = "weights_note"
"""Column of the pairs of such a cell: `NO_COMMON_SPACE`; empty for pairs with a common space."""


@dataclass(frozen=True, eq=False)
class PairResult:
    """Result of comparing one pair.

    Attributes:
        a, b: the two sides, latent by latent.
        measures: the measures of the pair by name; see `reseed.compare.columns`.
    """

    a: PairSide
    b: PairSide
    measures: dict[str, float]

    def row(self) -> dict[str, Any]:
        """Return the row of ``pairs.csv``."""
        names = {"a": self.a.id, "b": self.b.id, "seed_a": self.a.seed, "seed_b": self.b.seed}
        return {**names, **self.measures}


def compare_pair(
    a: Dictionary,
    b: Dictionary,
    threshold: float = 0.7,
    live_at_least: int = 10,
    *,
    matcher: Matcher = match,
    brief: bool = False,
    device: str = "cpu",
) -> PairResult:
    """Match two dictionaries by encoder and by decoder, and measure what they share.

    A latent whose encoder or decoder row is zero or not finite is left out of both matchings, and
    so never agrees. All other latents are matched; counts over live latents are filtered
    afterwards: both partners have to be live.

    Fractions are over both sides together, 2·#/(|A| + |B|), so that (A, B) and (B, A) give the
    same; for equally many latents that is the paper's #/F. If a dictionary repeats a row exactly,
    the matching, and so the count, is one of several equally good ones.

    Args:
        matcher: computes every assignment, from the rows as trained, and for the joint assignment
            from unit rows in float32.
        brief: compute only `pair_measures` and `correlation_measures`, with two or three
            assignments instead of five.
        device: device of the pass over all pairs.

    Raises:
        ValueError: dictionaries with different ``d_in``.
        MemoryError: an exact matching of so many latents does not fit into memory.
    """
    if incompatible(a, b):
        raise ValueError(
            f"only dictionaries of the same `d_in` can be compared; {a.id} has {a.d_in}, "
            f"{b.id} has {b.d_in}"
        )
    live = Subset(a.live(live_at_least), b.live(live_at_least))
    rows_a, rows_b = Rows.of(a), Rows.of(b)
    tied = rows_a.tied and rows_b.tied  # true for untrained weights: one matching serves for both
    by_encoder = matcher(rows_a.encoder, rows_b.encoder)
    by_decoder = by_encoder if tied else matcher(rows_a.decoder, rows_b.decoder)
    found = scan_pairs(rows_a, rows_b, threshold, *live, device=device)
    within = (found.within_a, found.live_within_a), (found.within_b, found.live_within_b)
    back = by_encoder.inverse(), by_decoder.inverse()
    side_a = _side(a, by_encoder, by_decoder, threshold, *within[0], live.a)
    side_b = _side(b, *back, threshold, *within[1], live.b)
    correlated = _match_by_correlation(a, b, rows_a, rows_b, matcher)
    measures = pair_measures(a, b, side_a, side_b, threshold)
    measures |= correlation_measures(a, b, side_a, side_b, correlated, threshold)
    if not brief:
        by_absolute = matcher(rows_a.decoder, rows_b.decoder, absolute=True)
        by_joint = by_encoder if tied else matcher(rows_a.joint(), rows_b.joint())
        measures |= threshold_measures(side_a, side_b)
        measures |= matching_measures(
            rows_a, rows_b, by_decoder, by_absolute, by_joint, live, threshold
        )
        measures |= similarity_measures(found, side_a, side_b)
        measures |= weighted_measures(a, b, side_a, side_b)
    return PairResult(side_a, side_b, measures)


def _match_by_correlation(
    a: Dictionary, b: Dictionary, rows_a: Rows, rows_b: Rows, matcher: Matcher
) -> Matching | None:
    """Match by eᵀΣe' / √(eᵀΣe · e'ᵀΣe'), the correlation of pre-activations.

    A direction of low variance hardly moves a pre-activation, so training does not identify it and
    the encoder keeps its initial component there; in this metric that component hardly counts.
    Implemented as a matching of rows multiplied by a root of Σ. Two covariances (SAEs of two data
    sets) are averaged. None if a covariance is not known.
    """
    if a.covariance is None or b.covariance is None:
        return None
    scale = root((a.covariance.astype(np.float64) + b.covariance) / 2)
    return matcher(rows_a.encoder @ scale, rows_b.encoder @ scale)


def _side(
    x: Dictionary,
    by_encoder: Matching,
    by_decoder: Matching,
    threshold: float,
    within: Int[np.ndarray, " n"],
    live_within: Int[np.ndarray, " n"],
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
        within=within,
        live_within=live_within,
        live=live,
    )


def duplicate_measures(pair: PairResult, a: Duplicates, b: Duplicates) -> dict[str, float]:
    """Return the shared fraction among duplicate latents, and among antipodal ones."""
    if isnan(pair.measures["shared_fraction"]):  # no common space
        return {f"shared_fraction_{word}": nan for word in ("duplicate", "antipodal")}
    return {
        f"shared_fraction_{word}": Subset(getattr(a, word), getattr(b, word)).of_sides(
            pair.a.shared, pair.b.shared
        )
        for word in ("duplicate", "antipodal")
    }


def incompatible_pair(a: Dictionary, b: Dictionary, live_at_least: int) -> PairResult:
    """Return a result in the form of `compare_pair`: sizes and counts, else NaN."""
    measures: dict[str, float] = dict.fromkeys(_names(), float("nan"))
    for letter, x in (("a", a), ("b", b)):
        measures |= {
            f"num_latents_{letter}": x.num_latents,
            f"live_{letter}": int(x.live(live_at_least).sum()),
            f"dead_{letter}": int(x.dead.sum()),
            f"zero_{letter}": int(x.zero.sum()),
            f"dense_{letter}": int((x.density > DENSE).sum()),
        }
    return PairResult(_empty_side(a, live_at_least), _empty_side(b, live_at_least), measures)


def _empty_side(x: Dictionary, live_at_least: int) -> PairSide:
    none, nothing = np.full(x.num_latents, -1), np.zeros(x.num_latents)
    never, zero = np.zeros(x.num_latents, dtype=bool), np.zeros(x.num_latents, dtype=np.int64)
    return PairSide(
        id=x.id,
        seed=x.seed,
        partner_encoder=none,
        partner_decoder=none,
        cosine_encoder=nothing,
        cosine_decoder=nothing,
        agrees=never,
        shared=never,
        within=zero,
        live_within=zero,
        live=x.live(live_at_least),
    )


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    """Return the names of a pair's measures, from comparing a pair of single latents."""
    one = Dictionary(
        id="one",
        seed="0",
        encoder=np.ones((1, 1)),
        decoder=np.ones((1, 1)),
        firing=np.zeros(1, dtype=np.int64),
        held_out_tokens=0,
        dead=np.zeros(1, dtype=bool),
    )
    return tuple(compare_pair(one, one).measures)
