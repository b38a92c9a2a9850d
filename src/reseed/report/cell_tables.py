"""Tables with a row per cell, made of columns that say what stands there for a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan

from reseed.compare.cell import CellResult
from reseed.compare.statistics import Interval
from reseed.report.axes import MISSING, Cell, columns, knob_values
from reseed.report.wording import Wording, bounds, null_in_words, number, with_interval

Column = Callable[[CellResult], str]
"""What stands in a column for a cell."""


def cell_table(cells: Sequence[Cell], made: Mapping[str, Column], *footnotes: str) -> Wording:
    """A row per cell: the knobs that tell cells apart, and head → what the column says."""
    knobs = columns(cells)
    rows = tuple(
        (*knob_values(knobs, k), *(column(cell) for column in made.values())) for k, cell in cells
    )
    header = (*knobs, *made)
    return Wording(header, rows, len(knobs), "", footnotes)


def measured(measures: Mapping[str, str]) -> dict[str, Column]:
    """Head → the estimate of that name with its interval."""

    def column(name: str) -> Column:
        return lambda cell: shown(cell, name)

    return {head: column(name) for head, name in measures.items()}


def pair_mean(name: str) -> Column:
    """The mean of a column of the pairs that has no interval."""
    return lambda cell: number(cell.pair_mean(name))


def run_mean(name: str) -> Column:
    """The mean over runs of a number of things."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        return MISSING if found is None or isnan(found.mean) else f"{found.mean:.1f}"

    return column


def chance(name: str, drawn: bool) -> Column:
    """A shared fraction by chance; ``drawn`` where it is found in simulated dictionaries."""

    def column(cell: CellResult) -> str:
        mean = cell.pair_mean(name)
        if isnan(mean) or not drawn:
            return number(mean)
        return null_in_words(mean, cell.null_simulated_latents)

    return column


def kappa(rung: str, null: str) -> Column:
    """κ against a rung of the ladder of nulls, with the interval of S carried over.

    Args:
        null: the column of the pairs with S₀.
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
    """``0.80 [0.70, 0.90] / 0.50``: an estimate, then its null."""

    def column(cell: CellResult) -> str:
        own, null = shown(cell, name), cell.pair_mean(f"null_{name}")
        return own if isnan(null) else f"{own} / {number(null)}"

    return column


def shown(cell: CellResult, name: str) -> str:
    """An estimate with its interval, where the cell has it."""
    found: Interval | None = cell.estimates.get(name)
    return MISSING if found is None else with_interval(found)
