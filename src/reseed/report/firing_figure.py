"""Figure of the firing of latents against the cosine with their matches."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from reseed.compare.cell import CellResult
from reseed.report.axes import Cell, label, wrapped
from reseed.report.latents import MatchedLatents, matched
from reseed.report.style import BLUE, ORANGE, WIDTH, legend_below, panels, scatter_of_two
from reseed.report.wording import counted

MAX_POINTS = 3000
"""Most points drawn per cell; its histograms count all."""
_BINS = 40


def firing_figure(cells: Sequence[Cell]) -> Figure:
    """Draw firing per ten million tokens against the matched decoder cosine, with both histograms.

    Latents that never fired are drawn separately at the left end.
    """
    columns = min(len(cells), 3)
    rows = ceil(len(cells) / columns)
    side = min(3.1, WIDTH / columns)
    figure = Figure(figsize=(max(4.2, columns * side), rows * side + 0.7))
    engine: Any = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.08)  # the layout does not count all histograms
    grid = panels(figure, len(cells), columns)
    found = [matched(cell) for _, cell in cells]
    most = max(float(m.rate.max(initial=1.0)) for m in found)
    least = min((float(m.rate[m.rate > 0].min(initial=most)) for m in found), default=1.0)
    low = min(min(0.0, float(m.cosine.min(initial=0.0))) for m in found)
    never = least / 4
    for i, (axes, (knobs, cell), own) in enumerate(zip(grid, cells, found, strict=True)):
        axes.set_xscale("log")
        axes.set(xlim=(never / 1.8, most * 1.6), ylim=(low - 0.04, 1.04))
        _points(axes, own, never)
        _ticks(axes, never, least, most)
        title = wrapped(label(cells, knobs), round(11 * side))
        _margins(axes, own, never, most, low, title)
        axes.axhline(cell.settings.threshold, color="black", linestyle="--", linewidth=0.7)
        if i + columns >= len(cells):  # nothing below
            axes.set_xlabel("firing in 10M tokens" if columns > 2 else _below(cell))
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel("cosine by decoder")
    threshold = f"{cells[0][1].settings.threshold:g}"
    whose = f"all pairs of {counted(cells)}; histograms scaled by kind"
    legend_below(figure, [
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="shared with that run"),
        Line2D([], [], color=ORANGE, marker="+", linestyle="", label="orphan there"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.7,
               label=f"threshold {threshold}, also for the encoder"),
        Line2D([], [], linestyle="", label=whose),
    ], columns=2)  # fmt: skip
    return figure


def _below(cell: CellResult) -> str:
    return f"firing in 10M tokens (of {cell.held_out_tokens:,} held out)"


def _points(axes: Axes, own: MatchedLatents, never: float) -> None:
    kept = np.arange(len(own.rate))
    if len(kept) > MAX_POINTS:
        kept = np.random.default_rng(0).choice(kept, MAX_POINTS, replace=False)
    rate, cosine, shared = (values[kept] for values in (own.rate, own.cosine, own.shared))
    # Counts are integers and would line up in columns: jittered within a tenth of a decade.
    moved = 10 ** np.random.default_rng(1).uniform(-0.05, 0.05, len(rate))
    at = np.where(rate > 0, rate, never) * moved
    scatter_of_two(axes, at, cosine, shared)


def _ticks(axes: Axes, never: float, least: float, most: float) -> None:
    """Set ticks at 0 and at the powers of ten that are more than half a decade away from it."""
    powers = 10.0 ** np.arange(np.ceil(np.log10(least * 0.9)), np.log10(most) + 0.01)
    powers = powers[powers > never * 3]
    if len(powers) > 4:
        powers = powers[len(powers) % 2 :: 2] if len(powers) % 2 else powers[1::2]
    axes.xaxis.set_major_locator(FixedLocator([never, *powers]))
    names = [f"10$^{{{round(float(np.log10(p)))}}}$" for p in powers]
    axes.set_xticks([never, *powers], ["0", *names])
    axes.xaxis.set_minor_locator(NullLocator())


def _margins(
    axes: Axes, own: MatchedLatents, never: float, most: float, low: float, title: str
) -> None:
    """Draw histograms above and at the right, scaled to equal height: orphans filled, shared
    latents as a line."""
    above = axes.inset_axes((0, 1.02, 1, 0.16), sharex=axes)
    right = axes.inset_axes((1.02, 0, 0.16, 1), sharey=axes)
    at = np.where(own.rate > 0, own.rate, never)
    bins = (np.geomspace(never / 1.3, most * 1.3, _BINS), np.linspace(low, 1, _BINS))
    for flag, colour in ((False, ORANGE), (True, BLUE)):
        which = own.shared == flag
        for small, values, edges, sideways in (
            (above, at, bins[0], False),
            (right, own.cosine, bins[1], True),
        ):
            counts = np.histogram(values[which], edges)[0]
            small.stairs(
                counts / max(int(counts.max(initial=0)), 1),
                edges,
                orientation="horizontal" if sideways else "vertical",
                color=colour,
                fill=not flag,
                alpha=1.0 if flag else 0.45,
                linewidth=1.0,
            )
    for small in (above, right):
        small.axis("off")
    above.set_title(title)
