"""Figures in which every cell is a line: over thresholds, deciles of firing, ranks of matches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reseed.compare.activation_tables import TOKENS
from reseed.compare.cell import CellResult
from reseed.compare.columns import THRESHOLDS
from reseed.compare.strata import by_stratum
from reseed.report.axes import Cell, label, naming, wrapped
from reseed.report.latents import quality_by_rank
from reseed.report.references import BY_THRESHOLD, SOURCE
from reseed.report.style import COLOURS, GREY, MARKERS, REFERENCE, WIDTH, legend_below
from reseed.report.wording import counted, paired

MOST_LINES = 6
"""Lines of one panel; more cells are panels, by all but the last of the knobs that name them."""


@dataclass(frozen=True)
class Curve:
    """What a cell's line is.

    Attributes:
        at, mean: the points; NaN where there is none.
        low, high: ends of the interval at each, NaN where there is none.
        marked: whether the points have markers.
    """

    at: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]
    marked: bool = True


def threshold_figure(cells: Sequence[Cell]) -> Figure:
    """The strict shared fraction against its threshold, the paper's for Pythia beside it."""

    def curve(cell: CellResult) -> Curve:
        found = [cell.estimates[f"shared_fraction_at_{tau}"] for tau in THRESHOLDS]
        low, high = (np.array([_number(getattr(e, end)) for e in found]) for end in ("low", "high"))
        return Curve(np.array(THRESHOLDS), np.array([e.mean for e in found]), low, high)

    def panel(axes: Axes) -> None:
        axes.plot(list(BY_THRESHOLD), list(BY_THRESHOLD.values()), **REFERENCE)
        axes.axvline(cells[0][1].settings.threshold, color="black", linewidth=0.6, linestyle=":")
        axes.set_xticks(THRESHOLDS)

    return _figure(
        cells,
        curve,
        panel,
        "threshold of both cosines",
        f"fraction shared with another {paired(cells, plural=False)}",
        [Line2D([], [], label=f"{SOURCE}, k=32, 32,768 latents", **REFERENCE)],
    )


def decile_figure(cells: Sequence[Cell]) -> Figure:
    """The strict shared fraction of latents by how often they fire."""
    limit = cells[0][1].settings.live_at_least

    def curve(cell: CellResult) -> Curve:
        table = by_stratum(cell.strata, "decile", cell.settings.confidence)
        columns = ("shared_fraction", "shared_low", "shared_high")
        mean, low, high = (table[name].to_numpy(dtype=np.float64) for name in columns)
        return Curve(np.arange(len(table), dtype=np.float64), mean, low, high)

    def panel(axes: Axes) -> None:
        axes.axvline(1.5, color="black", linewidth=0.6, linestyle=":")
        axes.set_xticks(range(12), ["0", f"<{limit}", *map(str, range(1, 11))])

    return _figure(
        cells,
        curve,
        panel,
        "firing: never, not live, then deciles of live latents",
        f"fraction shared with another {paired(cells, plural=False)}",
        [],
    )


def coverage_figure(cells: Sequence[Cell]) -> Figure:
    """Mean substitution quality of the best matches, against how many of them are taken.

    Cells without activations are left out.

    Raises:
        ValueError: no cell has any.
    """
    cells = with_activations(cells)
    if not cells:
        raise ValueError("no cell has measures on activations to draw")

    def curve(cell: CellResult) -> Curve:
        quality = quality_by_rank(cell)
        nothing = np.full(len(quality), np.nan)
        return Curve(np.arange(1.0, len(quality) + 1), quality, nothing, nothing, marked=False)

    def panel(axes: Axes) -> None:
        axes.set_xscale("log")

    def name(cell: CellResult) -> str:
        area = cell.estimates["substitution_area"]
        ends = "" if area.low is None else f" [{area.low:.2f}, {area.high:.2f}]"
        return f", area {area.mean:.2f}{ends}"

    tokens = sorted({int(cell.pairs[TOKENS].max()) for _, cell in cells})
    count = f"{tokens[0]:,}" + (f"–{tokens[-1]:,}" if len(tokens) > 1 else "")
    return _figure(
        cells,
        curve,
        panel,
        f"matches taken, highest cosines first ({counted(cells)}, {count} tokens)",
        "their mean R: damage that the match repairs",
        [],
        name,
    )


