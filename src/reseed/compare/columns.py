"""Names of the measures of pairs and runs, which are also the columns of the tables; intervals.

This file imports only the standard library, so that a command can check a name quickly.

Columns of ``pairs.csv``. They are computed over both sides together, so that (A, B) and (B, A) give
the same value; ``…_live`` counts only live latents (both partners live), ``_a`` and ``_b`` only one
side.

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
| `shared_fraction_duplicate`, `…_antipodal` | the strict rule among duplicate or antipodal latents (`compare.nearest`) |
| `null_…` | expected for random isotropic rows: `cosine`, `mmcs`, `shared_fraction`, `coverage` |
| `null_covariance_…` | the same for rows drawn with the covariance of the activations |
| `untrained_…` | measured on the initial weights |
| `kappa`, `kappa_covariance`, `kappa_untrained` | (S − S₀)/(1 − S₀) against each of the three |
| `subspace_overlap_…`, `subspace_angles_…` | overlap of the spans of the `orphan`, `shared`, `dense` latents (`compare.subspaces`) |
| `null_subspace_overlap_…`, `null_subspace_angles_…` | overlap of equally many random live latents; angles of random spans |

If runs of a cell differ in `d_in`, `weights_note` marks the pairs concerned, and their columns
above are empty (`reseed.compare.pair`).

A weighted fraction has the same null as the plain one, because firing does not affect the overlap
of random rows.

PW-MCC is from Song et al. (arXiv 2505.20254): the paper writes |cos|, its public code uses the
signed cosine; here the assignment maximises the average itself. `pw_mcc_signed` equals
`cosine_decoder` if every latent has a direction.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

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
TRUTH_PREFIX = "truth_"
"""Prefix of the names of estimates, and of metrics of runs, that need known true features."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its uncertainty over seeds.

    Attributes:
        mean: the estimate.
        low, high: ends of the interval; None if there is none.
        standard_error: standard error on the scale of ``mean``; None if there is none.
        n: number of seeds.
        reason: why there is no interval; empty if there is one.
    """

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    n: int
    reason: str = ""
