"""Further measures of each cell: the tables of ``summary.md`` below the first one.

``docs/measures.md`` defines every number, by its heading here and by its column in the files. The
table "What would chance share?" (`null_table`) has nulls that keep more and more of the experiment:

    isotropic rows          the sizes only
    rows of the covariance  + the directions that vary
    untrained weights       + the SAE's initial weights
    Gaussian activations    + training, on samples with the activations' mean and covariance
    random weights          + the text, through a language model with random weights
    trained model           everything

The first three are columns of every pair; the others are cells of their own (``surrogate=``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from reseed.compare.cell import CellResult
from reseed.compare.difference import cell_difference, share_draws
from reseed.compare.measures import THRESHOLDS
from reseed.compare.nulls import SURROGATES, kappa
from reseed.compare.registry import NOTE, TOKENS, Interval, declared
from reseed.compare.statistics import holm_intervals
from reseed.report.architecture_contrasts import difference_method
from reseed.report.captions import BY_THRESHOLD, SOURCE, compares_seeds
from reseed.report.cell_labels import Cell, columns, knob_values, label, pair_axis_name
from reseed.report.format import (
    format_number,
    holm_note,
    null_text,
    padded,
    range_text,
    signed,
    with_interval,
)
from reseed.report.sharing_by_firing import (
    cells_with_strata,
    sharing_at_equal_firing_table,
    sharing_by_decile_table,
)
from reseed.report.table import (
    Column,
    Table,
    cell_table,
    column_of,
    kappa_column,
    measure_columns,
    measure_notes,
    measure_table,
    null_column,
)

TITLE = "What would chance share?"
TRAINED = "trained model"
_WEIGHT_NULLS = {
    "isotropic rows": "null_{}",
    "rows of the covariance": "null_covariance_{}",
    "untrained weights": "untrained_{}",
}
"""Null → its columns of the pairs."""
_MOST = 6
"""Maximum number of families of cells in the table; with more it would be too long to read and is
left out. The main table has a row for each of their cells."""


def null_table(cells: Sequence[Cell]) -> Table | None:
    """Return the table with a row per null of each family of cells, from the null that keeps the
    least of the experiment; None if no null was trained."""
    found = _families([(k, c) for k, c in cells if c.settings.pairs_are_a_sample])
    if not found or len(found) > _MOST:
        return None
    confidence = cells[0][1].settings.confidence
    percent = f"[{confidence:.0%}]"
    names = columns([(knobs, None) for knobs, _ in found])
    header = (
        *names, "what is shared by", f"shared\n{percent}", "cos\nenc", "cos\ndec", "κ",
        f"trained − it\n{percent}",
    )  # fmt: skip
    less = _differences([by_null for _, by_null in found], confidence)
    rows = [
        (*knob_values(names, knobs), *row)
        for (knobs, by_null), own in zip(found, less, strict=True)
        for row in _rows(by_null, own)
    ]
    paired = [share_draws(own[""], null) for _, own in found for name, null in own.items() if name]
    tested = sum(one.low is not None for own in less for one in own.values())
    notes = _footnotes(confidence, difference_method(paired), holm_note([tested], confidence))
    reasons = dict.fromkeys(one.reason for own in less for one in own.values() if one.reason)
    notes += tuple(f"**{reason}**" for reason in reasons)
    return Table(header, tuple(rows), len(names) + 1, TITLE, notes)


def _differences(
    families: Sequence[Mapping[str, CellResult]], confidence: float
) -> list[dict[str, Interval]]:
    """Return, per family, surrogate → interval of the trained model's shared fraction minus the
    surrogate's, corrected for the number of these differences in all families."""
    found = [
        cell_difference(by_null[""], null, "shared_fraction", confidence)
        for by_null in families
        for surrogate, null in by_null.items()
        if surrogate
    ]
    corrected = iter(holm_intervals(found, confidence))
    return [{name: next(corrected) for name in by_null if name} for by_null in families]


def _families(cells: Sequence[Cell]) -> list[tuple[dict[str, Any], dict[str, CellResult]]]:
    """Return, per family, the knobs that its cells have in common, and surrogate → cell (``""`` for
    the model itself)."""
    by_family: dict[Any, tuple[dict[str, Any], dict[str, CellResult]]] = {}
    for knobs, cell in cells:
        model, surrogate = _split_surrogate(str(knobs.get("model", "")))
        common = {k: v for k, v in knobs.items() if k not in ("arm", "model")}
        key = (model, cell.settings.pair_by, tuple(common.items()))
        by_null = by_family.setdefault(key, ({"model": model} | common, {}))[1]
        by_null.setdefault(surrogate, cell)
    return [
        (knobs, by_null)
        for knobs, by_null in by_family.values()
        if len(by_null) > 1 and "" in by_null
    ]


