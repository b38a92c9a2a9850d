"""Measures on activations as columns of a cell's tables, added to the measures on weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float

from reseed.compare.activations.agreement import MatchedAgreement
from reseed.compare.activations.measures import (
    ActivationMeasures,
    AllWeightMatches,
    LatentMeasures,
    WeightMatches,
)
from reseed.compare.activations.substitution import clip_quality, quality_by_coverage
from reseed.compare.cell import CellResult
from reseed.compare.pairing import without_intervals
from reseed.compare.statistics import known_mean, seed_interval
from reseed.compare.tables import lists

TOPS = (100, 2_000)
"""Values of r for which the tables show the mean R of the r highest-ranking matches."""
ESTIMATES = (
    "agreement_pearson_shared",
    "agreement_pearson_orphan",
    "agreement_jaccard_shared",
    "agreement_jaccard_orphan",
    "cka_codes",
    "cka_reconstructions",
    "substitution",
    "substitution_shared",
    "substitution_orphan",
    "substitution_pooled_shared",
    "substitution_pooled_orphan",
    "substitution_best_scale",
    "substitution_second_best",
    "substitution_random",
    "substitution_area",
    *(f"substitution_top_{top}" for top in TOPS),
    "novel_fraction",
)
"""Measures of a pair that are equal for (A, B) and (B, A); see `activation_measures`."""
PAIR_COLUMNS = (*ESTIMATES, "novel_fraction_a", "novel_fraction_b")
MATCHED_COLUMNS = tuple(f"agreement_{name}_matched" for name in MatchedAgreement._fields)
"""Extra columns for latents matched by their activations; see `agreement.MatchedAgreement`."""
NOTE, TOKENS = "activation_note", "activation_tokens"
"""Extra columns of the pairs: why measures are missing (else empty), and the number of tokens."""
LATENT_COLUMNS: dict[str, Callable[[LatentMeasures], Float[np.ndarray, " F"]]] = {
    "pearson": lambda found: found.agreement.pearson,
    "jaccard": lambda found: found.agreement.jaccard,
    "match_cosine": lambda found: found.match_cosine,
    "substitution": lambda found: found.substitution.quality,
    "insertion": lambda found: found.insertion,
}
"""List columns (a value per other run) added to the latents of `cell`; see `LatentMeasures`.
``substitution`` is the unbounded R."""


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


def activation_measures(
    measured: ActivationMeasures, sides: AllWeightMatches, s: int, t: int
) -> dict[str, float | int]:
    """Return the columns of one pair (`PAIR_COLUMNS`).

    Means are over matched latents that are both live, from both sides. *Orphan* latents are those
    that the strict rule does not share.

    - ``agreement_…``: mean Pearson correlation and Jaccard index.
    - ``agreement_…_matched``: the same for latents matched by their activations, in cells whose
      runs read different activations; ``agreement_fraction_matched``: the fraction whose
      correlation reaches the threshold.
    - ``cka_…``: linear CKA of the latents and of the reconstructions.
    - ``substitution…``: mean R, clipped to 0 … 1, of the match (``_shared``, ``_orphan``; with the
      best scale), and of the same latents with the second-best latent, or with a random one that
      fires about as often. ``_pooled_…`` is the unbounded Σ repaired / Σ damage, which weights
      latents by what they explain.
    - ``substitution_area``: the mean over r of the mean R of the r matches that rank highest by
      the smaller of their cosines; ``substitution_top_…``: its value at one r.
    - ``novel_fraction_a``: the fraction of A's live latents that lower B's error when put in;
      ``_b``: the reverse; without a suffix: their mean. (If an SAE shrinks its reconstructions, as
      L1 does, any latent that points along them lowers its error.)
    """
    two = [(measured.latents[p], sides[p]) for p in ((s, t), (t, s))]

    def mean(column: Callable[[LatentMeasures], np.ndarray], of: str = "") -> float:
        values = [column(found)[_mask(found, side, of)] for found, side in two]
        return known_mean(np.concatenate(values))

    def pooled(of: str) -> float:
        sums = [found.substitution.pooled(_mask(found, side, of)) for found, side in two]
        repaired, damage = np.sum(sums, axis=0)
        return float(repaired / damage) if damage > 0 else float("nan")

    novel = [known_mean(_below_zero(found.insertion[side.live])) for found, side in two]
    curves = [_curve(found) for found, _ in two]
    by_activations = measured.matched.get((min(s, t), max(s, t)))
    matched = zip(MATCHED_COLUMNS, by_activations, strict=True) if by_activations else ()
    return {
        **dict(matched),
        **{
            f"agreement_{name}_{of}": mean(LATENT_COLUMNS[name], of)
            for name in ("pearson", "jaccard")
            for of in ("shared", "orphan")
        },
        "cka_codes": float(measured.cka_codes[s, t]),
        "cka_reconstructions": float(measured.cka_reconstructions[s, t]),
        "substitution": mean(lambda found: clip_quality(found.substitution.quality)),
        "substitution_shared": mean(lambda f: clip_quality(f.substitution.quality), "shared"),
        "substitution_orphan": mean(lambda f: clip_quality(f.substitution.quality), "orphan"),
        "substitution_pooled_shared": pooled("shared"),
        "substitution_pooled_orphan": pooled("orphan"),
        "substitution_best_scale": mean(lambda f: clip_quality(f.substitution.quality_best)),
        "substitution_second_best": mean(lambda f: clip_quality(f.second_best.quality)),
        "substitution_random": mean(lambda f: clip_quality(f.random.quality)),
        "substitution_area": known_mean(np.array([known_mean(curve) for curve in curves])),
        **{
            f"substitution_top_{top}": known_mean(np.array([_at(curve, top) for curve in curves]))
            for top in TOPS
        },
        "novel_fraction": sum(novel) / 2,
        "novel_fraction_a": novel[0],
        "novel_fraction_b": novel[1],
    }


def _below_zero(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return 1 for a negative value, 0 for another, NaN for NaN."""
    return np.where(np.isnan(values), np.nan, values < 0)


