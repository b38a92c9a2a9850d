"""Figure "Is a shared latent true?": atoms among shared latents and among the others."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reseed.compare.statistics import Interval
from reseed.compare.truth import PREFIX
from reseed.report.axes import Cell, naming, row_labels
from reseed.report.style import BLUE, GREY, ORANGE, WIDTH, faint_grid, interval_handle, legend_below
from reseed.report.truth import TITLE, with_labels
from reseed.report.wording import paired, with_interval

_SIDES = (("atom_given_orphan", ORANGE, "D", 0.13), ("atom_given_shared", BLUE, "o", -0.13))
"""Estimate, colour, marker, and the offset of the interval below its row."""


def truth_figure(cells: Sequence[Cell]) -> Figure:
    """Draw P(atom | shared) and P(atom | orphan) of each cell, joined, with their difference as a
    number.

    Cells without labels are left out. If one of the two is undefined, the row is grey and gives the
    reason.

    Raises:
        ValueError: no cell has labels.
    """
    cells = with_labels(cells)
    if not cells:
        raise ValueError("no cell has labels of a known truth to draw")
    names, rows = row_labels(cells)
    figure = Figure(figsize=(WIDTH, 1.6 + (0.3 if len(cells) <= 8 else 0.26) * (rows[-1] + 1)))
    axes = figure.add_subplot()
    for row, (_, cell) in zip(rows, cells, strict=True):
        _row(axes, row, cell.estimates)
    axes.set_yticks(rows, names)
    axes.set_ylim(rows[-1] + 0.6, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.tick_params(axis="y", length=0)
    faint_grid(axes, "x")
    one = paired(cells, plural=False)
    percent = f"{cells[0][1].settings.confidence:.0%}"
    axes.set_xlabel("fraction of live latents that are atoms: one true feature each")
    axes.set_ylabel(", ".join(naming(cells)))
    axes.set_title(TITLE, fontsize=10)
    axes.text(1.04, -0.75, f"difference [{percent}]", va="bottom", fontsize=7.5)
    handles = [
        _mark(BLUE, "o", f"shared with another {one}"),
        _mark(ORANGE, "D", f"not shared with another {one}"),
        interval_handle(cells, [PREFIX + name for name, *_ in _SIDES], GREY),
    ]
    if any(_undefined(cell.estimates) for _, cell in cells):
        handles.append(_mark(GREY, "o", "the other is undefined"))
    legend_below(figure, handles, columns=2)
    return figure


def _row(axes: Axes, row: float, estimates: dict[str, Interval]) -> None:
    found = {name: estimates[PREFIX + name] for name, *_ in _SIDES}
    undefined = _undefined(estimates)
    for name, hue, marker, below in _SIDES:
        e, colour = found[name], GREY if undefined else hue
        if e.low is not None and e.high is not None:
            axes.barh(row + below, e.high - e.low, left=e.low, height=0.2, color=colour, alpha=0.3)
        axes.plot(e.mean, row, marker, color=colour, markersize=5, zorder=3)
    difference = estimates[PREFIX + "difference"]
    if undefined:
        axes.text(1.04, row, difference.reason, va="center_baseline", fontsize=7, color=GREY)
        return
    axes.plot([e.mean for e in found.values()], [row, row], color=GREY, linewidth=1.6, zorder=2.5)
    axes.text(1.04, row, with_interval(difference), va="center_baseline", fontsize=7.5)


def _undefined(estimates: dict[str, Interval]) -> bool:
    return any(isnan(estimates[PREFIX + name].mean) for name, *_ in _SIDES)


def _mark(colour: str, marker: str, text: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markersize=5, linestyle="", label=text)
