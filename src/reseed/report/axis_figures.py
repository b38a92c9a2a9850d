"""The shared fraction against a number in which cells differ: budget, width, sparsity, depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from reseed.report.axes import Cell, amounts, identities, telling
from reseed.report.style import COLOURS, GREY, MARKERS, WIDTH, counted, legend_below
from reseed.report.wording import paired

DASHES: Any = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1, 1.5)))
LOG_FROM = 8
"""A range with so large a ratio of its ends is drawn on a logarithmic scale."""
ALIKE = 0.5
"""Untrained SAEs that share so much were born alike."""
_NAMES = {"tokens": "optimiser steps", "num_latents": "latents", "sparsity": "latents active"}


def axis_name(axis: str) -> str:
    """The last word of a key, for the name of a file: ``aux_alpha`` of ``sae.aux_alpha``."""
    return axis.rpartition(".")[2]


def axis_figure(cells: Sequence[Cell], axis: str) -> Figure:
    """The strict shared fraction over ``axis``, one line for all that is equal beside it.

    The budget is drawn in optimiser steps: these and not tokens are what moves weights. Colour
    tells the architecture (or the first knob that differs), dashes and marker all others.
    """
    names = [name for name in telling(cells) if name != axis]
    who = identities(cells, axis)
    first = names.index("sae") if "sae" in names else 0
    hues = list(dict.fromkeys(w[first] for w in who if w))
    rests = list(dict.fromkeys(_without(w, first) for w in who))
    figure = Figure(figsize=(WIDTH * 0.85, 3.9))
    axes = figure.add_subplot()
    at = _places(cells, axis)
    lines = list(dict.fromkeys(who))
    for i, line in enumerate(lines):
        own = sorted(j for j, w in enumerate(who) if w == line)
        own.sort(key=lambda j: at[j])
        colour_index = hues.index(line[first]) if line else 0
        colour = COLOURS[colour_index % len(COLOURS)]
        style = rests.index(_without(line, first)) if len(rests) > 1 else colour_index
        _line(axes, [cells[j] for j in own], [at[j] for j in own], colour, style,
              shift=i - (len(lines) - 1) / 2, log=_log(at))  # fmt: skip
    _scale(axes, at, _axis_label(cells, axis))
    axes.set_ylim(-0.02, 1.02 if _highest(cells) > 0.5 else None)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    settings = cells[0][1].settings
    one = paired(cells, plural=False)
    axes.set_ylabel(f"fraction shared with another {one}, cosines ≥ {settings.threshold:g}")
    if "arm" in names and _born_alike(cells):
        axes.set_title("Stable, or just not moved?")
    legend_below(figure, _handles(cells, hues, rests), columns=2)
    return figure


def _line(
    axes: Axes,
    cells: Sequence[Cell],
    at: Sequence[float],
    colour: str,
    style: int,
    shift: float,
    log: bool,
) -> None:
    """One line with its intervals, moved a little aside so that they do not hide each other."""
    estimates = [cell.estimates["shared_fraction"] for _, cell in cells]
    x = np.array(at) * 1.02**shift if log else np.array(at) + 0.004 * shift * np.ptp(at)
    dash, marker = DASHES[style % len(DASHES)], MARKERS[style % len(MARKERS)]
    axes.plot(x, [e.mean for e in estimates], color=colour, linestyle=dash, marker=marker)
    for place, e in zip(x, estimates, strict=True):
        if e.low is not None and e.high is not None:
            axes.plot([place] * 2, [e.low, e.high], color=colour, linewidth=0.9, alpha=0.7)
    untrained = [cell.pair_mean("untrained_shared_fraction") for _, cell in cells]
    axes.plot(at, untrained, color=GREY, linestyle=(0, (1, 2)), linewidth=0.9, zorder=1)
    null = [cell.pair_mean("null_shared_fraction") for _, cell in cells]
    axes.plot(at, null, color="black", linestyle="-", linewidth=0.5, zorder=1)


def _handles(
    cells: Sequence[Cell], hues: Sequence[str], rests: Sequence[tuple[str, ...]]
) -> list[Line2D]:
    # In grey, too, lines have to be told apart: what colour alone says, marks say as well.
    alone = len(rests) == 1
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=1.2 if alone else 2.5, label=hue,
               linestyle=DASHES[i % len(DASHES)] if alone else "-",
               marker=MARKERS[i % len(MARKERS)] if alone else "")
        for i, hue in enumerate(hues)
    ]  # fmt: skip
    if not alone:
        handles += [
            Line2D([], [], color=GREY, linestyle=DASHES[i % len(DASHES)],
                   marker=MARKERS[i % len(MARKERS)], label=", ".join(rest))
            for i, rest in enumerate(rests)
        ]  # fmt: skip
    confidence = cells[0][1].settings.confidence
    interval = f"{confidence:.0%} interval over {counted(cells)}"
    return [
        *handles,
        Line2D([], [], color=GREY, marker="|", markersize=9, linestyle="", label=interval),
        Line2D([], [], color=GREY, linestyle=(0, (1, 2)), linewidth=0.9, label="untrained"),
        Line2D([], [], color="black", linewidth=0.5, label="null: random rows"),
    ]


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


def _log(at: Sequence[float]) -> bool:
    return min(at) > 0 and max(at) / min(at) > LOG_FROM


def _scale(axes: Axes, at: Sequence[float], text: str) -> None:
    """A tick at every value, as long as they are few; else matplotlib's."""
    values = sorted(set(at))
    if _log(at):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(values) <= 9:
        axes.set_xticks(values, [f"{v:,g}" if v < 1e6 else f"{v:,.0f}" for v in values])
    axes.set_xlabel(text)


def _highest(cells: Sequence[Cell]) -> float:
    found = (cell.estimates["shared_fraction"] for _, cell in cells)
    return max(e.mean if e.high is None else e.high for e in found)


def _born_alike(cells: Sequence[Cell]) -> bool:
    """Whether some cells started alike and others did not."""
    start = [cell.pair_mean("untrained_shared_fraction") > ALIKE for _, cell in cells]
    return any(start) and not all(start)


def _without(identity: tuple[str, ...], index: int) -> tuple[str, ...]:
    return identity[:index] + identity[index + 1 :]
