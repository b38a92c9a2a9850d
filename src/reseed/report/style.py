"""Common style of all figures.

Colours are those of Okabe & Ito, which colour-blind readers can distinguish. Every colour goes with
a marker or a shade of its own, so that the figures can be read in greyscale.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch

from reseed.report.cell_labels import Cell, count_text

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*<>hp"
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.title_fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.05,
    "text.parse_math": False,  # a dollar sign in a name is a character
    "svg.fonttype": "path",
    "svg.hashsalt": "reseed",
}
REFERENCE: Any = {
    "color": GREY, "linestyle": "--", "linewidth": 1.0, "marker": "x", "markersize": 4,
    "zorder": 1.5,
}  # fmt: skip
"""Style of the paper's numbers in every figure."""
WIDTH = 6.8
"""Text width of a page, in inches."""


def panels(figure: FigureBase, count: int, columns: int, *, shared: bool = True) -> list[Axes]:
    """Return ``count`` axes in rows of ``columns``; the last row may be shorter."""
    rows = ceil(count / columns)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    return list(grid[:count])


def name_outer(grid: Sequence[Axes], columns: int, below: str, beside: str) -> None:
    """Label axes that share their scales: x where no panel is below, y at the left end."""
    for i, axes in enumerate(grid):
        if i + columns >= len(grid):
            axes.set_xlabel(below)
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel(beside)


def faint_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Draw faint grid lines behind the data."""
    axes.grid(axis=axis, color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)


def legend_below(
    figure: FigureBase, handles: Sequence[Artist], columns: int, **options: Any
) -> None:
    """Draw a legend below everything else, where it covers nothing."""
    options = {"ncols": columns, "columnspacing": 1.5} | options
    figure.legend(handles=list(handles), loc="outside lower center", **options)


def interval_handle(cells: Sequence[Cell], known: bool, colour: str) -> Patch:
    """Return the legend handle for interval bands; if no interval is ``known``, an invisible handle
    whose label says so."""
    if not known:
        return Patch(alpha=0, label=f"{count_text(cells)}, no interval")
    text = f"{cells[0][1].settings.confidence:.0%} interval over {count_text(cells)}"
    return Patch(facecolor=colour, alpha=0.3, label=text)


def scatter_of_two(
    axes: Axes,
    x: Float[np.ndarray, " n"],
    y: Float[np.ndarray, " n"],
    holds: Bool[np.ndarray, " n"],
) -> None:
    """Draw small blue dots where ``holds``, and under them orange plus signs where it does not."""
    for flag, colour, marker, size, line in ((False, ORANGE, "+", 9, 0.5), (True, BLUE, "o", 4, 0)):
        which = holds == flag
        axes.scatter(
            x[which], y[which], s=size, c=colour, marker=marker, alpha=0.5, linewidths=line,
            rasterized=True,
        )  # fmt: skip
