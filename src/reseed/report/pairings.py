"""Tables of pairs whose runs differ in what was chosen: a row for each pair of values.

"How much of layer 3's SAE is in layer 6's?": the pairs of two values over the seeds, one-sided
coverage both ways, and the same as a matrix of value by value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from reseed.compare.columns import FRACTIONS
from reseed.compare.config import value_axes
from reseed.compare.pairing import (
    JOINED,
    PairGroup,
    across_minus_within,
    groups,
    runs_by_value,
)
from reseed.compare.statistics import Interval
from reseed.report.axes import MISSING, Cell, columns, varying
from reseed.report.differences import signed
from reseed.report.wording import (
    Wording,
    measure_name,
    null_in_words,
    number,
    visible_in_words,
    with_interval,
)

MANY_ROWS = 30
"""In a longer table only the pairs that differ in most are shown; all are in pairings.csv."""
MATRICES = 6
"""So many families of cells (layers, say, for each of some models) have matrices in summary.md."""
_ONE_SIDED = ("coverage_a", "coverage_b")


def general(cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose runs differ in what was chosen, or in several axes."""
    return [(knobs, cell) for knobs, cell in cells if not cell.settings.pairs_are_a_sample]


def pairings(cells: Sequence[Cell]) -> Wording | None:
    """A row for each pair of values; None where all pairs are of seeds."""
    cells = general(cells)
    if not cells:
        return None
    every, settings = groups(cells), cells[0][1].settings
    shown = every if len(every) <= MANY_ROWS else _fullest(every)
    knobs = columns([(group.knobs, None) for group in every])  # type: ignore[misc]
    several = len({group.differs_in for group in every}) > 1
    primary, confidence = settings.primary, settings.confidence
    value = _value_name(cells)
    chosen = [value, "and"] if value else []
    made = _columns(shown, primary, confidence)
    header = (*knobs, *chosen, *(["differs in"] if several else []), *made)
    rows = tuple(
        (
            *(str(group.knobs.get(name, MISSING)) for name in knobs),
            *([group.first, group.second] if value else []),
            *([group.differs_in] if several else []),
            *(make(group) for make in made.values()),
        )
        for group in shown
    )
    names = len(header) - len(made)
    footnotes = _footnotes(cells, every, shown)
    return Wording(header, rows, names, _caption(cells, every), footnotes, ("cos\nenc", "cos\ndec"))


def _columns(
    shown: Sequence[PairGroup], primary: str, confidence: float
) -> dict[str, Callable[[PairGroup], str]]:
    """The columns of numbers: header → what stands there for a group."""

    def estimate(column: str) -> Callable[[PairGroup], str]:
        return lambda group: with_interval(group.interval(column, confidence))

    def mean(column: str) -> Callable[[PairGroup], str]:
        return lambda group: number(group.mean(column))

    percent = f"[{confidence:.0%}]"
    made: dict[str, Callable[[PairGroup], str]] = {
        "seeds": lambda group: str(max(1, len(group.levels))),
        f"{measure_name(primary).replace(chr(10), ' ')}\n{percent}": estimate(primary),
    }
    if primary != "shared_fraction":
        made[f"shared\n{percent}"] = estimate("shared_fraction")
    if any((group.pairs["num_latents_a"] != group.pairs["num_latents_b"]).any() for group in shown):
        made[f"of the smaller\n{percent}"] = estimate("shared_of_smaller")
    made[f"1st in 2nd\n{percent}"] = estimate("coverage_a")
    made[f"2nd in 1st\n{percent}"] = estimate("coverage_b")
    contrasts = _contrasts(shown, primary, confidence)
    if contrasts:
        made["− within"] = lambda group: (
            signed(contrasts[id(group)]) if id(group) in contrasts else ""
        )
    return made | {
        "null": lambda group: null_in_words(
            group.mean("null_shared_fraction"), int(group.mean("null_simulated_latents"))
        ),
        "untrained": mean("untrained_shared_fraction"),
        "cos\nenc": mean("cosine_encoder"),
        "cos\ndec": mean("cosine_decoder"),
    }


def _contrasts(shown: Sequence[PairGroup], column: str, confidence: float) -> dict[int, Interval]:
    """Across minus within, by the id of the group across."""
    own = {(_family(g), g.first): g for g in shown if g.within and g.first}
    found = {}
    for group in shown:
        both = [own.get((_family(group), value)) for value in (group.first, group.second)]
        if not group.within and all(both):
            within = [g for g in both if g is not None]
            found[id(group)] = across_minus_within(group, within, column, confidence)
    return found


