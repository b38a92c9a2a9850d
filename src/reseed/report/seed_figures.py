"""Figure of how many seeds share a latent: p_m and u_k of each cell."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from reseed.compare.cell import CellResult
from reseed.compare.profile import fit_power_law
from reseed.report.axes import Cell, label, naming, row_labels, wrapped
from reseed.report.references import SOURCE, UNSHARED, of_seeds
from reseed.report.style import COLOURS, MARKERS, REFERENCE, WIDTH, faint_grid, legend_below, panels
from reseed.report.wording import counted, paired

MOST_RINGS = 8
"""Most cells drawn as rings; more are drawn as bars."""

FEWEST_FOR_REFERENCE = 4
"""Fewest seeds whose line of u_k is long enough to show the paper's beside it."""


def seeds_figure(cells: Sequence[Cell]) -> Figure:
    """Draw the rings of p_m, one per cell, beside the lines of u_k; bars if cells are many."""
    if len(cells) > MOST_RINGS:
        return _bars(cells)
    columns = 1 if len(cells) == 1 else 2 if len(cells) <= 6 else 3
    rows = ceil(len(cells) / columns)
    figure = Figure(figsize=(WIDTH, max(2.5, 1.25 * rows + 0.6)))
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.0, 1.25])
    left, right = halves
    grid = panels(left, len(cells), columns, shared=False)
    most = max(cell.n_seeds for _, cell in cells)
    for axes, (knobs, cell) in zip(grid, cells, strict=True):
        _ring(axes, cell, wrapped(label(cells, knobs), 48 // columns), most)
    left.legend(
        handles=[Patch(facecolor=_shade(m, most), label=str(m)) for m in range(most)],
        loc="outside lower center",
        ncols=min(most, 5),
        title=f"shared with so many others of {counted(cells)}",
        handlelength=1,
        columnspacing=1,
    )
    axes = right.subplots()
    _unshared_lines(axes, cells)
    if len(cells) <= 4:
        axes.legend(loc="best", title=", ".join(naming(cells)))
    else:
        right.legend(loc="outside lower center", ncols=2, columnspacing=1)
    return figure


def _ring(axes: Axes, cell: CellResult, title: str, most: int) -> None:
    axes.pie(
        cell.p,
        colors=[_shade(m, most) for m in range(cell.n_seeds)],
        startangle=90,
        counterclock=False,
        radius=1.2,
        wedgeprops={"width": 0.42, "edgecolor": "white", "linewidth": 0.6},
    )
    axes.text(0, 0, f"{cell.p[0]:.0%}\nin none", ha="center", va="center", fontsize=7.5)
    axes.set_title(title, pad=6)


def _bars(cells: Sequence[Cell]) -> Figure:
    """Draw p_m of every cell as a bar. u_k follows from it and is in the table."""
    names, rows = row_labels(cells)
    figure = Figure(figsize=(WIDTH * 0.9, 1.3 + 0.24 * (rows[-1] + 1)))
    axes = figure.add_subplot()
    most = max(cell.n_seeds for _, cell in cells)
    for row, (_, cell) in zip(rows, cells, strict=True):
        starts = np.concatenate([[0], np.cumsum(cell.p)[:-1]])
        colours = [_shade(m, most) for m in range(cell.n_seeds)]
        axes.barh(row, cell.p, left=starts, height=0.72, color=colours)
        axes.text(1.02, row, f"{cell.p[0]:.0%}", va="center", fontsize=7)
    axes.text(1.02, -1, "in none", va="center", fontsize=7)
    axes.set_yticks(rows, names)
    axes.set_ylim(rows[-1] + 0.6, -1.5)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("fraction of latents")
    legend_below(
        figure,
        [Patch(facecolor=_shade(m, most), label=str(m)) for m in range(most)],
        columns=min(most, 10),
        title=f"shared with so many others of {counted(cells)}",
        handlelength=1,
        columnspacing=1,
    )
    return figure


def _shade(m: int, n: int) -> tuple[float, float, float, float]:
    """Return a shade of blue: light for latents of one seed, dark for those of all."""
    return mpl.colormaps["Blues"](0.16 + 0.8 * m / max(1, n - 1))


def _unshared_lines(axes: Axes, cells: Sequence[Cell]) -> None:
    most = max(cell.n_seeds for _, cell in cells)
    for i, (knobs, cell) in enumerate(cells):
        colour, k = COLOURS[i % len(COLOURS)], np.arange(2, cell.n_seeds + 1)
        fit, name = fit_power_law(cell.u), label(cells, knobs)
        if fit is not None:
            smooth = np.linspace(2, cell.n_seeds, 100)
            axes.plot(smooth, fit(smooth), color=colour, linewidth=0.9)
            name += f" (limit {fit.c:.2f})"
        axes.plot(
            k,
            cell.u,
            linestyle="-" if fit is None else "",
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            label=name,
        )
    if most >= FEWEST_FOR_REFERENCE and of_seeds(cells):
        known = {k: u for k, u in UNSHARED.items() if k <= most}
        axes.plot(list(known), list(known.values()), label=SOURCE, **REFERENCE)
    axes.set_xticks(range(2, most + 1))
    axes.set_xlim(1.7, most + 0.3)
    axes.set_ylim(-0.02, 1.02)
    faint_grid(axes, "y")
    axes.set_xlabel(f"number k of {paired(cells)}, of {counted(cells)}")
    axes.set_ylabel(f"fraction in one of k {paired(cells)} only")
    if any(fit_power_law(cell.u) for _, cell in cells):
        axes.set_title("lines: a·k$^{-b}$ + c fitted, limit c")
