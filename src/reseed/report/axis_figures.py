"""Figures of the shared fraction against a numeric axis: budget, width, sparsity, depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, inf
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reseed.report.captions import LAYERS_SOURCE, SOURCE, reference_values
from reseed.report.cell_labels import (
    Cell,
    amounts,
    distinguishing_knobs,
    other_knob_values,
    pair_axis_name,
    threshold_text,
    wrapped,
)
from reseed.report.style import (
    COLOURS,
    GREY,
    MARKERS,
    REFERENCE,
    WIDTH,
    faint_grid,
    interval_handle,
    legend_below,
    name_outer,
    panels,
)

COLUMNS = 3
"""Maximum number of panels in a row."""
LOG_FROM = 8
"""A range whose ends have a larger ratio is drawn on a logarithmic scale."""
ALIKE_FRACTION = 0.5
"""Untrained SAEs whose shared fraction exceeds this started from similar weights."""
DOTTED: Any = (0, (1, 2))
DASHED: Any = (0, (5, 3))
_NAMES = {"tokens": "optimiser steps", "num_latents": "latents", "sparsity": "latents active"}
_TICKS = np.linspace(0, 1, 6)
_LETTER = 0.065
"""Maximum width of a letter of a label, in inches."""


@dataclass(frozen=True)
class _Layout:
    """Layout of the figure: a value per cell, in the order of the cells.

    Attributes:
        at: the cell's position on the axis.
        lines: name of its line, the same in all panels.
        panels: title of its panel.
    """

    at: Sequence[float]
    lines: Sequence[str]
    panels: Sequence[str]


def axis_name(axis: str) -> str:
    """Return the last part of a key, for file names: ``aux_alpha`` of ``sae.aux_alpha``."""
    return axis.rpartition(".")[2]


def axis_figure(cells: Sequence[Cell], axis: str) -> Figure:
    """Draw the strict shared fraction over ``axis``: a line per arm, panels for the other knobs.

    Without arms there is a line per architecture (or per value of the first knob that differs). The
    budget is drawn in optimiser steps, because steps, not tokens, move the weights.
    """
    layout = _layout(cells, axis)
    names = list(dict.fromkeys(layout.panels))
    columns = min(len(names), COLUMNS)
    rows = ceil(len(names) / columns)
    alone = len(names) == 1
    width, height = (WIDTH * 0.85, 2.6) if alone else (WIDTH / columns, 2.25)
    reference = reference_values(cells, axis, layout.at)
    source = LAYERS_SOURCE if axis_name(axis) == "layer" else SOURCE
    handles = _handles(cells, layout)
    if reference:
        handles.append(Line2D([], [], label=source, **REFERENCE))
    below = 0.2 * ceil(len(handles) / _legend_columns(handles)) + 0.75
    figure = Figure(figsize=(width * columns, height * rows + below))
    grid = panels(figure, len(names), columns)
    for axes, name in zip(grid, names, strict=True):
        _panel(axes, cells, layout, [i for i, p in enumerate(layout.panels) if p == name])
        if reference:
            axes.plot(list(reference), list(reference.values()), **REFERENCE)
        axes.set_title(wrapped(name, int(width / _LETTER)))
    one = pair_axis_name(cells, plural=False)
    text = wrapped(
        f"fraction shared with another {one}, cosines ≥ {threshold_text(cells)}",
        int(height / _LETTER),
    )
    name_outer(grid, columns, _axis_label(cells, axis), text)
    _scale(grid[0], [*layout.at, *reference], room=width - (0.6 if alone else 0.35))
    grid[0].set_yticks(_TICKS)
    grid[0].set_ylim(-0.03, 1.03)
    if "arm" in distinguishing_knobs(cells) and _started_alike(cells):
        figure.suptitle("Some runs started from similar weights (dotted)", fontsize=10)
    legend_below(figure, handles, columns=_legend_columns(handles))
    return figure


def _layout(cells: Sequence[Cell], axis: str) -> _Layout:
    names = [name for name in distinguishing_knobs(cells) if name != axis]
    others = other_knob_values(cells, axis)
    of_line = next((names.index(name) for name in ("arm", "sae") if name in names), 0)
    return _Layout(
        at=_places(cells, axis),
        lines=[w[of_line] if w else "" for w in others],
        panels=[
            ", ".join(
                f"{int(word):,} tokens" if name == "tokens" and word.isdigit() else word
                for i, (name, word) in enumerate(zip(names, w, strict=True))
                if i != of_line
            )
            for w in others
        ],
    )


def _panel(axes: Axes, cells: Sequence[Cell], layout: _Layout, own: Sequence[int]) -> None:
    faint_grid(axes, "y")
    for i, name in enumerate(dict.fromkeys(layout.lines)):
        line = sorted((j for j in own if layout.lines[j] == name), key=lambda j: layout.at[j])
        if line:
            _line(axes, [cells[j] for j in line], np.array([layout.at[j] for j in line]), i, name)


def _line(
    axes: Axes, cells: Sequence[Cell], at: Float[np.ndarray, " n"], i: int, name: str
) -> None:
    estimates = [cell.estimates["shared_fraction"] for _, cell in cells]
    axes.plot(at, [e.mean for e in estimates], **_look(i, name))
    there = [(j, e) for j, e in enumerate(estimates) if e.low is not None and e.high is not None]
    # Consecutive points with intervals are joined by a band; a point without such a neighbour has a
    # bar, because a band of one point is invisible.
    for _, run in groupby(enumerate(there), key=lambda x: x[1][0] - x[0]):
        stretch = [entry for _, entry in run]
        places = at[[j for j, _ in stretch]]
        low, high = np.array([(e.low, e.high) for _, e in stretch]).T
        colour = _look(i, name)["color"]
        if len(stretch) > 1:
            faint, edge = (colour, 0.16), (colour, 0.45)  # edges distinguish overlapping bands
            axes.fill_between(places, low, high, facecolor=faint, edgecolor=edge, linewidth=0.6)
        else:
            axes.vlines(places, low, high, color=colour, alpha=0.35, linewidth=3)
    untrained = [cell.pair_mean("untrained_shared_fraction") for _, cell in cells]
    axes.plot(at, untrained, color=GREY, linestyle=DOTTED, linewidth=1.4, zorder=1.5)
    null = [cell.pair_mean("null_shared_fraction") for _, cell in cells]
    axes.plot(at, null, color="black", linestyle=DASHED, linewidth=0.6, zorder=1.6)


def _look(i: int, name: str) -> dict[str, Any]:
    """Return colour and marker, so that lines differ in greyscale, too. Gaussian surrogates, which
    have no features to find, are dashed like the null."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHED if "surrogate" in name else "-",
    }


