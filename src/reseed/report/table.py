"""Tables as text, and tables with a row per cell, made of columns.

A `Table` is what the terminal, markdown, LaTeX and the report typeset. `cell_table` makes one from
columns: functions from a cell to its entry. `main_table` is the first table of a comparison, with a
caption and footnotes; the terminal and ``summary.md`` show the same rows in their own typesetting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

from reseed.compare.cell import CellResult
from reseed.compare.difference import share_draws
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.compare.registry import Measure, declared
from reseed.report.cell_labels import (
    FEW,
    Cell,
    arm_note,
    columns,
    knob_values,
    label,
    pair_axis_name,
    varying_knobs,
)
from reseed.report.detectable import detectable_note
from reseed.report.format import (
    MISSING,
    format_bounds,
    format_number,
    measure_heading,
    measure_name,
    null_text,
    range_text,
    with_interval,
)

Column = Callable[[CellResult], str]
"""A function from a cell to its entry in a column."""


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        header: column names; a line break marks where a name may be wrapped.
        rows: the rows, each with as many entries as the header.
        num_knobs: number of leading columns that name the cell; the others are numbers.
        caption: what all cells have in common.
        footnotes: explanations of the columns, and remarks about single cells.
        spare: columns that a narrow window can leave out, the least useful first.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_knobs: int
    caption: str
    footnotes: tuple[str, ...]
    spare: tuple[str, ...] = ()

    def without(self, names: Sequence[str]) -> Table:
        """Return the table without some columns."""
        keep = [i for i, name in enumerate(self.header) if name not in names]
        rows = tuple(tuple(row[i] for i in keep) for row in self.rows)
        return replace(self, header=tuple(self.header[i] for i in keep), rows=rows)


def cell_table(cells: Sequence[Cell], made: Mapping[str, Column], *footnotes: str) -> Table:
    """Make a table with a row per cell: the knobs that distinguish cells, then the columns.

    Args:
        made: heading → column.
    """
    knobs = columns(cells)
    rows = tuple(
        (*knob_values(knobs, k), *(column(cell) for column in made.values())) for k, cell in cells
    )
    header = (*knobs, *made)
    return Table(header, rows, len(knobs), "", footnotes)


def measure_columns(table: str) -> dict[str, Column]:
    """Return heading → column of the declared measures that a table shows."""
    return {
        column.heading: count_column(column.name)
        if column.scale == "count"
        else column_of(column.name, column.null)
        for own in _measures_of(table)
        for column in own.shown
    }


def measure_notes(table: str) -> list[str]:
    """Return the explanations of the measures that a table shows."""
    return [note for own in _measures_of(table) if own.shown for note in own.notes]


def _measures_of(table: str) -> list[Measure]:
    own = [one for one in declared() if one.table == table]
    return sorted(
        own, key=lambda one: one.columns[0].scale == "mean"
    )  # those without interval last


def measure_table(cells: Sequence[Cell], table: str, *notes: str) -> Table:
    """Make a table of declared measures with a row per cell; ``notes`` follow the explanations."""
    return cell_table(cells, measure_columns(table), *measure_notes(table), *notes)


def column_of(name: str, null: str = "") -> Column:
    """Return a column: the estimate with its interval, or the mean over pairs without one, or
    `MISSING`. The mean of ``null`` follows: ``0.80 [0.70, 0.90] / 0.50``."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        text = with_interval(found) if found else pair_column(name)(cell)
        chance = pair_column(null)(cell) if null else MISSING
        return text if chance == MISSING else f"{text} / {chance}"

    return column


def estimate_columns(measures: Mapping[str, str]) -> dict[str, Column]:
    """Return columns of estimates with their intervals.

    Args:
        measures: heading → name of the estimate.
    """
    return {head: column_of(name) for head, name in measures.items()}


def count_column(name: str) -> Column:
    """Return a column of the mean over runs of a count, with one decimal."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        return MISSING if found is None or isnan(found.mean) else f"{found.mean:.1f}"

    return column


def pair_column(name: str) -> Column:
    """Return a column of the mean of a pair measure, without interval."""
    return lambda cell: format_number(cell.pair_mean(name))


def mean_column(name: str) -> Column:
    """Return a column of the mean of an estimate, without interval."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        return MISSING if found is None else format_number(found.mean)

    return column


