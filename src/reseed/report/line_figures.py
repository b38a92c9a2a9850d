"""Figures with a line per cell: over thresholds, deciles of firing, and numbers of matches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float, Int
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reseed.compare.activations.substitution import clip_quality, quality_by_coverage
from reseed.compare.cell import CellResult
from reseed.compare.measures import THRESHOLDS
from reseed.compare.registry import TOKENS
from reseed.compare.strata import DECILES, shared_by_stratum
from reseed.compare.tables import lists
from reseed.report.captions import BY_THRESHOLD, SOURCE, compares_seeds
from reseed.report.cell_labels import Cell, count_text, label, label_knobs, pair_axis_name, wrapped
from reseed.report.format import one_line, range_text, with_interval
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

NOT_LIVE = 2
"""Number of strata before the first decile: never fired, and not live."""
MOST_LINES = 6
"""Maximum number of lines in one panel. More cells are split into panels, by all but the last of
the knobs that name them."""


@dataclass(frozen=True)
class _LegendText:
    """Text added to the legend: ``of`` returns the text for a cell, ``title`` explains it."""

    of: Callable[[CellResult], str]
    title: str


@dataclass(frozen=True)
class Curve:
    """Points and intervals of a cell's line.

    Attributes:
        at, mean: coordinates of the points; NaN for a gap.
        low, high: ends of each interval; NaN if there is none.
        apart: whether the points are categories, so that intervals are bars and not a band.
        dense: whether the points are too many for a marker each.
    """

    at: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]
    apart: bool = False
    dense: bool = False


def threshold_figure(cells: Sequence[Cell]) -> Figure:
    """Draw the strict shared fraction against its threshold, with the paper's values for Pythia."""

    def curve(cell: CellResult) -> Curve:
        found = [cell.estimates[f"shared_fraction_at_{tau}"] for tau in THRESHOLDS]
        low, high = (np.array([_number(getattr(e, end)) for e in found]) for end in ("low", "high"))
        return Curve(np.array(THRESHOLDS), np.array([e.mean for e in found]), low, high)

    def panel(axes: Axes, wide: bool) -> None:
        if compares_seeds(cells):
            axes.plot(list(BY_THRESHOLD), list(BY_THRESHOLD.values()), **REFERENCE)
        axes.axvline(cells[0][1].settings.threshold, color="black", linewidth=0.6, linestyle=":")
        axes.set_xticks(THRESHOLDS)

    reference = Line2D([], [], label=f"{SOURCE}, k=32, 32,768 latents", **REFERENCE)
    return _figure(
        cells,
        curve,
        panel,
        "threshold of both cosines",
        f"fraction shared with another {pair_axis_name(cells, plural=False)}",
        [reference] if compares_seeds(cells) else [],
    )


def decile_figure(cells: Sequence[Cell]) -> Figure:
    """Draw the strict shared fraction of latents by how often they fire."""
    limit = cells[0][1].settings.live_at_least

    def curve(cell: CellResult) -> Curve:
        table = shared_by_stratum(cell.strata, "decile", cell.settings.confidence)
        columns = ("shared_fraction", "shared_low", "shared_high")
        mean, low, high = (table[name].to_numpy(dtype=np.float64) for name in columns)
        # The NaN interrupts the line between latents that are not live and the deciles.
        values = (np.insert(v, NOT_LIVE, np.nan) for v in (mean, low, high))
        return Curve(np.insert(np.arange(float(len(table))), NOT_LIVE, NOT_LIVE - 0.5), *values,
                     apart=True)  # fmt: skip

    def panel(axes: Axes, wide: bool) -> None:
        axes.axvline(NOT_LIVE - 0.5, color="black", linewidth=0.6, linestyle=":")
        named = ["0", f"<{limit}" if wide else "", *map(str, range(1, DECILES + 1))]
        if not wide:
            named = [n if i < NOT_LIVE or (i - NOT_LIVE) % 3 == 0 else "" for i, n in
                     enumerate(named)]  # fmt: skip
        axes.set_xticks(range(len(named)), named)

    return _figure(
        cells,
        curve,
        panel,
        "firing: never, not live, then deciles of live latents",
        f"fraction shared with another {pair_axis_name(cells, plural=False)}",
        [],
    )


def coverage_figure(cells: Sequence[Cell]) -> Figure:
    """Draw the mean substitution quality of the best matches, against their number.

    The figure leaves out cells without measures on activations.

    Raises:
        ValueError: no cell has measures on activations.
    """
    cells = cells_with_activations(cells)
    if not cells:
        raise ValueError("no cell has measures on activations to draw")

    def curve(cell: CellResult) -> Curve:
        quality = quality_by_rank(cell)
        at = np.arange(1, len(quality) + 1) / cell.num_latents
        nothing = np.full(len(quality), np.nan)
        return Curve(at, quality, nothing, nothing, dense=True)

    def panel(axes: Axes, wide: bool) -> None:
        axes.set_xlim(-0.02, 1.02)

    def area(cell: CellResult) -> str:
        return f": {with_interval(cell.estimates['substitution_area'])}"

    count = range_text(int(cell.pairs[TOKENS].to_numpy().max()) for _, cell in cells)
    return _figure(
        cells,
        curve,
        panel,
        "fraction of latents taken, highest cosines first",
        "mean R: damage that their matches repair",
        [Patch(alpha=0, label=f"{count_text(cells)}, {count} tokens")],
        _LegendText(area, f"area [{cells[0][1].settings.confidence:.0%} interval]"),
    )