def _split_surrogate(label: str) -> tuple[str, str]:
    """Split ``embedded+gaussian`` into ``embedded`` and ``gaussian``; for a model itself the second
    is empty."""
    for name in SURROGATES:
        if label.endswith(f"+{name}"):
            return label.removesuffix(f"+{name}"), name
    return label, ""


def _rows(by_null: Mapping[str, CellResult], less: Mapping[str, Interval]) -> list[tuple[str, ...]]:
    trained = by_null[""]
    shared = trained.estimates["shared_fraction"]
    rows = [_weights_row(trained, null, shared) for null in _WEIGHT_NULLS]
    for surrogate, name in SURROGATES.items():
        if surrogate in by_null:
            own = by_null[surrogate].estimates
            null = own["shared_fraction"]
            excess = format_number(kappa(shared.mean, null.mean))
            rows.append((*_cell_row(name, own), excess, signed(less[surrogate])))
    return [*rows, (*_cell_row(TRAINED, trained.estimates), "", "")]


def _weights_row(cell: CellResult, null: str, shared: Interval) -> tuple[str, ...]:
    def mean(measure: str) -> float:
        return cell.pair_mean(_WEIGHT_NULLS[null].format(measure))

    by_chance = mean("shared_fraction")
    drawn = null != "untrained weights"
    simulated = drawn and not isnan(by_chance)
    text = (
        null_text(by_chance, cell.null_simulated_latents) if simulated else format_number(by_chance)
    )
    cosines = [mean("cosine")] * 2 if drawn else [mean("cosine_encoder"), mean("cosine_decoder")]
    return (
        null,
        text,
        *map(format_number, cosines),
        format_number(kappa(shared.mean, by_chance)),
        "",
    )


def _cell_row(name: str, estimates: Mapping[str, Interval]) -> tuple[str, ...]:
    cosines = (format_number(estimates[f"cosine_{which}"].mean) for which in ("encoder", "decoder"))
    return (name, with_interval(estimates["shared_fraction"]), *cosines)


def _footnotes(confidence: float, method: str, stars: str) -> tuple[str, ...]:
    return (
        "The first null keeps the least of the experiment. **isotropic rows**: two random "
        "dictionaries of these sizes; **rows of the covariance**: rows sampled with the covariance "
        "of the activations; **untrained weights**: the same pairs before training.",
        "**Gaussian activations**: trained on samples with the activations' mean and covariance; "
        "**random weights**: trained on the activations of the same language model before any "
        "training, on the same text.",
        "**κ** = (S − S₀)/(1 − S₀), where S is the shared fraction of the trained model's SAEs and "
        f"S₀ that of the row. **trained − it**: S − S₀ with the {confidence:.0%} interval over "
        f"seeds ({method}); {stars}",
    )


TABLES = ("shared", "alike", "cycles", "thresholds", "firing", "activations", "substitution",
          "nulls", "subspaces")  # fmt: skip
"""Names of the tables of measures here, as `registry.measure` has them."""
ELSEWHERE = ("counts", "runs", "latents", "truth", "alignment")
"""Names of those that are shown only in files, by `reseed.report.truth`, or by `value_pairs`."""


def summary_tables(cells: Sequence[Cell]) -> list[tuple[str, list[Table]]]:
    """Return titles with their tables, in the order of ``summary.md``, without tables of measures
    that were not taken.

    Differences between architectures are not included, because they concern several cells.
    """
    firing = cells_with_strata(cells)
    found = [
        ("More measures", [details(cells), *cosines_and_cycles(cells), *own_measures(cells)]),
        (f"Over {pair_axis_name(cells)}", [profiles(cells)]),
        ("By threshold", [by_threshold(cells)]),
        (
            "By firing",
            [sharing_by_decile_table(firing), sharing_at_equal_firing_table(firing)]
            if firing
            else [],
        ),
        ("On activations", on_activations(cells)),
        ("Nulls", [nulls(cells)]),
        ("Subspaces", [subspace_overlaps(cells)]),
    ]
    return [(title, tables) for title, tables in found if tables]


def details(cells: Sequence[Cell]) -> Table:
    """Return the table of other rules for what is shared."""
    made: dict[str, Column] = {pair_axis_name(cells): lambda cell: str(cell.n_seeds)}
    made |= measure_columns("shared")
    first = "Fractions of latents by other rules than the strict one, at the same threshold."
    return cell_table(cells, made, first, *measure_notes("shared"))


def cosines_and_cycles(cells: Sequence[Cell]) -> list[Table]:
    """Return the table of mean cosines without a threshold, and that of whether the matchings of
    three runs form cycles."""
    return [measure_table(cells, "alike"), measure_table(cells, "cycles")]