def _family(group: PairGroup) -> tuple[tuple[str, Any], ...]:
    return tuple(group.knobs.items())


def _fullest(every: Sequence[PairGroup]) -> list[PairGroup]:
    """Of each two values the pairs that differ in most axes."""
    found: dict[Any, PairGroup] = {}
    for group in every:
        key = (_family(group), group.first, group.second)
        before = found.get(key)
        if before is None or group.differs_in.count(JOINED) >= before.differs_in.count(JOINED):
            found[key] = group
    return list(found.values())


def _value_name(cells: Sequence[Cell]) -> str:
    """What the values are of: ``layer``; empty where seeds and data orders pair up."""
    names = {JOINED.join(value_axes(cell.settings.pair_by)) for _, cell in cells}
    return names.pop() if len(names) == 1 else "value"


def _caption(cells: Sequence[Cell], every: Sequence[PairGroup]) -> str:
    changing = varying([(group.knobs, None) for group in every])  # type: ignore[misc]
    constant = [f"{k}={v}" for k, v in every[0].knobs.items() if k not in changing]
    by = " · ".join(dict.fromkeys(cell.settings.pair_words for _, cell in cells))
    return " · ".join([*constant, f"pairs by {by}"])


def _footnotes(
    cells: Sequence[Cell], every: Sequence[PairGroup], shown: Sequence[PairGroup]
) -> tuple[str, ...]:
    settings = cells[0][1].settings
    primary, confidence = settings.primary, settings.confidence
    estimates = [group.interval(primary, confidence) for group in shown]
    reasons = list(dict.fromkeys(e.reason for e in estimates if e.reason))
    notes = [
        f"Each row is of the pairs of runs with these two values, turned so that the 1st is the "
        f"first of them. **shared**: the strict rule at {settings.threshold:g} (Paulo & Belrose), "
        "2·#/(F₁ + F₂). **1st in 2nd**: fraction of the first's latents for which some one latent "
        "of the second, taken or not, has both cosines at the threshold; **2nd in 1st**: the "
        "reverse. **of the smaller**: shared latents as a fraction of the smaller dictionary.",
        f"Intervals ({confidence:.0%}) are over seeds: all runs of one seed left out at a time, t "
        "on the logit scale; never over the values, which were chosen.",
        "**null**: two random dictionaries of these sizes. **untrained**: the initial weights of "
        "the same pairs; runs of different values start differently even where their seed is one, "
        "unless seed_scope=shared.",
    ]
    if _contrasts(shown, primary, confidence):
        notes.append(
            "**− within**: less the mean of what each of the two shares with itself over seeds; "
            "* where the interval leaves out 0."
        )
    if any("model" in value_axes(cell.settings.pair_by) for _, cell in cells):
        notes.append(
            "Rows of two models are compared as they stand: a cosine between them means something "
            "only where the models have one space, as checkpoints of one training have."
        )
    if len(shown) < len(every):
        notes.append(
            f"Shown are the pairs that differ in most; all {len(every)} groups are in pairings.csv."
        )
    notes += [f"**{reason}**" for reason in reasons]
    # Rows have runs in common: what differences between them could be seen is not known.
    return (*notes, *visible_in_words((), primary, confidence))


def matrices(cells: Sequence[Cell]) -> list[Wording]:
    """Value by value, for each family of cells: the primary measure, and one-sided coverage.

    None of fewer than 3 values, unless seeds pair up too, and of families too many to read.
    """
    cells = general(cells)
    found = _fullest(groups(cells)) if cells else []
    families: dict[Any, list[PairGroup]] = {}
    for group in found:
        if group.first:
            families.setdefault(_family(group), []).append(group)
    if len(families) > MATRICES:
        return []
    names = columns([(own[0].knobs, None) for own in families.values()])  # type: ignore[misc]
    made, primary = [], cells[0][1].settings.primary if cells else ""
    for own in families.values():
        if len(_values(own)) < 3 and not any(group.within for group in own):
            continue
        where = ", ".join(str(own[0].knobs[name]) for name in names)
        for symmetric in (True, False):
            what = measure_name(primary).replace("\n", " ") if symmetric else "covered"
            rule = "" if symmetric else ": of the latents of the row, those that the column covers"
            made.append(
                Wording(
                    (_value_name(cells), *_values(own)),
                    tuple(
                        (value, *(number(x) for x in row))
                        for value, row in _matrix(own, primary if symmetric else None).items()
                    ),
                    1,
                    f"{what.capitalize()}{rule}" + (f" ({where})" if where else ""),
                    (),
                )
            )
    return made