def null_column(name: str, drawn: bool) -> Column:
    """Return a column of a shared fraction by chance.

    Args:
        drawn: whether the fraction was simulated; a 0 is then shown as the limit of detection.
    """

    def column(cell: CellResult) -> str:
        mean = cell.pair_mean(name)
        if isnan(mean) or not drawn:
            return format_number(mean)
        return null_text(mean, cell.null_simulated_latents)

    return column


def kappa_column(null: str, shared: str) -> Column:
    """Return a column of κ against a null, with the interval of S carried over.

    Args:
        null: ``isotropic``, ``covariance`` or ``untrained``.
        shared: the pair measure with S₀.
    """
    name = "kappa" if null == "isotropic" else f"kappa_{null}"

    def column(cell: CellResult) -> str:
        mean, by_chance = cell.pair_mean(name), cell.pair_mean(shared)
        trained = cell.estimates["shared_fraction"]
        if isnan(mean) or by_chance >= 1 or trained.low is None or trained.high is None:
            return format_number(mean)
        ends = [(end - by_chance) / (1 - by_chance) for end in (trained.low, trained.high)]
        return f"{format_number(mean)} {format_bounds(*ends)}"

    return column


def estimate_text(cell: CellResult, name: str) -> str:
    """Return an estimate with its interval, or `MISSING` if the cell lacks it."""
    found = cell.estimates.get(name)
    return MISSING if found is None else with_interval(found)


NULL_FACTOR = 10
NOT_SHARED = f"shared at most {NULL_FACTOR} × its null: not converged or not shared"
"""A shared fraction of at most `NULL_FACTOR` times its null is marked `NOT_SHARED`. A null of 0
counts as the smallest that the simulation can detect: one latent in all its draws."""
L0_BOUND = 0.05
OFF_TARGET = f"L0 off its target by more than {L0_BOUND:.0%}"


def main_table(cells: Sequence[Cell], tested: int = 1) -> Table:
    """Return the main table of a comparison.

    Args:
        tested: number of differences of the primary measure between its rows that are corrected
            together (`architecture_contrasts.tested_differences`).
    """
    knobs = columns(cells)
    seeds = (pair_axis_name(cells),) if len({cell.n_seeds for _, cell in cells}) > 1 else ()
    percent = f"[{_range(cells, lambda c: round(100 * c.settings.confidence))}%]"
    made = [_numbers(cell, cells[0][1].settings.primary, percent) for _, cell in cells]
    header = (*knobs, *seeds, *made[0])
    rows = tuple(
        (*knob_values(knobs, k), *(str(cell.n_seeds) for _ in seeds), *numbers.values())
        for (k, cell), numbers in zip(cells, made, strict=True)
    )
    arms = arm_note(cells)
    settings = cells[0][1].settings
    estimates = [cell.estimates[settings.primary] for _, cell in cells]
    paired = share_draws(*(cell for _, cell in cells))
    seen = detectable_note(
        estimates, settings.primary, settings.confidence, tested, share_draws=paired
    )
    footnotes = (*([arms] if arms else []), *_legend(cells), *seen, *_remarks(cells))
    spare = ("cos\nnull", "shared\nnull", "shared\ndec")
    return Table(header, rows, len(knobs), _caption(cells), footnotes, spare)


def _caption(cells: Sequence[Cell]) -> str:
    changing = varying_knobs(cells)
    constant = [f"{k}={v}" for k, v in cells[0][0].items() if k not in changing]
    sizes = [f"{_range(cells, lambda c: c.num_latents)} latents"]
    if any(name.endswith("num_latents") for name in cells[0][0]):
        sizes = []
    seeds = f"{_range(cells, lambda c: c.n_seeds)} {pair_axis_name(cells)}"
    return " · ".join([*constant, *sizes, seeds])


def _numbers(cell: CellResult, primary: str, percent: str) -> dict[str, str]:
    """Return column heading → number of a row, the primary measure first."""
    estimates = cell.estimates

    def mean(name: str) -> float:
        return estimates[name].mean if name in estimates else float("nan")

    l0 = mean("l0")
    strict = {f"shared\n{percent}": with_interval(estimates["shared_fraction"])}
    first = strict
    if primary != "shared_fraction":
        name = measure_name(primary)
        first = {f"{name}\n{percent}": with_interval(estimates[primary])} | strict
    alone = ("shared_fraction_live", "shared_fraction_decoder")
    return {
        **first,
        **{measure_heading(name): format_number(mean(name)) for name in alone if name != primary},
        "shared\nnull": null_text(_null(cell), cell.null_simulated_latents),
        "cos\nenc": format_number(mean("cosine_encoder")),
        "cos\ndec": format_number(mean("cosine_decoder")),
        "cos\nnull": format_number(cell.pair_mean("null_cosine")),
        "FVU": format_number(mean("fvu")),
        "L0": MISSING if isnan(l0) else f"{l0:.1f}",
        "dead": format_number(mean("dead_fraction")),
    }


