"""Tables of pairs of runs that differ in a chosen value: a row for each pair of values.

They answer questions such as "How much of layer 3's SAE is in layer 6's?". A row averages the pairs
over seeds and has the coverage in both directions; `reseed.report.value_matrix` makes a matrix of
the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import pandas as pd

from reseed.compare.config import REPLICATES, pair_axes, value_axes
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.compare.pairing import (
    SEPARATOR,
    PairGroup,
    pair_groups,
    runs_by_value,
)
from reseed.compare.registry import NOTE, columns, declared, fractions
from reseed.report.cell_labels import Cell, knob_values, varying_knobs
from reseed.report.cell_labels import columns as cell_columns
from reseed.report.detectable import detectable_note
from reseed.report.format import (
    MISSING,
    format_number,
    interval_row,
    measure_name,
    null_text,
    signed,
    with_interval,
)
from reseed.report.minus_within import minus_within, minus_within_note
from reseed.report.table import Table

MANY_ROWS = 30
"""Maximum number of rows. If there are more groups of pairs, the table shows, for each pair of
values, only the group that differs in the largest number of axes; pairings.csv has all."""
_ONE_SIDED = ("coverage_a", "coverage_b")
SAME_TOKENS = {
    "CKA\ncodes": "cka_codes",
    "CKA\nrec": "cka_reconstructions",
    "r of\nmatched": "agreement_pearson_matched",
}
AGREE = "agreement_fraction_matched"
"""Column heading → measure on the same tokens, shown if some runs have no common space: these
measures need none. `AGREE` has an interval, too."""


def value_pair_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells whose runs differ in a chosen value, or in several axes."""
    return [(knobs, cell) for knobs, cell in cells if not cell.settings.pairs_are_a_sample]


def value_pair_table(cells: Sequence[Cell]) -> Table | None:
    """Return the table with a row for each pair of values; None if all pairs are of seeds."""
    cells = value_pair_cells(cells)
    if not cells:
        return None
    every, settings = pair_groups(cells), cells[0][1].settings
    shown = _shown(every)
    knobs = cell_columns([(group.knobs, None) for group in every])
    several = len({group.differs_in for group in every}) > 1
    primary, confidence = settings.primary, settings.confidence
    value = value_name(cells)
    chosen = [value, "and"] if value else []
    made = _columns(shown, primary, confidence)
    header = (*knobs, *chosen, *(["differs in"] if several else []), *made)
    rows = tuple(
        (
            *knob_values(knobs, group.knobs),
            *([group.first, group.second] if value else []),
            *([group.differs_in] if several else []),
            *(make(group) for make in made.values()),
        )
        for group in shown
    )
    names = len(header) - len(made)
    footnotes = _footnotes(cells, every, shown)
    return Table(header, rows, names, _caption(cells, every), footnotes, ("cos\nenc", "cos\ndec"))


def _shown(every: Sequence[PairGroup]) -> list[PairGroup]:
    """Return the groups that have a row in the table; see `MANY_ROWS`."""
    return [*every] if len(every) <= MANY_ROWS else most_differing_groups(every)


def _columns(
    shown: Sequence[PairGroup], primary: str, confidence: float
) -> dict[str, Callable[[PairGroup], str]]:
    """Return the columns of numbers: header → function from a group to its entry."""

    def estimate(column: str) -> Callable[[PairGroup], str]:
        return lambda group: with_interval(group.interval(column, confidence))

    def mean(column: str) -> Callable[[PairGroup], str]:
        return lambda group: format_number(group.mean(column))

    percent = f"[{confidence:.0%}]"
    made: dict[str, Callable[[PairGroup], str]] = {
        "seeds": lambda group: group.counts,
        f"{measure_name(primary)}\n{percent}": estimate(primary),
    }
    if primary != "shared_fraction":
        made[f"shared\n{percent}"] = estimate("shared_fraction")
    if any((group.pairs["num_latents_a"] != group.pairs["num_latents_b"]).any() for group in shown):
        made[f"of the smaller\n{percent}"] = estimate("shared_of_smaller")
    made[f"1st in 2nd\n{percent}"] = estimate("coverage_a")
    made[f"2nd in 1st\n{percent}"] = estimate("coverage_b")
    contrasts = minus_within(shown, primary, confidence)
    if contrasts:
        made["− within"] = lambda group: (
            signed(contrasts[id(group)]) if id(group) in contrasts else ""
        )
    if any(incompatible(group) for group in shown):
        named = (*SAME_TOKENS.values(), AGREE)
        there = [name for name in named if all(name in group.pairs for group in shown)]
        made |= {head: mean(name) for head, name in SAME_TOKENS.items() if name in there}
        if AGREE in there:
            made[f"agree\n{percent}"] = estimate(AGREE)
    return made | {
        "null": _null,
        "untrained": mean("untrained_shared_fraction"),
        "cos\nenc": mean("cosine_encoder"),
        "cos\ndec": mean("cosine_decoder"),
    }