def _mask(found: LatentMeasures, side: WeightMatches, of: str) -> Bool[np.ndarray, " F"]:
    """Return a mask of latents live on both sides: all, the "shared", or the "orphan" ones."""
    if not of:
        return found.both_live
    return found.both_live & (side.shared if of == "shared" else ~side.shared)


def _curve(found: LatentMeasures) -> Float[np.ndarray, " known"]:
    kept = found.both_live
    return quality_by_coverage(
        clip_quality(found.substitution.quality[kept]), found.match_cosine[kept]
    )


def _at(curve: Float[np.ndarray, " known"], top: int) -> float:
    return float(curve[top - 1]) if len(curve) >= top else float("nan")


def with_activations(
    cell: CellResult, measured: ActivationMeasures | None, note: str = ""
) -> CellResult:
    """Return the cell with `PAIR_COLUMNS`, `LATENT_COLUMNS` and their estimates added.

    Args:
        measured: measures of the cell's runs, in their order; None if they could not be computed;
            the columns are then NaN.
        note: the reason why they could not be computed.
    """
    n, sides = cell.n_seeds, weight_matches(cell)
    runs = cell.runs["run"].tolist()
    pairs = cell.pairs.copy()
    places = list(zip(map(runs.index, pairs["a"]), map(runs.index, pairs["b"]), strict=True))
    nothing = dict.fromkeys(PAIR_COLUMNS, float("nan"))
    rows = [activation_measures(measured, sides, *p) if measured else nothing for p in places]
    more = MATCHED_COLUMNS if measured and measured.matched else ()
    for name in (*PAIR_COLUMNS, *more):
        pairs[name] = [float(row[name]) for row in rows]
    pairs[TOKENS] = measured.tokens if measured else 0
    pairs[NOTE] = note
    estimates = {}
    for name in (*ESTIMATES, *more):
        values = np.zeros((n, n))
        for (s, t), value in zip(places, pairs[name], strict=True):
            values[s, t] = values[t, s] = value
        estimates[name] = seed_interval(
            values, cell.settings.confidence, logit=name == "novel_fraction"
        )
    if not cell.settings.pairs_are_a_sample and more:
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
    for name, column in reversed(LATENT_COLUMNS.items()):
        flat = [
            np.stack(
                [
                    column(measured.latents[s, t])
                    if measured
                    else np.full(len(sides[s, t].partner), np.nan)
                    for t in _others(s, n)
                ],
                axis=1,
            ).ravel()
            for s in range(n)
        ]
        # Store unknown values (NaN) as null.
        values = pa.array(np.concatenate(flat).astype(np.float32), from_pandas=True)
        offsets = pa.array(np.arange(len(table) + 1, dtype=np.int32) * (n - 1))
        made = pa.ListArray.from_arrays(offsets, values)
        if name in table.column_names:
            table = table.drop_columns([name])
        # Insert after "shared", before the columns that only some cells have: the tables of all
        # cells are concatenated.
        table = table.add_column(table.column_names.index("shared") + 1, name, made)
    return table


def _others(s: int, n: int) -> Iterator[int]:
    return (t for t in range(n) if t != s)


def lacks_activations(cell: CellResult) -> bool:
    """Return true if the cell lacks these measures, or if they could not be computed."""
    return NOTE not in cell.pairs or bool((cell.pairs[NOTE] != "").any())
