"""Figures of the shared fraction against a numeric axis: budget, width, sparsity, depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, inf
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from reseed.compare.cell import CellResult
from reseed.compare.sharing_profile import fit_power_law
from reseed.report.axes import (
    Cell,
    amounts,
    distinguishing_knobs,
    label,
    label_knobs,
    other_knob_values,
    row_labels,
    wrapped,
)
from reseed.report.captions import LAYERS_SOURCE, SOURCE, UNSHARED, of_seeds, over
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
from reseed.report.table import count_text, pair_axis_name

# MERGED Figure of how many seeds share a latent: p_m and u_k of each cell.
COLUMNS = 3
"""Most panels in a row."""
LOG_FROM = 8
"""A range whose ends have a larger ratio is drawn on a logarithmic scale."""
ALIKE = 0.5
"""Untrained SAEs whose shared fraction exceeds this started from alike weights."""
DOTTED: Any = (0, (1, 2))
DASHED: Any = (0, (5, 3))
_NAMES = {"tokens": "optimiser steps", "num_latents": "latents", "sparsity": "latents active"}
_TICKS = np.linspace(0, 1, 6)
_LETTER = 0.065
"""Largest width of a letter of a label, in inches."""


@dataclass(frozen=True)
class _Layout:
    """Layout of the figure: a value per cell, in the order of the cells.

    Attributes:
        at: place on the axis.
        lines: name of its line, the same in all panels.
        panels: title of its panel.
    """

    at: Sequence[float]
    lines: Sequence[str]
    panels: Sequence[str]


def axis_name(axis: str) -> str:
    """Return the last word of a key, for file names: ``aux_alpha`` of ``sae.aux_alpha``."""
    return axis.rpartition(".")[2]


def axis_figure(cells: Sequence[Cell], axis: str) -> Figure:
    """Draw the strict shared fraction over ``axis``: a line per arm, panels for the other knobs.

    Without arms there is a line per architecture (or per value of the first knob that differs). The
    budget is drawn in optimiser steps, because steps, not tokens, move the weights.
    """
    plan = _plan(cells, axis)
    names = list(dict.fromkeys(plan.panels))
    columns = min(len(names), COLUMNS)
    rows = ceil(len(names) / columns)
    alone = len(names) == 1
    width, height = (WIDTH * 0.85, 2.6) if alone else (WIDTH / columns, 2.25)
    reference = over(cells, axis, plan.at)
    source = LAYERS_SOURCE if axis_name(axis) == "layer" else SOURCE
    handles = _handles(cells, plan)
    if reference:
        handles.append(Line2D([], [], label=source, **REFERENCE))
    below = 0.2 * ceil(len(handles) / _legend_columns(handles)) + 0.75
    figure = Figure(figsize=(width * columns, height * rows + below))
    grid = panels(figure, len(names), columns)
    for axes, name in zip(grid, names, strict=True):
        _panel(axes, cells, plan, [i for i, p in enumerate(plan.panels) if p == name])
        if reference:
            axes.plot(list(reference), list(reference.values()), **REFERENCE)
        axes.set_title(wrapped(name, int(width / _LETTER)))
    threshold = f"{cells[0][1].settings.threshold:g}"
    one = pair_axis_name(cells, plural=False)
    words = wrapped(
        f"fraction shared with another {one}, cosines ≥ {threshold}", int(height / _LETTER)
    )
    name_outer(grid, columns, _axis_label(cells, axis), words)
    _scale(grid[0], [*plan.at, *reference], room=width - (0.6 if alone else 0.35))
    grid[0].set_yticks(_TICKS)
    grid[0].set_ylim(-0.03, 1.03)
    if "arm" in distinguishing_knobs(cells) and _born_alike(cells):
        figure.suptitle("Stable, or just not moved?", fontsize=10)
    legend_below(figure, handles, columns=_legend_columns(handles))
    return figure


def _plan(cells: Sequence[Cell], axis: str) -> _Layout:
    names = [name for name in distinguishing_knobs(cells) if name != axis]
    who = other_knob_values(cells, axis)
    of_line = next((names.index(name) for name in ("arm", "sae") if name in names), 0)
    return _Layout(
        at=_places(cells, axis),
        lines=[w[of_line] if w else "" for w in who],
        panels=[
            ", ".join(
                f"{int(word):,} tokens" if name == "tokens" and word.isdigit() else word
                for i, (name, word) in enumerate(zip(names, w, strict=True))
                if i != of_line
            )
            for w in who
        ],
    )


def _panel(axes: Axes, cells: Sequence[Cell], plan: _Layout, own: Sequence[int]) -> None:
    faint_grid(axes, "y")
    for i, name in enumerate(dict.fromkeys(plan.lines)):
        line = sorted((j for j in own if plan.lines[j] == name), key=lambda j: plan.at[j])
        if line:
            _line(axes, [cells[j] for j in line], np.array([plan.at[j] for j in line]), i, name)


def _line(
    axes: Axes, cells: Sequence[Cell], at: Float[np.ndarray, " n"], i: int, name: str
) -> None:
    estimates = [cell.estimates["shared_fraction"] for _, cell in cells]
    axes.plot(at, [e.mean for e in estimates], **_look(i, name))
    there = [(j, e) for j, e in enumerate(estimates) if e.low is not None and e.high is not None]
    # A band over consecutive places that have intervals; a bar at a place without such neighbours.
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
    """Return colour and marker, so that lines differ in grey, too. Gaussian surrogates, which have
    no features to find, are dashed like the null."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHED if "surrogate" in name else "-",
    }


def _handles(cells: Sequence[Cell], plan: _Layout) -> list[Artist]:
    names = list(dict.fromkeys(plan.lines))
    return [
        *(Line2D([], [], label=name, **_look(i, name)) for i, name in enumerate(names) if name),
        interval_handle(cells, ["shared_fraction"], COLOURS[0] if len(names) == 1 else GREY),
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
    """Set a tick at every value if there are few; else matplotlib's, in powers of 2 if logarithmic.

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
    """Return the values whose numbers fit without touching, the largest first."""
    at = np.log(values) if log else np.array(values)
    inches = (at - at[0]) / max(np.ptp(at), 1e-300) * room
    named, left = set(), inf
    for value, place in list(zip(values, inches, strict=True))[::-1]:
        half = _LETTER * (len(_amount(value)) + 1) / 2
        if place + half <= left:
            named.add(value)
            left = place - half
    return named


def _born_alike(cells: Sequence[Cell]) -> bool:
    """Return whether some cells started from alike weights and others did not."""
    start = [cell.pair_mean("untrained_shared_fraction") > ALIKE for _, cell in cells]
    return any(start) and not all(start)


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
        title=f"shared with so many others of {count_text(cells)}",
        handlelength=1,
        columnspacing=1,
    )
    axes = right.subplots()
    _unshared_lines(axes, cells)
    if len(cells) <= 4:
        axes.legend(loc="best", title=", ".join(label_knobs(cells)))
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
        title=f"shared with so many others of {count_text(cells)}",
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
    axes.set_xlabel(f"number k of {pair_axis_name(cells)}, of {count_text(cells)}")
    axes.set_ylabel(f"fraction in one of k {pair_axis_name(cells)} only")
    if any(fit_power_law(cell.u) for _, cell in cells):
        axes.set_title("lines: a·k$^{-b}$ + c fitted, limit c")