def with_activations(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that were measured on activations."""
    return [(k, c) for k, c in cells if TOKENS in c.pairs and int(c.pairs[TOKENS].max()) > 0]


def _figure(
    cells: Sequence[Cell],
    curve_of: Callable[[CellResult], Curve],
    panel: Callable[[Axes], None],
    below: str,
    beside: str,
    handles: Sequence[Artist],
    more: Callable[[CellResult], str] | None = None,
) -> Figure:
    """Panels of lines with bands, and one legend.

    Args:
        panel: what else every panel has, and its ticks.
        below, beside: names of the axes.
        handles: of what ``panel`` draws.
        more: what the legend says of a cell beside its name.
    """
    groups = _panels(cells)
    columns = min(len(groups), 3)
    rows = ceil(len(groups) / columns)
    alone = len(groups) == 1
    width, height = (WIDTH * 0.75, 2.7) if alone else (WIDTH / columns, 2.1)
    names = list(dict.fromkeys(name for group in groups.values() for name, _ in group))
    curves = {id(cell): curve_of(cell) for _, cell in cells}
    legend: list[Artist] = []
    for i, name in enumerate(names):
        own = next(c for group in groups.values() for line, (_, c) in group if line == name)
        said = more(own) if more and alone else ""
        legend.append(Line2D([], [], label=name + said, **_look(i)))
    if any(not np.isnan(curve.low).all() for curve in curves.values()):
        confidence = cells[0][1].settings.confidence
        text = f"{confidence:.0%} interval over {counted(cells)}"
        legend.append(Patch(facecolor=GREY, alpha=0.3, label=text))
    elif curves and more is None:
        legend.append(Patch(alpha=0, label=f"{counted(cells)}, no interval"))
    legend += handles
    beside_each_other = 2 if max(len(str(h.get_label())) for h in legend) > 24 else 3
    under = 0.2 * ceil(len(legend) / beside_each_other) + 0.5
    figure = Figure(figsize=(width * columns, height * rows + under))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in grid[len(groups) :]:
        axes.set_visible(False)
    for i, (axes, (title, group)) in enumerate(zip(grid, groups.items(), strict=False)):
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        axes.set_axisbelow(True)
        for name, (_, cell) in group:
            _line(axes, curves[id(cell)], names.index(name))
        panel(axes)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(wrapped(title, round(width / 0.07)))
        if i + columns >= len(groups):  # nothing below
            axes.set_xlabel(wrapped(below, round(width / 0.075)))
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel(wrapped(beside, round(height / 0.065)))
    legend_below(figure, legend, columns=beside_each_other)
    return figure


def _panels(cells: Sequence[Cell]) -> dict[str, list[tuple[str, Cell]]]:
    """Title → the lines of a panel, by name: one panel of few cells."""
    if len(cells) <= MOST_LINES:
        return {"": [(label(cells, knobs), (knobs, cell)) for knobs, cell in cells]}
    *first, last = naming(cells)
    found: dict[str, list[tuple[str, Cell]]] = {}
    for knobs, cell in cells:
        title = ", ".join(str(knobs.get(name)) for name in first)
        found.setdefault(title, []).append((str(knobs.get(last)), (knobs, cell)))
    return found


def _look(i: int) -> dict[str, Any]:
    """Colour, marker and, from the ninth line on, dashes: lines are told apart in grey, too."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": ("-", "-.", ":")[i // len(COLOURS) % 3],
    }


def _line(axes: Axes, curve: Curve, i: int) -> None:
    look = _look(i)
    if curve.marked:
        there = ~np.isnan(curve.mean)
        axes.plot(curve.at[there], curve.mean[there], **look)
    elif len(curve.at):
        # Without markers at every point, some at places that are even on the axis of ranks.
        some = np.unique(np.geomspace(1, len(curve.at), 8).round().astype(int)) - 1
        axes.plot(curve.at, curve.mean, **look, markevery=some.tolist())
    axes.fill_between(curve.at, curve.low, curve.high, color=look["color"], alpha=0.16, linewidth=0)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