def _null(group: PairGroup) -> str:
    null = group.mean("null_shared_fraction")
    if isnan(null):
        return MISSING
    return null_text(null, int(group.mean("null_simulated_latents")))


def no_common_space(group: PairGroup) -> str:
    """Return the reason why the group's runs have no common space; "" if they have one."""
    notes = group.pairs[WEIGHTS_NOTE].fillna("") if WEIGHTS_NOTE in group.pairs else [""]
    return next(filter(None, notes), "")


def incompatible(group: PairGroup) -> bool:
    """Return whether the group's runs have no common space."""
    return bool(no_common_space(group))


def shared_knobs(group: PairGroup) -> tuple[tuple[str, Any], ...]:
    """Return the knobs that the cells of a group have in common."""
    return tuple(group.knobs.items())


def most_differing_groups(every: Sequence[PairGroup]) -> list[PairGroup]:
    """Return, for each pair of values, the group that differs in the largest number of axes."""
    found: dict[Any, PairGroup] = {}
    for group in every:
        key = (shared_knobs(group), group.first, group.second)
        before = found.get(key)
        axes = group.differs_in.count(SEPARATOR)
        if before is None or axes >= before.differs_in.count(SEPARATOR):
            found[key] = group
    return list(found.values())


def value_name(cells: Sequence[Cell]) -> str:
    """Return the axis of the values, ``layer``; empty if only seeds and data orders differ."""
    names = {SEPARATOR.join(value_axes(cell.settings.pair_by)) for _, cell in cells}
    return names.pop() if len(names) == 1 else "value"


def _caption(cells: Sequence[Cell], every: Sequence[PairGroup]) -> str:
    changing = varying_knobs([(group.knobs, None) for group in every])
    constant = [f"{k}={v}" for k, v in every[0].knobs.items() if k not in changing]
    by = " · ".join(dict.fromkeys(cell.settings.pair_words for _, cell in cells))
    return " · ".join([*constant, f"pairs by {by}"])


def _footnotes(
    cells: Sequence[Cell], every: Sequence[PairGroup], shown: Sequence[PairGroup]
) -> tuple[str, ...]:
    settings = cells[0][1].settings
    primary, confidence = settings.primary, settings.confidence
    contrasts = minus_within(shown, primary, confidence)
    estimates = [group.interval(primary, confidence) for group in shown if not incompatible(group)]
    reasons = dict.fromkeys(e.reason for e in [*estimates, *contrasts.values()] if e.reason)
    rows = "with these two values; the 1st is the run with the first value"
    if not value_name(cells):
        rows = "that differ in these axes and agree in the others"
    notes = [
        f"Each row shows the pairs of runs {rows}. **shared**: the strict rule at "
        f"{settings.threshold:g} (Paulo & Belrose), "
        "2·#/(F₁ + F₂). **1st in 2nd**: fraction of the first's latents for which one latent of "
        "the second, even if matched to another, has both cosines at least at the threshold; "
        "**2nd in 1st**: the reverse (for a value with itself, where no run is the first, the mean "
        "of both). **of the smaller**: shared latents as a fraction of the smaller dictionary.",
        _interval_note(cells, shown, confidence),
        "**null**: two random dictionaries of these sizes. **untrained**: the initial weights of "
        f"the same pairs{_start_note(cells)}.",
    ]
    if contrasts:
        notes.append(minus_within_note(shown, primary, confidence))
    if any(incompatible(group) for group in shown):
        notes.append(_on_same_tokens(shown, settings.threshold))
    elif any(cell.compares_models for _, cell in cells):
        notes += _OF_MODELS.get(settings.align, ())
    if len(shown) < len(every):
        notes.append(
            "For each pair of values, only the group that differs in the largest number of axes is "
            f"shown; all {len(every)} groups are in pairings.csv."
        )
    notes += [f"**{reason}**" for reason in reasons]
    # Rows have runs in common, so the detectable difference between them is not known.
    return (*notes, *detectable_note((), primary, confidence))


