"""Measures of the weights of a pair. `reseed.compare.registry` describes the declarations.

Fractions are computed over both sides together, so that (A, B) and (B, A) give the same value;
``…_live`` counts only live latents (both partners live), ``…_a`` and ``…_b`` one side.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Bool

from reseed.compare.dictionary import both_cosines
from reseed.compare.pair import Pair, Subset, mean
from reseed.compare.registry import LIVE, SIDES, Column, measure, measures

LIVE_LIMITS = (1, 100)
"""Further values of `live_at_least` for which the live shared fraction is shown."""
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Thresholds for which the strict rule is shown, besides the comparison's own τ."""
PAULO = "Paulo & Belrose, [2501.16615](https://arxiv.org/abs/2501.16615)"


@measure("num_latents_{}", family="ab", needs=(), table="counts", help="latents of each run")
def num_latents(pair: Pair, side: str) -> int:
    return pair.side(side).dictionary.num_latents


@measure("shared_latents", table="counts", help="latents of each run that the other shares")
def shared_latents(pair: Pair) -> int:
    return int(pair.a.shared.sum())


@measure(
    "shared_fraction{}",
    family=LIVE,
    scale="fraction",
    heading="shared",
    shown=(),
    table="shared",
    help="the matchings by encoder and by decoder give the latent the same partner, and both "
    "cosines are at least at the threshold (the strict rule); live: over live latents",
    formula="σ_enc(i) = σ_dec(i) = j, c_enc(i, j) ≥ τ and c_dec(i, j) ≥ τ",
    source=PAULO,
    advice="The measure of the literature. It falls with dead latents, which share nothing, and "
    "with splitting, because only one match counts. It rises with the budget: compare at equal "
    "budgets, and at several. Use the live fraction for SAEs that differ in dead latents; it "
    "depends on the number of held-out tokens.",
)
def shared_fraction(pair: Pair, which: str = "") -> float:
    return pair.latents(which).fraction(pair.a.shared, pair.a.partner_encoder)


@measure(
    "ceiling_live",
    scale="mean",
    heading="ceiling, live",
    table="shared",
    help="the largest live shared fraction that the numbers of live latents allow",
    formula="2·min/(live_A + live_B)",
    advice="Read it beside `shared_fraction_live` if one side has far fewer live latents.",
)
def ceiling_live(pair: Pair) -> float:
    return pair.latents("_live").ceiling


@measure(
    "shared_fraction_live_{}",
    family=LIVE_LIMITS,
    scale="fraction",
    heading="shared live, {} firings",
    shown=(),
    table="shared",
    help="the strict rule over latents that fire at least so often",
    advice="They show whether the limit `comparison.live_at_least` matters.",
)
def shared_fraction_live_at_least(pair: Pair, limit: int) -> float:
    live = Subset(pair.first.live(limit), pair.second.live(limit))
    return live.fraction(pair.a.shared, pair.a.partner_encoder)


@measure(
    "shared_fraction_not_dead",
    scale="fraction",
    heading="shared not dead",
    table="shared",
    help="the strict rule over latents that fired at the end of training, as their partners did",
    advice="As the live fraction, but by the tokens of training.",
)
def shared_fraction_not_dead(pair: Pair) -> float:
    kept = Subset(~pair.first.dead, ~pair.second.dead)
    return kept.fraction(pair.a.shared, pair.a.partner_encoder)


@measure(
    "shared_fraction_decoder{}",
    family=LIVE,
    scale="fraction",
    heading="shared dec",
    table="shared",
    help="matched by the decoder alone, with a cosine at least at the threshold",
    formula="c_dec(i, σ_dec(i)) ≥ τ",
    advice="For questions in which the encoder does not matter. Always at least the strict "
    "fraction.",
)
def shared_fraction_decoder(pair: Pair, which: str) -> float:
    partner = pair.a.partner_decoder
    near = (partner >= 0) & (pair.a.cosine_decoder >= pair.threshold)
    return pair.latents(which).fraction(near, partner)


@measure(
    "index_agreement{}",
    family=LIVE,
    scale="fraction",
    heading="index agreement",
    shown=(),
    table="shared",
    help="the matchings by encoder and by decoder give the latent the same partner",
    formula="σ_enc(i) = σ_dec(i)",
    source="Paulo & Belrose",
    advice="Proves nothing alone: encoders and decoders that start tied have 1 before training.",
)
def index_agreement(pair: Pair, which: str) -> float:
    return pair.latents(which).fraction(pair.a.agrees, pair.a.partner_encoder)


@measure(
    "coverage{}",
    family=SIDES,
    scale="fraction",
    heading="covered",
    table="shared",
    help="some latent of the other run has both cosines at least at the threshold, even if it is "
    "the match of another latent; mean of both directions",
    advice="Needs no assignment, and counts a latent that the other run has split. `coverage_a` is "
    "the fraction of A's latents that B has. Rises with the other run's width.",
)
def coverage(pair: Pair, which: str) -> float:
    if which == "_live":
        return _of_both(pair.a.live_within > 0, pair.b.live_within > 0, which, pair)
    return _of_both(pair.a.covered, pair.b.covered, which, pair)