def _handles(cells: Sequence[Cell], layout: _Layout) -> list[Artist]:
    names = list(dict.fromkeys(layout.lines))
    known = any(cell.estimates["shared_fraction"].low is not None for _, cell in cells)
    return [
        *(Line2D([], [], label=name, **_look(i, name)) for i, name in enumerate(names) if name),
        interval_handle(cells, known, COLOURS[0] if len(names) == 1 else GREY),
        Line2D([], [], color=GREY, linestyle=DOTTED, linewidth=1.4, label="untrained"),
        Line2D([], [], color="black", linestyle=DASHED, linewidth=0.6, label="null: random rows"),
    ]


def _legend_columns(handles: Sequence[Artist]) -> int:
    return 3 if max(len(str(handle.get_label())) for handle in handles) <= 30 else 2


def _places(cells: Sequence[Cell], axis: str) -> list[float]:
    if axis == "tokens" and all("steps" in cell.runs for _, cell in cells):
        return [float(cell.runs["steps"].to_numpy()[0]) for _, cell in cells]
    return amounts(cells, axis)


def _axis_label(cells: Sequence[Cell], axis: str) -> str:
    if axis != "tokens":
        return _NAMES.get(axis, axis)
    if not all("steps" in cell.runs for _, cell in cells):
        return "training tokens"
    batches = {
        round(t / s) for t, s in zip(amounts(cells, axis), _places(cells, axis), strict=True)
    }
    of = f" of {batches.pop():,} tokens" if len(batches) == 1 else ""
    return _NAMES[axis] + of


def _scale(axes: Axes, at: Sequence[float], room: float) -> None:
    """Set the scale and the ticks: one at every value if there are few, else those of matplotlib.

    Args:
        room: length of the axis, in inches.
    """
    values = sorted(set(at))
    log = values[0] > 0 and values[-1] / values[0] > LOG_FROM
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _amount(v)))
    if len(values) <= 9:
        axes.xaxis.set_major_locator(FixedLocator(values))
        named = _named(values, log, room)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _amount(v) if v in named else ""))


def _amount(value: float) -> str:
    return f"{value:,g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _named(values: Sequence[float], log: bool, room: float) -> set[float]:
    """Return the values whose labels fit without overlap; a larger value has precedence."""
    at = np.log(values) if log else np.array(values)
    inches = (at - at[0]) / max(np.ptp(at), 1e-300) * room
    named, left = set(), inf
    for value, place in list(zip(values, inches, strict=True))[::-1]:
        half = _LETTER * (len(_amount(value)) + 1) / 2
        if place + half <= left:
            named.add(value)
            left = place - half
    return named


def _started_alike(cells: Sequence[Cell]) -> bool:
    """Return whether the runs of some cells, but not of all, started from similar weights."""
    start = [cell.pair_mean("untrained_shared_fraction") > ALIKE_FRACTION for _, cell in cells]
    return any(start) and not all(start)
