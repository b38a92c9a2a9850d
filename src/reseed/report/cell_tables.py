"""Tables with a row per cell, built from columns: functions from a cell to its entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan

from reseed.compare.cell import CellResult
from reseed.compare.statistics import Interval
from reseed.report.axes import MISSING, Cell, columns, knob_values
from reseed.report.wording import Wording, bounds, null_in_words, number, with_interval

Column = Callable[[CellResult], str]
"""A function from a cell to its entry in a column."""


def cell_table(cells: Sequence[Cell], made: Mapping[str, Column], *footnotes: str) -> Wording:
    """Make a table with a row per cell: the knobs that distinguish cells, then the columns.

    Args:
        made: heading → column.
    """
    knobs = columns(cells)
    rows = tuple(
        (*knob_values(knobs, k), *(column(cell) for column in made.values())) for k, cell in cells
    )
    header = (*knobs, *made)
    return Wording(header, rows, len(knobs), "", footnotes)


def measured(measures: Mapping[str, str]) -> dict[str, Column]:
    """Return columns of estimates with their intervals.

    Args:
        measures: heading → name of the estimate.
    """

    def column(name: str) -> Column:
        return lambda cell: shown(cell, name)

    return {head: column(name) for head, name in measures.items()}


def pair_mean(name: str) -> Column:
    """Return a column of the mean of a pair measure, without interval."""
    return lambda cell: number(cell.pair_mean(name))


def run_mean(name: str) -> Column:
    """Return a column of the mean over runs of a count, with one decimal."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        return MISSING if found is None or isnan(found.mean) else f"{found.mean:.1f}"

    return column


def chance(name: str, drawn: bool) -> Column:
    """Return a column of a shared fraction by chance.

    Args:
        drawn: whether it comes from simulated dictionaries, so that a 0 has a limit of detection.
    """

    def column(cell: CellResult) -> str:
        mean = cell.pair_mean(name)
        if isnan(mean) or not drawn:
            return number(mean)
        return null_in_words(mean, cell.null_simulated_latents)

    return column


def kappa(rung: str, null: str) -> Column:
    """Return a column of κ against a null, with the interval of S carried over.

    Args:
        rung: ``isotropic``, ``covariance`` or ``untrained``.
        null: the pair measure with S₀.
    """
    name = "kappa" if rung == "isotropic" else f"kappa_{rung}"

    def column(cell: CellResult) -> str:
        mean, by_chance = cell.pair_mean(name), cell.pair_mean(null)
        shared = cell.estimates["shared_fraction"]
        if isnan(mean) or by_chance >= 1 or shared.low is None or shared.high is None:
            return number(mean)
        ends = [(end - by_chance) / (1 - by_chance) for end in (shared.low, shared.high)]
        return f"{number(mean)} {bounds(*ends)}"

    return column


def beside_null(name: str) -> Column:
    """Return a column of an estimate, then its null: ``0.80 [0.70, 0.90] / 0.50``."""

    def column(cell: CellResult) -> str:
        own, null = shown(cell, name), cell.pair_mean(f"null_{name}")
        return own if isnan(null) else f"{own} / {number(null)}"

    return column


def shown(cell: CellResult, name: str) -> str:
    """Return an estimate with its interval, or `MISSING` if the cell lacks it."""
    found: Interval | None = cell.estimates.get(name)
    return MISSING if found is None else with_interval(found)