def own_measures(cells: Sequence[Cell]) -> list[Table]:
    """Return the table of the measures of other packages that some cell has."""
    made: dict[str, Column] = {}
    notes: list[str] = []
    for own in declared():
        if own.level == "latent" or own.table in (*TABLES, *ELSEWHERE):
            continue
        there = [
            column
            for column in own.shown
            if any(column.name in x for _, cell in cells for x in (cell.estimates, cell.pairs))
        ]
        made |= {column.heading: column_of(column.name, column.null) for column in there}
        notes += own.notes if there else []
    return [cell_table(cells, made, *notes)] if made else []


def profiles(cells: Sequence[Cell]) -> Table:
    """Return the table of p_m and u_k."""
    knobs, n = columns(cells), max(cell.n_seeds for _, cell in cells)
    header = (*knobs, *(f"p_{m}" for m in range(n)), *(f"u_{k}" for k in range(2, n + 1)))
    rows = tuple(
        (*knob_values(knobs, k), *padded(cell.p, n), *padded(cell.u, n - 1)) for k, cell in cells
    )
    footnotes = (
        f"**p_m**: fraction of latents shared with exactly m of the other {pair_axis_name(cells)}. "
        f"**u_k**: fraction of latents that none of k−1 other {pair_axis_name(cells)} has; mean "
        "over all choices of k.",
    )
    return Table(header, rows, len(knobs), "", footnotes)


def by_threshold(cells: Sequence[Cell]) -> Table:
    """Return the table of the strict rule at every threshold; its last row is the paper's, for
    another model."""
    knobs, made = columns(cells), measure_columns("thresholds")
    header = (*(knobs or ["cell"]), *(head.removeprefix("shared ") for head in made))
    rows = [
        (*(knob_values(knobs, k) or [label(cells, k)]), *(column(cell) for column in made.values()))
        for k, cell in cells
    ]
    note = (
        "The strict rule with each threshold on both cosines; the matchings do not depend on the "
        "threshold. For live latents see `shared_fraction_live_at_…` in summary.csv."
    )
    other = (
        f"**{SOURCE}**: another model and budget (TopK, k=32, 32,768 latents, 8B tokens), for "
        "orientation."
    )
    reference = [format_number(BY_THRESHOLD.get(tau, float("nan"))) for tau in THRESHOLDS]
    if compares_seeds(cells):
        rows.append((SOURCE, *[""] * (max(len(knobs), 1) - 1), *reference))
    footnotes = (note, other) if compares_seeds(cells) else (note,)
    return Table(header, tuple(rows), max(len(knobs), 1), "", footnotes)


def on_activations(cells: Sequence[Cell]) -> list[Table]:
    """Return the tables of measures on held-out tokens; empty if no cell requested them."""
    asked = [(knobs, cell) for knobs, cell in cells if NOTE in cell.pairs]
    known = [(k, c) for k, c in asked if _tokens(c)]
    lacking = _not_measured(cells, [(k, c) for k, c in asked if not _tokens(c)])
    if not known:
        return lacking
    count = range_text(_tokens(cell) for _, cell in known)
    intro = (
        f"On {count} held-out tokens. **Pearson** and **Jaccard** are over pairs matched by the "
        "decoder whose latents are both live: **shared** pairs are those that the strict rule "
        "shares, **orphan** the other ones. **shared and alike** counts all latents, as the shared "
        "fraction does."
    )
    return [
        cell_table(known, measure_columns("activations"), intro, *measure_notes("activations")),
        measure_table(known, "substitution"),
        *lacking,
    ]


def _tokens(cell: CellResult) -> int:
    return int(cell.pairs[TOKENS].to_numpy().max())


def _not_measured(cells: Sequence[Cell], lacking: Sequence[Cell]) -> list[Table]:
    """Return the table of the reasons why some cells have no numbers."""
    rows = tuple((label(cells, knobs), str(cell.pairs[NOTE].iloc[0])) for knobs, cell in lacking)
    return [Table(("not measured", "why"), rows, 2, "", ())] if rows else []


def nulls(cells: Sequence[Cell]) -> Table:
    """Return the table of nulls: the shared fraction by chance, and κ against each null."""
    made = {"shared": column_of("shared_fraction")}
    for name, prefix in (
        ("isotropic", "null_"),
        ("covariance", "null_covariance_"),
        ("untrained", "untrained_"),
    ):
        by_chance = f"{prefix}shared_fraction"
        made[f"{name} S₀"] = null_column(by_chance, drawn=name != "untrained")
        made[f"κ, {name}"] = kappa_column(name, by_chance)
    made |= {head: own for head, own in measure_columns("nulls").items() if head not in made}
    note = "The interval of **κ** is that of S, with S₀ taken as exact."
    return cell_table(cells, made, *measure_notes("nulls"), note)


def subspace_overlaps(cells: Sequence[Cell]) -> Table:
    """Return the table of whether groups of latents span the same space in two runs, each with its
    null."""
    return measure_table(
        cells,
        "subspaces",
        "**orphan**: live latents that no other run shares; **shared**: live latents that at least "
        "one shares; **dense**: latents that fire on more than a tenth of the tokens.",
    )