def _of_both(a: np.ndarray, b: np.ndarray, which: str, pair: Pair) -> float:
    """Return a member of `SIDES`: the mean of one side's values, or of both sides' means."""
    if which == "_live":
        live = pair.latents("_live")
        a, b = a[live.a], b[live.b]
    means = {"_a": mean(a), "_b": mean(b)}
    return means[which] if which in means else (means["_a"] + means["_b"]) / 2


@measure(
    "cosine_{}",
    family=("encoder", "decoder", "encoder_live", "decoder_live"),
    scale="cosine",
    heading="cos {}",
    shown=(),
    table="alike",
    help="mean cosine of all matched latents, by encoder and by decoder (cos enc, cos dec)",
    source="Paulo & Belrose",
    advice="Without a threshold. Compare it with `null_cosine`, which grows with the width.",
)
def matched_cosine(pair: Pair, which: str) -> float:
    of, _, live = which.partition("_")
    cosines, partner = getattr(pair.a, f"cosine_{of}"), getattr(pair.a, f"partner_{of}")
    return pair.latents(live and "_live").mean(cosines, partner)


@measure("live_{}", family="ab", needs=(), table="counts", help="live latents of each run")
def live(pair: Pair, side: str) -> int:
    return int(pair.side(side).live.sum())


@measure("dead_{}", family="ab", needs=(), table="counts", help="dead latents of each run")
def dead(pair: Pair, side: str) -> int:
    return int(pair.side(side).dictionary.dead.sum())


@measure(
    "zero_{}",
    family="ab",
    needs=(),
    table="counts",
    help="latents of each run whose encoder or decoder row is zero or not finite",
)
def zero(pair: Pair, side: str) -> int:
    return int(pair.side(side).dictionary.zero.sum())


@measure(
    "shared_fraction_correlation{}",
    family=LIVE,
    needs=("weights", "covariance"),
    scale="fraction",
    heading="shared corr",
    table="shared",
    help="the strict rule with encoders matched by the correlation of pre-activations on held-out "
    "activations, in which directions of low variance hardly count",
    formula="eᵀΣe′ / √(eᵀΣe · e′ᵀΣe′) in the place of c_enc, Σ the covariance",
    advice="Training does not identify directions in which activations hardly vary, so that they "
    "keep their start; this measure does not count them. The fairer measure of encoders, but not "
    "that of the literature.",
)
def shared_fraction_correlation(pair: Pair, which: str) -> float:
    found = pair.by_correlation
    near = (found.cosines >= pair.threshold) & (pair.a.cosine_decoder >= pair.threshold)
    shared = near & found.matched & (found.assignment == pair.a.partner_decoder)
    return pair.latents(which).fraction(shared, found.assignment)


@measure(
    "cosine_correlation",
    needs=("weights", "covariance"),
    scale="cosine",
    heading="cos corr",
    table="alike",
    help="mean matched correlation of pre-activations",
    advice="As `shared_fraction_correlation`.",
)
def cosine_correlation(pair: Pair) -> float:
    return pair.latents().mean(pair.by_correlation.cosines, pair.by_correlation.assignment)


def _shared_at(pair: Pair, threshold: float) -> Bool[np.ndarray, " n"]:
    return pair.a.agrees & (np.minimum(pair.a.cosine_encoder, pair.a.cosine_decoder) >= threshold)


@measure(
    "shared_fraction_at_{}",
    family=THRESHOLDS,
    scale="fraction",
    heading="shared ≥ {}",
    table="thresholds",
    help="the strict rule with this threshold on both cosines; the matchings do not depend on it",
    advice="They show whether a ranking depends on τ. Below the null's cosine everything is shared "
    "by chance.",
)
def shared_fraction_at(pair: Pair, threshold: float) -> float:
    shared = _shared_at(pair, threshold)
    return pair.latents().fraction(shared, pair.a.partner_encoder)


@measure(
    "shared_fraction_live_at_{}",
    family=THRESHOLDS,
    scale="fraction",
    heading="shared live ≥ {}",
    shown=(),
    table="thresholds",
    help="the same over live latents",
)
def shared_fraction_live_at(pair: Pair, threshold: float) -> float:
    shared = _shared_at(pair, threshold)
    return pair.latents("_live").fraction(shared, pair.a.partner_encoder)


@measure(
    "pw_mcc_{}",
    family=("signed", "absolute"),
    scale="cosine",
    heading="PW-MCC, {}",
    table="alike",
    help="mean matched decoder cosine over the smaller dictionary (Song et al.), signed as in "
    "their code, absolute as in their paper; each with the matching that maximises it",
    formula="Σ over the matching of c_dec or |c_dec|, divided by min(F_A, F_B)",
    source="Song et al., [2505.20254](https://arxiv.org/abs/2505.20254)",
    advice="To compare with their numbers. Considers the decoder alone; dead latents count as they "
    "are, and the null is not 0. The signed one equals `cosine_decoder` if every latent has a "
    "direction.",
)
def pw_mcc(pair: Pair, which: str) -> float:
    found = pair.by_decoder if which == "signed" else pair.by_absolute
    return float(found.cosines.sum()) / min(pair.first.num_latents, pair.second.num_latents)


