"""Tables as text, and tables with a row per cell, made of columns.

A `Table` is what the terminal, markdown, LaTeX and the report typeset. `cell_table` makes one from
columns: functions from a cell to its entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan

from reseed.compare.cell import CellResult
from reseed.report.axes import Cell, columns, knob_values
from reseed.report.format import MISSING, bounds, null_text, number, with_interval

Column = Callable[[CellResult], str]
"""A function from a cell to its entry in a column."""


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        header: column names; a line break where a column name may break.
        rows: as many entries each as the header.
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


def estimate_columns(measures: Mapping[str, str]) -> dict[str, Column]:
    """Return columns of estimates with their intervals.

    Args:
        measures: heading → name of the estimate.
    """

    def column(name: str) -> Column:
        return lambda cell: estimate_text(cell, name)

    return {head: column(name) for head, name in measures.items()}


def pair_column(name: str) -> Column:
    """Return a column of the mean of a pair measure, without interval."""
    return lambda cell: number(cell.pair_mean(name))


def mean_column(name: str) -> Column:
    """Return a column of the mean of an estimate, without interval."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        return MISSING if found is None else number(found.mean)

    return column


def count_column(name: str) -> Column:
    """Return a column of the mean over runs of a count, with one decimal."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        return MISSING if found is None or isnan(found.mean) else f"{found.mean:.1f}"

    return column


def null_column(name: str, drawn: bool) -> Column:
    """Return a column of a shared fraction by chance.

    Args:
        drawn: whether it comes from simulated dictionaries, so that a 0 has a limit of detection.
    """

    def column(cell: CellResult) -> str:
        mean = cell.pair_mean(name)
        if isnan(mean) or not drawn:
            return number(mean)
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
            return number(mean)
        ends = [(end - by_chance) / (1 - by_chance) for end in (trained.low, trained.high)]
        return f"{number(mean)} {bounds(*ends)}"

    return column


def estimate_null_column(name: str) -> Column:
    """Return a column of an estimate, then its null: ``0.80 [0.70, 0.90] / 0.50``."""

    def column(cell: CellResult) -> str:
        own, null = estimate_text(cell, name), cell.pair_mean(f"null_{name}")
        return own if isnan(null) else f"{own} / {number(null)}"

    return column


def estimate_text(cell: CellResult, name: str) -> str:
    """Return an estimate with its interval, or `MISSING` if the cell lacks it."""
    found = cell.estimates.get(name)
    return MISSING if found is None else with_interval(found)