def _interval_note(cells: Sequence[Cell], shown: Sequence[PairGroup], confidence: float) -> str:
    """Explain over what the intervals are."""
    counts = " (column **seeds**: numbers of values)" if len(_random_axes(shown)) > 1 else ""
    chosen = "" if value_name(cells) == "" else " They are not over the values, which were chosen."
    return (
        f"Intervals ({confidence:.0%}) are over {_left_out(shown)}{counts}, t distribution on the "
        f"logit scale.{chosen}"
    )


def _left_out(groups: Sequence[PairGroup]) -> str:
    """Return over which axes intervals are, and what is left out for them."""
    axes = _random_axes(groups)
    over = " and ".join("seeds" if axis == "seed" else f"values of {axis}" for axis in axes)
    how = f"all runs of one {axes[0]} are left out at a time"
    if len(axes) > 1:
        how = (
            f"all runs of one value of {' or of '.join(axes)} are left out at a time, and the "
            "variances of the axes are added"
        )
    return f"{over}: {how}"


def _random_axes(groups: Sequence[PairGroup]) -> list[str]:
    return list(dict.fromkeys(axis for group in groups for axis in group.units)) or ["seed"]


def _start_note(cells: Sequence[Cell]) -> str:
    """Say which runs of the pairs have the same initial weights."""
    paired = [pair_axes(cell.settings.pair_by) for _, cell in cells]
    notes = []
    if any(value_axes(axes) for axes in paired):
        notes.append(
            "runs with different values start differently even at the same seed, unless "
            "seed_scope=shared"
        )
    data = [axis for axis in REPLICATES[1:] if any(axis in axes for axes in paired)]
    if data:
        notes.append(f"runs that differ only in {' or '.join(data)} have the same initial weights")
    return "".join(f"; {note}" for note in notes)


_OF_MODELS: dict[str | None, tuple[str]] = {
    None: (
        "Dictionaries of two models are compared without alignment: a cosine between them is "
        "meaningful only if the models have the same space, as checkpoints of one training do.",
    ),
    "identity": (
        "Runs of different models are compared as they are, because the user said that their bases "
        "are the same (comparison.align=identity); nothing has checked it.",
    ),
    "procrustes": (
        "Rows of different models are compared after an orthogonal map from the basis of the first "
        "into that of the second (comparison.align=procrustes). What it explains is in the table "
        "of the maps.",
    ),
}
"""Setting ``align`` → note on the weights of runs of different models."""


def _on_same_tokens(shown: Sequence[PairGroup], threshold: float) -> str:
    """Explain why columns are empty, and the columns of measures on the same tokens."""
    reasons = dict.fromkeys(filter(None, map(no_common_space, shown)))
    why = (
        f"Columns of weights are empty (**{MISSING}**) where no cosine is defined: "
        f"{'; '.join(reasons)}. "
    )
    if not all("agreement_pearson_matched" in group.pairs for group in shown):
        notes = [group.pairs[NOTE] for group in shown if NOTE in group.pairs]
        reasons = dict.fromkeys(reason for own in notes for reason in own if reason)
        return why + f"Agreement on the same tokens was not measured: {'; '.join(reasons)}"
    return why + (
        "**CKA**: of latents and of reconstructions on the same held-out tokens. Latents are "
        "matched by the correlation r of their activations on one part of these tokens; **r of "
        f"matched**: mean r on the other part; **agree**: live latents with r ≥ {threshold:g} "
        "there, 2·#/(live₁ + live₂)."
    )


