"""Measures on activations as columns of a cell's tables, added to the measures on weights.

Means are over matched latents that are both live, from both sides. *Orphan* latents are those that
the strict rule does not share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float

from reseed.compare.activations.measures import (
    ActivationMeasures,
    AllWeightMatches,
    LatentMeasures,
    WeightMatches,
)
from reseed.compare.activations.substitution import clip_quality, quality_by_coverage
from reseed.compare.cell import CellResult
from reseed.compare.pair import Subset
from reseed.compare.pairing import without_intervals
from reseed.compare.registry import (
    ALIKE,
    LIVE,
    NOTE,
    TOKENS,
    Column,
    Measure,
    View,
    columns,
    declared,
    evaluate,
    measure,
    measures,
)
from reseed.compare.statistics import known_mean
from reseed.compare.tables import lists, pair_estimates

TOPS = (100, 2_000)
"""Values of r for which the tables show the mean R of the r highest-ranking matches."""
KINDS = ("shared", "orphan")


@dataclass(frozen=True, eq=False)
class PairOnTokens(View):
    """The activations of a pair of runs on the same held-out tokens.

    Attributes:
        measured: the measures of all runs of the cell.
        matches: the matches by weights of every ordered pair.
        s, t: indices of A and B in the cell.
    """

    measured: ActivationMeasures
    matches: AllWeightMatches
    s: int
    t: int

    @property
    def known(self) -> frozenset[str]:
        return frozenset(["activations", *(["matched"] if self.measured.matched else [])])

    @property
    def latents(self) -> LatentMeasures:
        """Measures of the latents of A against B."""
        return self.measured.latents[self.s, self.t]

    @property
    def both(self) -> list[tuple[LatentMeasures, WeightMatches]]:
        """Measures and matches of A's latents, and of B's."""
        ordered = ((self.s, self.t), (self.t, self.s))
        return [(self.measured.latents[p], self.matches[p]) for p in ordered]

    def mean(self, column: Callable[[LatentMeasures], np.ndarray], kind: str = "") -> float:
        """Return the mean of a value per latent; kind "shared" or "orphan" selects latents."""
        known = [column(found)[_mask(found, side, kind)] for found, side in self.both]
        return known_mean(np.concatenate(known))


def _curves(pair: PairOnTokens) -> list[Float[np.ndarray, " known"]]:
    """Return, for each side, the mean R of the r matches that rank highest, for each r."""
    found = []
    for latents, _ in pair.both:
        kept = latents.both_live
        quality = clip_quality(latents.substitution.quality[kept])
        found.append(quality_by_coverage(quality, latents.match_cosine[kept]))
    return found


def _mask(found: LatentMeasures, side: WeightMatches, kind: str) -> Bool[np.ndarray, " F"]:
    """Return a mask of latents live on both sides: all, the "shared", or the "orphan" ones."""
    if not kind:
        return found.both_live
    return found.both_live & (side.shared if kind == "shared" else ~side.shared)


@measure(
    "shared_and_alike{}",
    family=LIVE,
    needs="activations",
    scale="fraction",
    heading="shared and alike",
    table="activations",
    help="shared by the strict rule, and the activations of both latents have a correlation of at "
    f"least {ALIKE:g}; over the same latents as `shared_fraction`",
    advice="Latents with similar rows can fire on other text: shows how much of `shared_fraction` "
    "does not. A latent that never fires on these tokens has no correlation and does not count, "
    "so it falls with rare latents and with fewer `comparison.activation_tokens`.",
)
def shared_and_alike(pair: PairOnTokens, which: str) -> float:
    sides = [side for _, side in pair.both]
    if not (sides[0].partner >= 0).any():  # rows without a common space have no matches
        return float("nan")
    kept = (side.live | (not which) for side in sides)
    alike = pair.latents.agreement.pearson >= ALIKE
    return Subset(*kept).fraction(sides[0].shared & alike, sides[0].partner)


@measure(
    "agreement_pearson_{}",
    family=KINDS,
    needs="activations",
    scale="number",
    heading="Pearson, {}",
    table="activations",
    help="mean correlation of the activations of a latent and its match, over shared pairs and "
    "over the other ones (orphan)",
    advice="Shows whether both do the same on text. Noisy for a latent with few firings.",
)
def agreement_pearson(pair: PairOnTokens, kind: str) -> float:
    return pair.mean(lambda found: found.agreement.pearson, kind)


@measure(
    "agreement_jaccard_{}",
    family=KINDS,
    needs="activations",
    scale="number",
    heading="Jaccard, {}",
    table="activations",
    help="mean overlap of the tokens on which a latent and its match fire",
    formula="tokens on which both fire, divided by those on which one does",
    advice="Strict: it falls if one of the two has a lower threshold.",
)
def agreement_jaccard(pair: PairOnTokens, kind: str) -> float:
    return pair.mean(lambda found: found.agreement.jaccard, kind)


@measures(
    Column("cka_codes", "linear CKA of latents, without any matching",
           "number", "CKA, latents", formula="unbiased, over minibatches",
           source="Kornblith et al. 2019; Nguyen et al., "
           "[2010.15327](https://arxiv.org/abs/2010.15327)",
           advice="Two SAEs that reconstruct well can be alike by it, whatever their latents."),
    Column("cka_reconstructions", "linear CKA of reconstructions", "number", "CKA, output",
           advice="As `cka_codes`."),
    needs="activations",
    table="activations",
)  # fmt: skip
def cka(pair: PairOnTokens) -> tuple[float, float]:
    found = pair.measured.cka_codes, pair.measured.cka_reconstructions
    return float(found[0][pair.s, pair.t]), float(found[1][pair.s, pair.t])


@measure(
    "substitution{}",
    family=("", "_shared", "_orphan"),
    needs="activations",
    scale="number",
    heading="R",
    shown=("", "_shared", "_orphan"),
    table="substitution",
    help="the fraction of the damage of ablating a latent that its match repairs in its place, as "
    "a mean of R bounded to 0 … 1: over all these latents, over shared and over orphan ones",
    formula="R = 1 − ΔL(replaced by the match)/ΔL(taken out), L the squared error",
    source="stitching: Leask et al., [2502.04878](https://arxiv.org/abs/2502.04878)",
    advice="Shows whether the match can replace the latent. Without bounds the mean would be that "
    "of the few latents whose damage is nearly 0; with them it is at least 0 even if matches do "
    "harm.",
)
def substitution(pair: PairOnTokens, kind: str) -> float:
    return pair.mean(lambda found: clip_quality(found.substitution.quality), kind.strip("_"))


@measure(
    "substitution_pooled_{}",
    family=KINDS,
    needs="activations",
    scale="number",
    table="substitution",
    help="the same without bounds, summed over latents",
    formula="Σ repaired / Σ damage",
    advice="May be below 0 or above 1. Latents count by what they explain, so a few large ones "
    "decide.",
)
def substitution_pooled(pair: PairOnTokens, kind: str) -> float:
    sums = [found.substitution.pooled(_mask(found, side, kind)) for found, side in pair.both]
    repaired, damage = np.sum(sums, axis=0)
    return float(repaired / damage) if damage > 0 else float("nan")


@measures(
    Column("substitution_best_scale", "R with the match at its best scale", "number", "best scale",
           advice="Shows how much of what is missing is size alone."),
    Column("substitution_second_best", "R with the second best match", "number", "second best",
           advice="A hard negative: R means something only above it."),
    Column("substitution_random", "R with a random latent of equal firing", "number", "random",
           advice="A hard negative, too."),
    needs="activations",
    table="substitution",
)  # fmt: skip
def substitution_by_others(pair: PairOnTokens) -> tuple[float, float, float]:
    return (
        pair.mean(lambda found: clip_quality(found.substitution.quality_best)),
        pair.mean(lambda found: clip_quality(found.second_best.quality)),
        pair.mean(lambda found: clip_quality(found.random.quality)),
    )


@measure(
    "substitution_area",
    needs="activations",
    scale="number",
    heading="area",
    table="substitution",
    help="mean over r of the mean R of the r matches with the highest cosines",
    source="quality–coverage curve",
    advice="Does not depend on a threshold.",
)
def substitution_area(pair: PairOnTokens) -> float:
    return known_mean(np.array([known_mean(curve) for curve in pair.once(_curves)]))


@measure(
    "substitution_top_{}",
    family=TOPS,
    needs="activations",
    scale="number",
    heading="top {:,}",
    table="substitution",
    help="that mean R at one r",
    advice="Empty if fewer latents have a match.",
)
def substitution_top(pair: PairOnTokens, top: int) -> float:
    ends = [curve[top - 1] if len(curve) >= top else np.nan for curve in pair.once(_curves)]
    return known_mean(np.array(ends))


@measure(
    "novel_fraction{}",
    family=("", "_a", "_b"),
    needs="activations",
    scale="fraction",
    heading="novel",
    table="activations",
    help="fraction of live latents that lower the other run's error when added to it",
    source="Leask et al.",
    advice="If SAEs shrink their reconstructions, as ReLU's do, any latent that points along them "
    "lowers the error: it then reflects shrinkage. `novel_fraction_a`: A's latents, added to B.",
)
def novel_fraction(pair: PairOnTokens, which: str) -> float:
    a, b = (known_mean(_below_zero(found.insertion[side.live])) for found, side in pair.both)
    return {"_a": a, "_b": b}.get(which, (a + b) / 2)


def _below_zero(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return 1 for a negative value, 0 for another, NaN for NaN."""
    return np.where(np.isnan(values), np.nan, values < 0)


