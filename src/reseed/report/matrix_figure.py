"""Figure of the matrix of values: how much of layer 3's SAE is in layer 6's?"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isnan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from reseed.compare.pairing import groups
from reseed.report.axes import Cell, wrapped
from reseed.report.matrices import Matrix, value_matrices
from reseed.report.pairings import general
from reseed.report.style import GREY, WIDTH, panels
from reseed.report.wording import number

_WRITTEN = 12
"""Up to this many values, the numbers are written into the squares."""
_LIGHT = 0.55
"""On squares darker than this fraction of the scale the number is white."""


def matrix_figure(cells: Sequence[Cell]) -> Figure:
    """Draw a heat map for each measure and family of cells, darker for more.

    Raises:
        ValueError: no values pair up, or too few for a matrix.
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
        axes.text(j, i, number(value), ha="center", va="center", color=colour, fontsize=7)
    return image


def _below(cells: Sequence[Cell], found: Sequence[Matrix]) -> str:
    over = general(cells)
    seeds = {len(group.levels) for group in groups(over)}
    count = "–".join(str(n) for n in sorted({min(seeds), max(seeds)}))
    return f"cosines ≥ {found[0].threshold:g}; mean over {count} seeds; – where no runs pair up"