def cells_with_activations(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that were measured on activations."""
    return [(k, c) for k, c in cells if TOKENS in c.pairs and c.pairs[TOKENS].to_numpy().max() > 0]


def quality_by_rank(cell: CellResult) -> Float[np.ndarray, " ranks"]:
    """Return the mean R (0 … 1) of the r matches with the highest cosines, for r = 1 …, averaged
    over the ordered pairs of runs and cut to the shortest curve."""
    runs = cell.runs["run"].tolist()
    rows = {run: cell.latents.filter(pc.field("run") == run) for run in runs}
    curves = []
    for own in rows.values():
        values = {n: lists(own, n) for n in ("partner_decoder", "substitution", "match_cosine")}
        for i, other in enumerate(own["others"][0].as_py()):
            partner: Int[np.ndarray, " F"] = values["partner_decoder"][:, i]
            live = own["live"].to_numpy() & rows[other]["live"].to_numpy()[partner]
            both = live & (partner >= 0)
            quality = clip_quality(values["substitution"][both, i].astype(np.float64))
            curves.append(quality_by_coverage(quality, values["match_cosine"][both, i]))
    shortest = min(map(len, curves))
    return np.mean([curve[:shortest] for curve in curves], axis=0)


def _figure(
    cells: Sequence[Cell],
    curve_of: Callable[[CellResult], Curve],
    panel: Callable[[Axes, bool], None],
    below: str,
    beside: str,
    handles: Sequence[Artist],
    more: _LegendText | None = None,
) -> Figure:
    """Draw panels of lines with intervals, and one legend.

    Args:
        panel: draws the rest of a panel, and its ticks; its second argument says whether the panel
            is wide.
        below, beside: labels of the x and y axis.
        handles: legend handles for what ``panel`` draws.
        more: text that the legend of a single panel adds to the name of a cell.
    """
    groups = _panels(cells)
    columns = 2 if len(groups) == 4 else min(len(groups), 3)
    rows = ceil(len(groups) / columns)
    alone = len(groups) == 1
    width, height = (WIDTH * 0.75, 2.7) if alone else (WIDTH / columns, 2.1)
    lines: dict[str, CellResult] = {}
    for name, (_, cell) in (line for group in groups.values() for line in group):
        lines.setdefault(name, cell)
    names = list(lines)
    curves = {id(cell): curve_of(cell) for _, cell in cells}
    legend: list[Artist] = []
    for i, (name, cell) in enumerate(lines.items()):
        said = more.of(cell) if more and alone else ""
        legend.append(Line2D([], [], label=name + said, **_look(i)))
    known = any(not np.isnan(curve.low).all() for curve in curves.values())
    if known or more is None:
        legend.append(interval_handle(cells, known, GREY))
    legend += handles
    beside_each_other = 2 if max(len(str(h.get_label())) for h in legend) > 24 else 3
    under = 0.2 * ceil(len(legend) / beside_each_other) + 0.65
    figure = Figure(figsize=(width * columns, height * rows + under))
    grid = panels(figure, len(groups), columns)
    for axes, (title, group) in zip(grid, groups.items(), strict=True):
        faint_grid(axes, "y")
        for name, (_, cell) in group:
            _line(axes, curves[id(cell)], names.index(name), len(names))
        panel(axes, alone)
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(wrapped(title, round(width / 0.085)))
    name_outer(
        grid, columns, wrapped(below, round(width / 0.075)), wrapped(beside, round(height / 0.065))
    )
    title = ", ".join(label_knobs(cells) if alone else label_knobs(cells)[-1:])
    if more and alone:
        title = f"{title}: {more.title}" if title else more.title
    legend_below(figure, legend, columns=beside_each_other, title=title)
    return figure


def _panels(cells: Sequence[Cell]) -> dict[str, list[tuple[str, Cell]]]:
    """Return panel title → its lines, as (name, cell); up to `MOST_LINES` cells share one panel."""
    if len(cells) <= MOST_LINES:
        return {"": [(label(cells, knobs), (knobs, cell)) for knobs, cell in cells]}
    *first, last = label_knobs(cells)
    found: dict[str, list[tuple[str, Cell]]] = {}
    for knobs, cell in cells:
        title = ", ".join(_named(name, one_line(str(knobs.get(name)))) for name in first)
        found.setdefault(title, []).append((one_line(str(knobs.get(last))), (knobs, cell)))
    return found


def _named(name: str, value: str) -> str:
    """Return a value with the name of its knob if it is a number: ``layer 2``, but ``topk``."""
    return f"{name} {value}" if value.replace(".", "").isdigit() else value


def _look(i: int) -> dict[str, Any]:
    """Return colour, marker and, from the ninth line on, dashes: lines differ in greyscale, too."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": ("-", "-.", ":")[i // len(COLOURS) % 3],
    }


def _line(axes: Axes, curve: Curve, i: int, of: int) -> None:
    look = _look(i)
    at = curve.at + ((i - (of - 1) / 2) * 0.5 / of if curve.apart else 0)
    if curve.dense:
        some = np.unique(np.linspace(0, len(at) - 1, 9).round().astype(int)).tolist()
        axes.plot(at, curve.mean, markevery=some, **look)
    else:
        axes.plot(at, curve.mean, **look)
    if curve.apart:
        axes.vlines(at, curve.low, curve.high, color=look["color"], alpha=0.5, linewidth=1.4)
    else:
        faint, edge = (look["color"], 0.16), (look["color"], 0.45)
        axes.fill_between(at, curve.low, curve.high, facecolor=faint, edgecolor=edge, linewidth=0.6)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