def _values(own: Sequence[PairGroup]) -> list[str]:
    return list(dict.fromkeys([g.first for g in own] + [g.second for g in own]))


def _matrix(own: Sequence[PairGroup], column: str | None) -> dict[str, list[float]]:
    """Row value → an entry per value; NaN where there are no such pairs.

    Args:
        column: a symmetric measure, or None for the coverage of the row's latents by the column's.
    """
    at: dict[tuple[str, str], float] = {}
    for group in own:
        forth, back = (column, column) if column else _ONE_SIDED
        if group.within and column is None:
            forth = back = "coverage"
        at[group.first, group.second] = group.mean(forth)
        at[group.second, group.first] = group.mean(back)
    values = _values(own)
    return {a: [at.get((a, b), float("nan")) for b in values] for a in values}


def by_value(cells: Sequence[Cell]) -> Wording | None:
    """How good the runs of each value are by themselves."""
    cells = general(cells)
    if not cells or not _value_name(cells):
        return None
    confidence = cells[0][1].settings.confidence
    found = runs_by_value(cells, confidence)
    knobs = columns([(own, None) for own, _, _ in found])  # type: ignore[misc]
    shown = {"FVU": "fvu", "L0": "l0", "dead": "dead_fraction", "live": "live_fraction"}
    rows = tuple(
        (
            *(str(own.get(name, MISSING)) for name in knobs),
            value,
            str(estimates["fvu"].n) if "fvu" in estimates else MISSING,
            f"{estimates['num_latents'].mean:,.0f}",
            *(with_interval(estimates[x]) if x in estimates else MISSING for x in shown.values()),
        )
        for own, value, estimates in found
    )
    header = (*knobs, _value_name(cells), "runs", "latents", *shown)
    note = f"Means over the runs of each value, with the {confidence:.0%} t interval over them."
    return Wording(header, rows, len(knobs) + 1, "", (note,))


def pairing_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """``pairings.csv``: a row for each pair of values and what its runs differ in, every fraction
    with its interval."""
    cells = general(cells)
    confidence = cells[0][1].settings.confidence
    every = groups(cells)
    contrasts = _contrasts(_fullest(every), cells[0][1].settings.primary, confidence)
    rows = []
    for group in every:
        row: dict[str, Any] = {
            **group.knobs, "first": group.first, "second": group.second,
            "differs_in": group.differs_in, "n_pairs": len(group.pairs),
            "n_seeds": len(group.levels), "interval_over": group.unit,
        }  # fmt: skip
        for name in (
            *_one_sided(group, FRACTIONS),
            "shared_of_a",
            "shared_of_b",
            "shared_of_smaller",
        ):
            row |= _ends(name, group.interval(name, confidence))
        row |= _ends("minus_within", contrasts.get(id(group)))
        for name in ("null_shared_fraction", "untrained_shared_fraction", "cosine_encoder",
                     "cosine_decoder", "num_latents_a", "num_latents_b"):  # fmt: skip
            row[name] = group.mean(name)
        reason = group.interval("shared_fraction", confidence).reason
        rows.append(row | {"note": reason})
    return pd.DataFrame(rows)


def _one_sided(group: PairGroup, names: Sequence[str]) -> list[str]:
    found = [name for name in names if name in group.pairs]
    return [*found, *(name for name in _ONE_SIDED if name in group.pairs)]


def _ends(name: str, found: Interval | None) -> dict[str, float | None]:
    ends = (found.mean, found.low, found.high) if found else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def matrix_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """``matrix.csv``: for each family of cells and measure a row per value, a column per value."""
    cells = general(cells)
    families: dict[Any, list[PairGroup]] = {}
    for group in _fullest(groups(cells)):
        families.setdefault(_family(group), []).append(group)
    rows: list[Mapping[str, Any]] = []
    measures = (*dict.fromkeys((cells[0][1].settings.primary, "shared_fraction")), None)
    for own in families.values():
        for column in measures:
            for value, entries in _matrix(own, column).items():
                named = dict(zip(_values(own), entries, strict=True))
                rows.append({**own[0].knobs, "measure": column or "coverage", "of": value, **named})
    return pd.DataFrame(rows)