def _null(cell: CellResult) -> float:
    return cell.pair_mean("null_shared_fraction")


def _legend(cells: Sequence[Cell]) -> list[str]:
    settings, count = cells[0][1].settings, _range(cells, lambda c: c.n_seeds)
    one = pair_axis_name(cells, plural=False)
    interval = (
        f", with the {settings.confidence:.0%} interval over {pair_axis_name(cells)} (leave one "
        f"{one} out, t distribution on the logit scale)."
    )
    if max(cell.n_seeds for _, cell in cells) < 3:
        interval = "."
    pairs = f"Mean over the {_range(cells, lambda c: len(c.pairs))} pairs"
    if max(len(cell.pairs) for _, cell in cells) == 1:
        pairs = "One pair"
    tokens = _range(cells, lambda c: c.held_out_tokens)
    return [
        "**shared**: the exact matchings by encoder and by decoder give the latent the same "
        f"partner, and both cosines are at least {settings.threshold:g} (Paulo & Belrose). "
        f"{pairs} of n = {count} {pair_axis_name(cells)}{interval}",
        f"**live**: counted over latents that fire at least {settings.live_at_least} times in "
        f"{tokens} held-out tokens, both partners live. **dec**: only the decoder's match counts; "
        "its cosine is at least the threshold.",
        "**null**: two random dictionaries of the same size, matched the same way. **cos**: mean "
        "cosine of all matched latents, by encoder and by decoder.",
        "**FVU**: fraction of variance unexplained; **L0**: active latents per token; both on "
        "held-out tokens. **dead**: fraction of latents that did not fire at the end of training.",
    ]


def cell_notes(cell: CellResult, knobs: Mapping[str, Any] | None = None) -> list[str]:
    """Return remarks about a cell's shared fraction and its target L0; see `NOT_SHARED` and
    `OFF_TARGET`."""
    shared = cell.estimates["shared_fraction"]
    simulated = cell.null_simulated_latents
    null = max(_null(cell), 1 / (max(1, simulated) * cell.settings.null_draws))
    # A single latent has no meaningful null.
    found = [NOT_SHARED] if simulated > 1 and shared.mean <= NULL_FACTOR * null else []
    target = re.fullmatch(r"L0≈(\d[\d.e+-]*)", str((knobs or {}).get("sparsity")))
    if target and "l0" in cell.estimates:
        l0 = cell.estimates["l0"].mean
        found += [OFF_TARGET] if abs(l0 / float(target[1]) - 1) > L0_BOUND else []
    if WEIGHTS_NOTE in cell.pairs:
        found += [reason for reason in cell.pairs[WEIGHTS_NOTE].unique() if reason]
    elif simulated < cell.num_latents:
        found.append(f"null simulated with {simulated:,} latents, its cosine extrapolated")
    reason = cell.estimates[cell.settings.primary].reason
    return found + ([reason] if reason else [])


def _remarks(cells: Sequence[Cell]) -> list[str]:
    """Return each note once, with the cells that it is about."""
    about: dict[str, list[str]] = {}
    for knobs, cell in cells:
        for note in cell_notes(cell, knobs):
            value = f" ({cell.estimates['l0'].mean:.1f})" if note == OFF_TARGET else ""
            about.setdefault(note, []).append(label(cells, knobs) + value)
    return [
        f"**{note}**" + _which(names, len(cells), always=note == OFF_TARGET)
        for note, names in about.items()
    ]


def _which(names: Sequence[str], of: int, always: bool = False) -> str:
    """Return the cells that a note is about: by name if at most `FEW`, else their number; nothing
    if it is about all of them, unless ``always``."""
    if len(names) == of and not (always and of <= FEW):
        return ""
    if len(names) > FEW:
        return f": {len(names)} of the {of} rows (marked in column `note` of summary.csv)"
    return f": {'; '.join(names)}"


def _range(cells: Sequence[Cell], value: Callable[[CellResult], float]) -> str:
    return range_text(int(value(cell)) for _, cell in cells)
