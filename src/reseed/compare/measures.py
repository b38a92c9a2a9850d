"""The measures of a pair, from its two sides and the pass over all pairs of its latents.

Columns of ``pairs.csv``. They are taken over both sides together, so that (A, B) and (B, A) give
the same; ``…_live`` counts only live latents (both partners live), ``_a`` and ``_b`` one side.

| column | is |
| :-- | :-- |
| `shared_latents`, `shared_fraction` | the strict rule: both matchings give the same partner, both cosines ≥ τ |
| `shared_fraction_live_1`, `…_100`, `…_not_dead` | the same among latents that fire at least 1 or 100 times; that are not dead |
| `shared_fraction_at_0.3` … `_at_0.9`, `shared_fraction_live_at_…` | the strict rule at other τ |
| `shared_fraction_decoder` | matched by the decoder, its cosine ≥ τ |
| `shared_fraction_correlation` | the strict rule with correlations of pre-activations instead of encoder cosines |
| `shared_fraction_joint` | partners by a single matching of [E, W]/√2, both cosines ≥ τ; no two matchings have to agree |
| `shared_fraction_by_firing` | the strict rule, each latent weighted by its firing |
| `shared_fraction_by_variance` | the strict rule, each latent weighted by the variance of its contribution a·W on held-out tokens |
| `shared_fraction_dense`, `…_sparse` | among latents with density > 0.1; among other latents that fired |
| `index_agreement` | both matchings give the same partner |
| `coverage` | some latent of the other side, matched elsewhere or not, has both cosines ≥ τ |
| `split_fraction` | two or more latents of the other side have both cosines ≥ τ |
| `mutual_nearest`, `mutual_nearest_decoder` | mutual nearest neighbours, by min(c_enc, c_dec) and by c_dec, at ≥ τ |
| `mmcs` | mean over latents of the largest decoder cosine (MMCS) |
| `cosine_encoder`, `cosine_decoder` | mean cosine of matched pairs |
| `pw_mcc_signed`, `pw_mcc_absolute` | mean matched decoder cosine over min(F_A, F_B), unmatched as 0 |

`reseed.compare.cell` adds:

| column | is |
| :-- | :-- |
| `shared_fraction_duplicate`, `…_antipodal` | the strict rule among duplicate or antipodal latents (`compare.repeats`) |
| `null_…` | expected for random isotropic rows: `cosine`, `mmcs`, `shared_fraction`, `coverage` |
| `null_covariance_…` | the same for rows drawn with the covariance of the activations |
| `untrained_…` | measured on the initial weights |
| `kappa`, `kappa_covariance`, `kappa_untrained` | (S − S₀)/(1 − S₀) against each of the three |
| `subspace_overlap_…`, `subspace_angles_…` | overlap of the spans of the `orphan`, `shared`, `dense` latents (`compare.subspaces`) |
| `null_subspace_overlap_…`, `null_subspace_angles_…` | equally many random live latents; random spans |

If runs of a cell differ in `d_in`, `weights_note` marks the pairs concerned, and their columns
above are empty (`reseed.compare.pair`).

A weighted fraction has the same null as the plain one, because firing does not affect the overlap
of random rows.

PW-MCC is from Song et al. (arXiv 2505.20254): the paper writes |cos|, its public code uses the
signed cosine; here the assignment maximises the average itself. `pw_mcc_signed` equals
`cosine_decoder` if every latent has a direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from reseed.compare.dictionary import Dictionary, Rows, both_cosines
from reseed.compare.matching import Matching
from reseed.compare.nearest import PairScan

if TYPE_CHECKING:
    from reseed.compare.pair import PairSide

# MERGED Names of the measures of pairs and runs. They are also the columns of the tables.
LIVE_LIMITS = (1, 100)
"""Further values of `live_at_least` for which the live shared fraction is shown."""
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds for which the strict rule is shown, besides the comparison's own τ."""
GROUPS = ("orphan", "shared", "dense")
"""Sets of latents whose spans are compared (`reseed.compare.subspaces`)."""

SURROGATES = {"gaussian": "Gaussian activations", "random_weights": "random weights"}
"""Null models on which SAEs are trained: suffix of the model's label (``embedded+gaussian``) →
name. The null that preserves least of the model comes first."""

FRACTIONS = (
    "shared_fraction",
    "shared_fraction_live",
    *(f"shared_fraction_live_{limit}" for limit in LIVE_LIMITS),
    "shared_fraction_not_dead",
    "shared_fraction_decoder",
    "shared_fraction_decoder_live",
    "shared_fraction_correlation",
    "shared_fraction_correlation_live",
    "index_agreement",
    "index_agreement_live",
    "coverage",
    "coverage_live",
    *(f"shared_fraction_at_{tau}" for tau in THRESHOLDS),
    *(f"shared_fraction_live_at_{tau}" for tau in THRESHOLDS),
    "shared_fraction_joint",
    "shared_fraction_joint_live",
    "shared_fraction_by_firing",
    "shared_fraction_by_variance",
    "shared_fraction_dense",
    "shared_fraction_sparse",
    "split_fraction",
    "split_fraction_live",
    "mutual_nearest",
    "mutual_nearest_live",
    "mutual_nearest_decoder",
    "mutual_nearest_decoder_live",
    "shared_fraction_duplicate",
    "shared_fraction_antipodal",
)
COSINES = (
    "cosine_encoder",
    "cosine_decoder",
    "cosine_encoder_live",
    "cosine_decoder_live",
    "cosine_correlation",
    "mmcs",
    "mmcs_live",
    "pw_mcc_signed",
    "pw_mcc_absolute",
    *(f"subspace_{measure}_{group}" for measure in ("overlap", "angles") for group in GROUPS),
)
UNTRAINED = (
    "shared_fraction",
    "index_agreement",
    "coverage",
    "cosine_encoder",
    "cosine_decoder",
)
"""Measures that are also computed on the initial weights: columns ``untrained_…`` of the pairs."""
RUN_COLUMNS = (
    "run",
    "seed",
    "num_latents",
    "d_in",
    "held_out_tokens",
    "live_fraction",
    "zero_latents",
    "reproducibility_alpha",
    "reproducibility_beta",
)
"""Columns of `CellResult.runs` that come before the metrics of the runs."""


DENSE = 0.1
"""A latent that fires on more than this fraction of the tokens is dense."""


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
        """Return 2·#/(|A| + |B|), # = matched pairs that hold with both partners counted."""
        return _divided(2 * int((holds & self._counts(partner)).sum()), self.size)

    def mean(self, cosines: Float[np.ndarray, " n"], partner: Int[np.ndarray, " n"]) -> float:
        """Return the mean cosine of the matched pairs with both partners counted."""
        return mean(cosines[self._counts(partner)])

    def of_pairs(self, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]) -> float:
        """Return 2·#/(|A| + |B|), # = given pairs (i, j) with both latents counted."""
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
    """Apply the strict rule with correlations instead of encoder cosines; NaN without Σ."""
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
    """Compute the measures without assignment: splitting, mutual nearest neighbours, MMCS."""
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