def map_table(cells: Sequence[Cell]) -> Table | None:
    """Return the table of the maps between models: a row for each pair of places; None if no cell
    has a map."""
    fitted = [cell for cell in value_pair_cells(cells) if "map_r2" in cell[1].pairs]
    if not fitted:
        return None
    groups = most_differing_groups(pair_groups(fitted))
    groups = [group for group in groups if not isnan(group.mean("map_r2"))]
    knobs = cell_columns([(group.knobs, None) for group in groups])
    shown = columns("pair", "map")
    rows = tuple(
        (
            *knob_values(knobs, group.knobs),
            group.first,
            group.second,
            *(
                f"{group.mean(name):,.0f}" if name in _COUNTS else format_number(group.mean(name))
                for name in shown
            ),
        )
        for group in groups
    )
    notes = [note for own in declared("pair", "map") for note in own.notes]
    notes.append(
        "If R² is low, a low shared fraction of the two models may come from the map, not from the "
        "SAEs. The map does not depend on the seeds of SAEs, so that it has no interval over them."
    )
    if any(isnan(group.mean("map_r2_random")) for group in groups):
        notes.append(f"**{MISSING}**: a model of the pair has random weights itself.")
    header = (*knobs, value_name(fitted), "and", *(column.heading for column in shown.values()))
    spare = tuple(shown[name].heading for name in _COUNTS)
    return Table(header, rows, len(knobs) + 2, "Maps between the models", tuple(notes), spare)


_COUNTS = ("map_massive", "map_held_out", "map_tokens")
"""Columns of the maps that are numbers of tokens; a narrow window leaves them out in this order."""


def runs_by_value_table(cells: Sequence[Cell]) -> Table | None:
    """Return the table of the quality of the runs of each value."""
    cells = value_pair_cells(cells)
    if not cells or not value_name(cells):
        return None
    confidence = cells[0][1].settings.confidence
    found = runs_by_value(cells, confidence)
    knobs = cell_columns([(own, None) for own, _, _ in found])
    shown = {"FVU": "fvu", "L0": "l0", "dead": "dead_fraction", "live": "live_fraction"}
    rows = tuple(
        (
            *knob_values(knobs, own),
            value,
            str(estimates["fvu"].n) if "fvu" in estimates else MISSING,
            f"{estimates['num_latents'].mean:,.0f}",
            *(with_interval(estimates[x]) if x in estimates else MISSING for x in shown.values()),
        )
        for own, value, estimates in found
    )
    header = (*knobs, value_name(cells), "runs", "latents", *shown)
    # Intervals over two random axes have degrees of freedom of their own.
    known = [own[x] for _, _, own in found for x in shown.values() if x in own]
    crossed = {one.freedom is not None for one in known if one.low is not None}
    note = f"Means over the runs of each value, with the {confidence:.0%} t interval over them."
    if crossed == {True}:
        note = (
            f"Means over the runs of each value. Intervals ({confidence:.0%}) are over "
            f"{_left_out(pair_groups(cells))}, t distribution."
        )
    return Table(header, rows, len(knobs) + 1, "", (note,))


def pairing_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return ``pairings.csv``: a row for each pair of values and set of axes in which the runs
    differ, every fraction with its interval."""
    cells = value_pair_cells(cells)
    confidence = cells[0][1].settings.confidence
    every = pair_groups(cells)
    contrasts = minus_within(_shown(every), cells[0][1].settings.primary, confidence)
    rows = []
    for group in every:
        row: dict[str, Any] = {
            **group.knobs, "first": group.first, "second": group.second,
            "differs_in": group.differs_in, "n_pairs": len(group.pairs),
            "n_seeds": group.n, "interval_over": SEPARATOR.join(group.units),
        }  # fmt: skip
        shares = ("shared_of_a", "shared_of_b", "shared_of_smaller")
        for name in (*_one_sided(group, fractions()), *shares):
            row |= interval_row(name, group.interval(name, confidence))
        row |= interval_row("minus_within", contrasts.get(id(group)))
        on_tokens = (*SAME_TOKENS.values(), AGREE) if WEIGHTS_NOTE in group.pairs else ()
        for name in ("null_shared_fraction", "untrained_shared_fraction", "cosine_encoder",
                     "cosine_decoder", "num_latents_a", "num_latents_b", *on_tokens,
                     *(c for c in columns("pair", "map") if c in group.pairs)):  # fmt: skip
            row[name] = group.mean(name) if name in group.pairs else None
        reason = group.interval("shared_fraction", confidence).reason
        rows.append(row | {"note": no_common_space(group) or reason})
    return pd.DataFrame(rows)


def _one_sided(group: PairGroup, names: Sequence[str]) -> list[str]:
    found = [name for name in names if name in group.pairs]
    return [*found, *(name for name in _ONE_SIDED if name in group.pairs)]