@measures(
    Column("agreement_pearson_matched", "mean correlation of latents that are matched by their "
           "activations, in cells whose runs read different activations", "number"),
    Column("agreement_jaccard_matched", "mean overlap of the tokens on which these fire", "number"),
    Column("agreement_fraction_matched", "live latents whose correlation is at least the threshold",
           "number", formula="2·#/(live_A + live_B)"),
    needs=("activations", "matched"),
    table="activations",
)  # fmt: skip
def matched(pair: PairOnTokens) -> tuple[float, float, float]:
    return pair.measured.matched[min(pair.s, pair.t), max(pair.s, pair.t)]


@measures(
    Column("pearson", "correlation with the activations of the match by decoder"),
    Column("jaccard", "overlap of the tokens on which both fire"),
    Column("match_cosine", "the smaller of both cosines with that match"),
    Column("substitution", "R of that match, without bounds"),
    Column("insertion", "change of the other run's error if the latent is added to it, as a "
           "fraction of that error"),
    level="latent",
    needs="activations",
    table="latents",
)  # fmt: skip
def latent_columns(pair: PairOnTokens) -> tuple[Float[np.ndarray, " F"], ...]:
    found = pair.latents
    more = found.match_cosine, found.substitution.quality, found.insertion
    return found.agreement.pearson, found.agreement.jaccard, *more


