"""Matrix of a measure over all pairs of values, such as layers: how much of layer 3's SAE is in
layer 6's? As tables, as ``matrix.csv`` and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isnan
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from reseed.compare.pairing import PairGroup, pair_groups
from reseed.report.cell_labels import Cell, columns, wrapped
from reseed.report.format import format_number, measure_name
from reseed.report.style import GREY, WIDTH, panels
from reseed.report.table import Table
from reseed.report.value_pairs import (
    incompatible,
    most_differing_groups,
    shared_knobs,
    value_name,
    value_pair_cells,
)

MAX_FAMILIES = 6
"""Maximum number of families of cells (such as the layers of one model) for which matrices are
shown; more are too many to read."""
_WRITTEN = 12
"""Maximum number of values for which the squares contain numbers."""
_LIGHT = 0.55
"""On squares darker than this fraction of the scale the number is white."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One measure of all pairs of values.

    Attributes:
        title: the measure, and the family of cells if there are several.
        axis: axis of the values; empty if they have no common name.
        values: names of rows and columns, in order.
        entries: the measure; NaN where there are no such pairs.
        threshold: threshold of the sharing rule.
    """

    title: str
    axis: str
    values: tuple[str, ...]
    entries: Float[np.ndarray, "values values"]
    threshold: float


def value_matrices(cells: Sequence[Cell]) -> list[Matrix]:
    """Return, for each family of cells, the primary measure and one-sided coverage.

    Families with fewer than 3 values are left out, unless they have pairs of runs with the same
    value. With more than `MAX_FAMILIES` families the list is empty.
    """
    cells = value_pair_cells(cells)
    families = _families(cells, named=True)
    if len(families) > MAX_FAMILIES:
        return []
    names = columns([(own[0].knobs, None) for own in families])
    made = []
    for own in families:
        if len(_values(own)) < 3 and not any(group.within for group in own):
            continue
        if all(incompatible(group) for group in own):
            continue
        settings = cells[0][1].settings
        where = ", ".join(str(own[0].knobs[name]) for name in names)
        for column in (settings.primary, None):
            what = measure_name(column) if column else "covered"
            rule = "" if column else ": of the latents of the row, those that the column covers"
            title = f"{what.capitalize()}{rule}" + (f" ({where})" if where else "")
            entries = np.array(list(_entries(own, column).values()))
            values = tuple(_values(own))
            made.append(Matrix(title, value_name(cells), values, entries, settings.threshold))
    return made


def value_matrix_tables(cells: Sequence[Cell]) -> list[Table]:
    """Return `value_matrices` as tables."""
    return [
        Table(
            (found.axis, *found.values),
            tuple(
                (value, *(format_number(float(x)) for x in row))
                for value, row in zip(found.values, found.entries, strict=True)
            ),
            1,
            found.title,
            (),
        )
        for found in value_matrices(cells)
    ]


def matrix_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return ``matrix.csv``: for each family of cells and measure a row and a column per value."""
    cells = value_pair_cells(cells)
    rows: list[Mapping[str, Any]] = []
    measures = (*dict.fromkeys((cells[0][1].settings.primary, "shared_fraction")), None)
    for own in _families(cells):
        for column in measures:
            for value, entries in _entries(own, column).items():
                named = dict(zip(_values(own), entries, strict=True))
                rows.append({**own[0].knobs, "measure": column or "coverage", "of": value, **named})
    return pd.DataFrame(rows)


def _families(cells: Sequence[Cell], named: bool = False) -> list[list[PairGroup]]:
    """Return the groups of `most_differing_groups`, by family.

    Args:
        named: whether to leave out groups whose values have no names.
    """
    families: dict[Any, list[PairGroup]] = {}
    for group in most_differing_groups(pair_groups(cells)) if cells else []:
        if group.first or not named:
            families.setdefault(shared_knobs(group), []).append(group)
    return list(families.values())


def _values(own: Sequence[PairGroup]) -> list[str]:
    return list(dict.fromkeys([g.first for g in own] + [g.second for g in own]))


def _entries(own: Sequence[PairGroup], column: str | None) -> dict[str, list[float]]:
    """Return row value → an entry per value; NaN where there are no such pairs.

    Args:
        column: a symmetric measure, or None for the coverage of the row's latents by the column's.
    """
    at: dict[tuple[str, str], float] = {}
    for group in own:
        forth, back = (column, column) if column else ("coverage_a", "coverage_b")
        if group.within and column is None:
            forth = back = "coverage"
        at[group.first, group.second] = group.mean(forth)
        at[group.second, group.first] = group.mean(back)
    values = _values(own)
    return {a: [at.get((a, b), float("nan")) for b in values] for a in values}


def matrix_figure(cells: Sequence[Cell]) -> Figure:
    """Draw a heat map for each measure and family of cells, darker for more.

    Raises:
        ValueError: no pairs differ in a chosen value, or there are too few values for a matrix.
    """
    found = value_matrices(cells)
    if not found:
        raise ValueError("there is no matrix of values to draw")
    columns = 2
    rows = ceil(len(found) / columns)
    side = WIDTH / columns
    figure = Figure(figsize=(WIDTH, rows * side * 0.9 + 0.3))
    grid = panels(figure, len(found), columns, shared=False)
    most = max(float(np.nanmax(m.entries, initial=0.0)) for m in found)
    top = max(0.2, ceil(most * 10 - 1e-9) / 10)  # so that small numbers differ visibly
    images = [
        _squares(axes, matrix, round(side / 0.075), top)
        for axes, matrix in zip(grid, found, strict=True)
    ]
    bar = figure.colorbar(images[0], ax=grid, shrink=0.6, pad=0.02,
                          ticks=MaxNLocator(5, steps=[1, 2, 5, 10]))  # fmt: skip
    bar.set_label("fraction of latents")
    bar.outline.set_visible(False)  # type: ignore[operator]
    figure.supxlabel(_below(cells, found), fontsize=7.5)
    return figure


def _squares(axes: Axes, matrix: Matrix, letters: int, top: float) -> AxesImage:
    image = axes.imshow(matrix.entries, cmap="Blues", vmin=0, vmax=top)
    size = len(matrix.values)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    turned = 0 if max(map(len, matrix.values)) * size < letters else 45
    axes.set_xticks(range(size), matrix.values, rotation=turned, ha="right" if turned else "center")
    axes.set_yticks(range(size), matrix.values)
    axes.set_title(wrapped(matrix.title, letters))
    if matrix.axis:
        axes.set_ylabel(matrix.axis)
    for i, j in np.ndindex(size, size) if size <= _WRITTEN else ():
        value = float(matrix.entries[i, j])
        colour = GREY if isnan(value) else "white" if value > _LIGHT * top else "black"
        axes.text(j, i, format_number(value), ha="center", va="center", color=colour, fontsize=7)
    return image


def _below(cells: Sequence[Cell], found: Sequence[Matrix]) -> str:
    over = value_pair_cells(cells)
    counts = {group.counts: group.n for group in pair_groups(over)}
    named = sorted(counts, key=lambda text: (counts[text], text))
    count = "–".join(dict.fromkeys((named[0], named[-1])))
    return f"cosines ≥ {found[0].threshold:g}; mean over {count} seeds; – where there are no pairs"