@measure(
    "shared_fraction_joint{}",
    family=LIVE,
    scale="fraction",
    heading="shared joint",
    table="shared",
    help="one matching of encoder and decoder rows together, with both cosines at least at the "
    "threshold",
    formula="the matching of the rows [E, W]/√2",
    advice="The two matchings do not have to agree, so it is about the strict fraction or more; "
    "much more means that the two matchings disagree among near ties.",
)
def shared_fraction_joint(pair: Pair, which: str) -> float:
    return pair.latents(which).fraction(pair.once(_near_joint), pair.by_joint.assignment)


def _near_joint(pair: Pair) -> Bool[np.ndarray, " n"]:
    """Return true where both cosines with the joint match are at least the threshold."""
    found = pair.by_joint
    i = np.flatnonzero(found.matched)
    near = np.zeros(len(found.matched), dtype=bool)
    near[i] = both_cosines(*pair.rows, i, found.assignment[i]) >= pair.threshold
    return near


@measure(
    "split_fraction{}",
    family=SIDES,
    scale="fraction",
    heading="split",
    table="shared",
    help="at least two latents of the other run have both cosines at least at the threshold",
    advice="Shows how much the one-to-one matching hides.",
)
def split_fraction(pair: Pair, which: str) -> float:
    found = pair.scan
    if which == "_live":
        return pair.latents(which).of_sides(found.live_within_a >= 2, found.live_within_b >= 2)
    split = found.within_a >= 2, found.within_b >= 2
    return _of_both(*split, which, pair) if which else pair.latents().of_sides(*split)


@measure(
    "mutual_nearest{}",
    family=LIVE,
    scale="fraction",
    heading="mutual",
    table="shared",
    help="each latent is the other's nearest by the smaller of both cosines, which is at least at "
    "the threshold",
    advice="Latents do not compete for partners: a latent's neighbour does not depend on the rest "
    "of the matching.",
)
def mutual_nearest(pair: Pair, which: str) -> float:
    return pair.latents(which).of_pairs(*pair.scan.mutual_both)


@measure(
    "mutual_nearest_decoder{}",
    family=LIVE,
    scale="fraction",
    heading="mutual, dec",
    table="shared",
    help="the same by the decoder's cosine",
    advice="As `mutual_nearest`.",
)
def mutual_nearest_decoder(pair: Pair, which: str) -> float:
    return pair.latents(which).of_pairs(*pair.scan.mutual_decoder)


@measure(
    "mmcs{}",
    family=SIDES,
    scale="cosine",
    heading="MMCS",
    table="alike",
    help="mean over latents of the largest decoder cosine, averaged over both directions; "
    "pairs.csv has each",
    formula="mean of max_j c_dec(i, j)",
    source="Sharkey et al. 2022; Huben et al., [2309.08600](https://arxiv.org/abs/2309.08600)",
    advice="Several latents may have the same nearest one: high for a dictionary that has "
    "collapsed.",
)
def mmcs(pair: Pair, which: str) -> float:
    a, b = (np.clip(x.astype(np.float64), -1, 1) for x in pair.scan.by_decoder[:2])
    return _of_both(a, b, which, pair)


@measures(
    Column("map_r2", "fraction of the variance of held-out activations that an orthogonal map from "
           "one model to the other explains", "mean", "R² of map", formula="‖x₀R − y₀‖ minimal",
           source="Schönemann 1966", advice="A shared fraction across models means something only "
           "if it is well above its nulls."),
    Column("map_r2_shuffled", "R² of the map fitted on shuffled tokens", "mean", "R², shuffled"),
    Column("map_r2_random", "R² of maps between either model and the other with random weights",
           "mean", "R², random weights", advice="What the tokens alone give."),
    Column("map_tokens", "tokens of the fit", "mean", "tokens to fit"),
    Column("map_held_out", "tokens on which R² is measured", "mean", "to measure"),
    Column("map_massive", "tokens left out, as their norm in either model exceeds 10 times the "
           "median of the first 4,096", "mean", "left out"),
    Column("map_shuffled_shared_fraction", "strict shared fraction with the map fitted on shuffled "
           "tokens", "mean", "shared, shuffled map"),
    needs=("weights", "map"),
    table="alignment",
)  # fmt: skip
def of_map(pair: Pair) -> tuple[float, ...]:
    found = pair.alignment
    assert found is not None
    by_chance = replace(pair, alignment=found.by_chance(), start=None, cell=None)
    quality = found.r2, found.r2_shuffled, found.r2_random
    return *quality, found.tokens, found.held_out, found.massive, shared_fraction(by_chance)
