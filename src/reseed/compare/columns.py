"""Names of the measures of pairs and runs. They are also the columns of the tables."""

LIVE_SHOWN = (1, 100)
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
    *(f"shared_fraction_live_{limit}" for limit in LIVE_SHOWN),
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