def weight_matches(cell: CellResult) -> AllWeightMatches:
    """Return the matches by weights of every ordered pair of the cell's runs."""
    runs = cell.runs["run"].tolist()
    found = {}
    for s, run in enumerate(runs):
        rows = cell.latents.filter(pc.field("run") == run)
        others = rows["others"][0].as_py()
        partners, shared = (lists(rows, name) for name in ("partner_decoder", "shared"))
        live, firing = (rows[name].to_numpy() for name in ("live", "firing"))
        for i, other in enumerate(others):
            partner = np.ascontiguousarray(partners[:, i], dtype=np.int64)
            flags = np.ascontiguousarray(shared[:, i])
            found[s, runs.index(other)] = WeightMatches(partner, flags, live.copy(), firing.copy())
    return found


def activation_measures(pair: PairOnTokens) -> dict[str, float]:
    """Return the columns of one pair."""
    return evaluate(_of_pairs("matched" in pair.known), pair)


def _of_pairs(matched: bool) -> list[Measure]:
    """Return the measures of pairs, those of latents matched by their activations last and only if
    ``matched``."""
    return [m for m in declared("pair", "activations") if matched or "matched" not in m.needs]


def with_activations(
    cell: CellResult, measured: ActivationMeasures | None, note: str = ""
) -> CellResult:
    """Return the cell with the measures on activations of pairs and latents, and their estimates.

    Args:
        measured: measures of the cell's runs, in their order; None if they could not be computed;
            the columns are then NaN.
        note: the reason why they could not be computed.
    """
    n, sides = cell.n_seeds, weight_matches(cell)
    runs = cell.runs["run"].tolist()
    pairs = cell.pairs.copy()
    places = zip(map(runs.index, pairs["a"]), map(runs.index, pairs["b"]), strict=True)
    wanted = _of_pairs(measured is not None and bool(measured.matched))
    named = {column.name: column for own in wanted for column in own.own}
    rows = [
        activation_measures(PairOnTokens(measured, sides, s, t)) if measured else {}
        for s, t in places
    ]
    for name in named:
        pairs[name] = [float(row.get(name, np.nan)) for row in rows]
    pairs[TOKENS] = measured.tokens if measured else 0
    pairs[NOTE] = note
    estimates = pair_estimates(pairs, named, cell.settings, n)
    if not cell.settings.pairs_are_a_sample and measured and measured.matched:
        estimates = without_intervals(estimates, cell.settings)
    return replace(
        cell,
        pairs=pairs,
        latents=_with_lists(cell, measured, sides),
        estimates={**cell.estimates, **estimates},
    )


def _with_lists(
    cell: CellResult, measured: ActivationMeasures | None, sides: AllWeightMatches
) -> pa.Table:
    n, table = cell.n_seeds, cell.latents
    others = [[t for t in range(n) if t != s] for s in range(n)]
    found = {
        (s, t): evaluate(declared("latent", "activations"), PairOnTokens(measured, sides, s, t))
        if measured
        else {}
        for s, t in sides
    }
    for name in reversed(columns("latent", "activations")):
        flat = []
        for s in range(n):
            unknown = np.full(len(sides[s, others[s][0]].partner), np.nan)
            values = [found[s, t].get(name, unknown) for t in others[s]]
            flat.append(np.stack(values, axis=1).ravel())
        # Store unknown values (NaN) as null.
        column = pa.array(np.concatenate(flat).astype(np.float32), from_pandas=True)
        offsets = pa.array(np.arange(len(table) + 1, dtype=np.int32) * (n - 1))
        made = pa.ListArray.from_arrays(offsets, column)
        if name in table.column_names:
            table = table.drop_columns([name])
        # Insert after "shared", before the columns that only some cells have: the tables of all
        # cells are concatenated.
        table = table.add_column(table.column_names.index("shared") + 1, name, made)
    return table


def lacks_activations(cell: CellResult) -> bool:
    """Return true if the cell lacks these measures, or if they could not be computed."""
    return NOTE not in cell.pairs or bool((cell.pairs[NOTE] != "").any())
