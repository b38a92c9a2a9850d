"""Figures of evaluations: faithfulness, firing density, letter probes and absorption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reseed.compare.cell import CellResult
from reseed.report.cell_labels import (
    Cell,
    distinguishing_knobs,
    knob_values,
    label,
    numeric_axes,
    other_knob_values,
    wrapped,
)
from reseed.report.evaluation_results import LETTERS, EvaluatedRun, Runs
from reseed.report.format import one_line
from reseed.report.style import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    ORANGE,
    WIDTH,
    faint_grid,
    legend_below,
    name_outer,
    panels,
)

DENSITY = "reconstruction_density"
_DENSITY_BINS = np.linspace(-7, 0, 29)
LINES = ("-", "--", ":", "-.")
_FEW_LETTERS = 40
"""Maximum number of classes that are drawn; bars of more would be too narrow to read."""


def evaluation_drawings(cells: Sequence[Cell], runs: Runs) -> dict[str, Callable[[], Figure]]:
    """Return name → drawing function of the figures of the evaluations that cells have."""
    drawings: dict[str, Callable[[], Figure]] = {}

    def draw(name: str, evaluation: str, figure: Callable[[Sequence[Cell]], Figure]) -> None:
        own = [(knobs, cell) for knobs, cell in cells if evaluation in cell.evaluated]
        if own:
            drawings[name] = partial(figure, own)

    draw("density", "reconstruction", density_figure)
    draw("faithfulness", "faithfulness", faithfulness_figure)
    draw("probe_f1", "splitting", partial(probe_figure, runs=runs))
    draw("absorption", "absorption", absorption_figure)
    draw("absorption_letters", "absorption", partial(letters_figure, runs=runs))
    draw("absorbers", "absorption", partial(absorbers_figure, runs=runs))
    return drawings


def density_figure(cells: Sequence[Cell]) -> Figure:
    """Draw a histogram of the firing density of latents for each cell, over all of its runs."""
    figure = Figure(figsize=(WIDTH * 0.8, 3.0 + 0.1 * len(cells)))
    axes = figure.add_subplot()
    least = 0.0
    for i, (knobs, cell) in enumerate(cells):
        density = cell.latents[DENSITY].to_numpy(zero_copy_only=False).astype(np.float64)
        fires = np.log10(density[density > 0]).clip(_DENSITY_BINS[0], 0)
        least = min(least, float(fires.min(initial=0)))
        counts, _ = np.histogram(fires, _DENSITY_BINS)
        look: Any = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
        never = float((density == 0).mean())
        name = f"{label(cells, knobs)} ({never:.1%} never fire)"
        axes.stairs(counts / len(density), _DENSITY_BINS, label=name, linewidth=1.4, **look)
    axes.axvline(-1, color=GREY, linestyle="--", linewidth=0.8)
    axes.text(-0.97, 0.98, "dense", color=GREY, va="top", transform=axes.get_xaxis_transform())
    powers = range(int(np.floor(least)), 1)
    names = [f"10$^{{{p}}}$" if p else "1" for p in powers]
    axes.set_xticks(list(powers), names, parse_math=True)
    axes.set_xlim(np.floor(least * 4) / 4, 0)
    axes.set_ylim(bottom=0)
    faint_grid(axes, "y")
    axes.set_xlabel("fraction of the held-out tokens on which a latent fires")
    axes.set_ylabel("fraction of latents")
    legend_below(figure, axes.get_legend_handles_labels()[0], columns=2)
    return figure


def faithfulness_figure(cells: Sequence[Cell]) -> Figure:
    """Draw the increase of the loss, and the KL recovered, against L0: a point for each run."""
    figure = Figure(figsize=(WIDTH, 2.9 + 0.1 * len(cells)))
    grid = panels(figure, 2, 2, shared=False)
    shown = (
        ("faithfulness_ce_increase", "increase of cross-entropy (nats)"),
        ("faithfulness_kl_recovered_mean", "fraction of mean-ablation KL recovered"),
    )
    for axes, (name, text) in zip(grid, shown, strict=True):
        _points(axes, cells, "l0", name)
        axes.set_xlabel("L0")
        axes.set_ylabel(text)
        faint_grid(axes, "y")
    grid[0].set_ylim(bottom=0)
    low, high = grid[1].get_ylim()
    grid[1].set_ylim(low, max(1.0, high))
    legend_below(figure, _cell_handles(cells), columns=3)
    return figure


def absorption_figure(cells: Sequence[Cell]) -> Figure:
    """Draw the absorbed fraction against L0, and against width if it differs: a point for each run,
    one for the same run with permuted letters, and one for the untrained SAE."""
    widths = sorted({cell.num_latents for _, cell in cells})
    against = [("l0", "L0")] + ([("num_latents", "latents")] if len(widths) > 1 else [])
    figure = Figure(figsize=(WIDTH * (1 if len(against) > 1 else 0.7), 3.1 + 0.1 * len(cells)))
    grid = panels(figure, len(against), len(against), shared=False)
    for axes, (name, text) in zip(grid, against, strict=True):
        _points(axes, cells, name, "absorption_fraction")
        for other, look in (
            ("absorption_fraction_null", {"marker": "_", "color": GREY}),
            ("absorption_fraction_untrained", {"marker": "x", "color": ORANGE}),
        ):
            _points(axes, cells, name, other, **look)
        if name == "num_latents":
            axes.set_xscale("log", base=2)
            axes.set_xticks(widths, [f"{w:,}" for w in widths])
        axes.set_xlabel(text)
        axes.set_ylim(bottom=0)
        faint_grid(axes, "y")
    grid[0].set_ylabel("absorbed fraction, mean over letters")
    handles = [
        *_cell_handles(cells),
        Line2D([], [], color=GREY, marker="_", linestyle="", label="letters permuted"),
        Line2D([], [], color=ORANGE, marker="x", linestyle="", label="untrained weights"),
    ]
    legend_below(figure, handles, columns=3)
    return figure


def letters_figure(cells: Sequence[Cell], runs: Runs) -> Figure:
    """Draw the absorbed fraction of each letter: a bar for the mean over runs, a dash for each run;
    a cross for a letter that cannot be evaluated."""
    figure = Figure(figsize=(WIDTH, 1.35 * len(cells) + 0.9))
    grid = panels(figure, len(cells), 1)
    for axes, (knobs, cell) in zip(grid, cells, strict=True):
        _letter_bars(axes, _tables(cell, runs, "absorption", LETTERS))
        axes.set_title(label(cells, knobs), loc="left")
        faint_grid(axes, "y")
    name_outer(grid, 1, "", "absorbed")
    grid[0].set_ylim(bottom=-0.02)
    legend_below(figure, [
        Patch(facecolor=BLUE, alpha=0.55, label="mean over runs"),
        Line2D([], [], color="black", marker="_", linestyle="", label="single runs"),
        Line2D([], [], color=GREY, marker="x", linestyle="", label="not evaluable"),
    ], columns=3)  # fmt: skip
    return figure


def _letter_bars(axes: Axes, letters: pd.DataFrame) -> None:
    names = list(dict.fromkeys(letters["class"]))[:_FEW_LETTERS]
    for at, name in enumerate(names):
        values = letters.loc[letters["class"] == name, "fraction"].dropna().to_numpy(np.float64)
        if len(values):
            axes.bar(at, values.mean(), width=0.72, color=BLUE, alpha=0.55)
            axes.plot(np.full(len(values), at), values, "_", color="black", markersize=6)
        else:
            axes.plot(at, 0, "x", color=GREY, markersize=4)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)


def absorbers_figure(cells: Sequence[Cell], runs: Runs) -> Figure:
    """Draw, for every letter, the cosine of its probe with each latent of any run that stands for
    the letter or absorbs its words. The area of a dot grows with the number of absorbed words."""
    figure = Figure(figsize=(WIDTH, 1.5 * len(cells) + 0.9))
    grid = panels(figure, len(cells), 1)
    for axes, (knobs, cell) in zip(grid, cells, strict=True):
        letters = _tables(cell, runs, "absorption", LETTERS).query("reason == ''")
        names = sorted(set(letters["class"]))
        _cosines(axes, _tables(cell, runs, "absorption", "absorbers"), letters, names)
        axes.set_title(label(cells, knobs), loc="left")
        faint_grid(axes, "y")
    name_outer(grid, 1, "", "cosine with the probe")
    legend_below(figure, [
        Line2D([], [], color=ORANGE, marker="D", linestyle="", markeredgecolor="black",
               markeredgewidth=0.5, label="stands for the letter"),
        Line2D([], [], color=BLUE, marker="o", linestyle="", alpha=0.5, markersize=3,
               label="absorbs a word"),
        Line2D([], [], color=BLUE, marker="o", linestyle="", alpha=0.5, markersize=8,
               label="absorbs many words"),
    ], columns=3)  # fmt: skip
    return figure


def _cosines(
    axes: Axes, absorbers: pd.DataFrame, letters: pd.DataFrame, names: Sequence[str]
) -> None:
    random = np.random.default_rng(0)
    for at, name in enumerate(names):
        own = absorbers.loc[absorbers["class"] == name]
        beside = at + random.uniform(-0.25, 0.25, len(own))
        areas = 3.0 + 2.0 * np.array(own["words"], dtype=np.float64)
        axes.scatter(beside, own["cosine"], s=areas, c=BLUE, alpha=0.4, linewidths=0)
        main = np.array(letters.loc[letters["class"] == name, "main_cosine"], dtype=np.float64)
        axes.scatter(
            np.full(len(main), at), main, s=22, c=ORANGE, marker="D", linewidths=0.5,
            edgecolors="black", zorder=3,
        )  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)


def probe_figure(cells: Sequence[Cell], runs: Runs) -> Figure:
    """Draw, for every letter, the F1 of its latent against the F1 of its probe. Below the diagonal
    the SAE lost information that the activations have."""
    columns = min(len(cells), 3)
    rows = ceil(len(cells) / columns)
    side = min(2.9, WIDTH / columns)
    figure = Figure(figsize=(max(3.6, columns * side), rows * side + 0.25))
    grid = panels(figure, len(cells), columns)
    for axes, (knobs, cell) in zip(grid, cells, strict=True):
        letters = _tables(cell, runs, "splitting", LETTERS).query("reason == ''")
        look: Any = {"s": 12, "c": BLUE, "alpha": 0.4, "linewidths": 0.4, "edgecolors": "black"}
        axes.scatter(letters["probe_f1"], letters["f1"], **look)
        axes.axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=0.7)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axes.set_title(wrapped(label(cells, knobs), round(13 * side)))
    name_outer(grid, columns, "F1 of the probe", "F1 of the latent")
    return figure


def _tables(cell: CellResult, runs: Runs, evaluation: str, name: str) -> pd.DataFrame:
    """Concatenate a result table over the runs of a cell."""
    own = [runs[run] for run in cell.runs["run"] if evaluation in _results(runs.get(run))]
    return pd.concat([run.results[evaluation].tables[name] for run in own], ignore_index=True)


def _results(run: EvaluatedRun | None) -> tuple[str, ...]:
    return () if run is None else tuple(run.results)


def _points(axes: Axes, cells: Sequence[Cell], x: str, y: str, **look: Any) -> None:
    """Draw a point for each run of each cell, and lines through the means of cells that differ only
    in x's knob. Colour and marker show the kind of the cell (`_kinds`)."""
    kinds = _kinds(cells)
    for (_, cell), look_of in zip(cells, (_look(kinds, kind) for kind in kinds), strict=True):
        if y in cell.runs:
            own = {"linestyle": "", "alpha": 0.75} | look_of | look
            axes.plot(cell.runs[x], cell.runs[y], **own)
    for line in [] if look else _lines(cells, _AXIS_OF[x]):
        at = [c.runs[[x, y]].to_numpy(np.float64).mean(0).tolist() for c in line if y in c.runs]
        axes.plot(*zip(*sorted(at), strict=True), color=GREY, linewidth=0.7, zorder=1.5)


_AXIS_OF = {"l0": "sparsity", "num_latents": "num_latents"}
"""Column of the runs → the knob that sets it."""


def _lines(cells: Sequence[Cell], axis: str) -> list[list[CellResult]]:
    """Return groups of two or more cells that differ only in the knob ``axis``."""
    lines: dict[tuple[str, ...], list[CellResult]] = {}
    for (_, cell), others in zip(cells, other_knob_values(cells, axis), strict=True):
        lines.setdefault(others, []).append(cell)
    return [line for line in lines.values() if len(line) > 1]


def _kinds(cells: Sequence[Cell]) -> list[str]:
    """Return each cell's non-numeric knobs as text: usually its architecture."""
    numbers = numeric_axes(cells, at_least=2)
    names = [name for name in distinguishing_knobs(cells) if name not in numbers]
    return [
        ", ".join(knob_values(names, knobs)) or one_line(str(knobs.get("sae", "")))
        for knobs, _ in cells
    ]


def _look(kinds: Sequence[str], kind: str) -> dict[str, Any]:
    i = list(dict.fromkeys(kinds)).index(kind)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _cell_handles(cells: Sequence[Cell]) -> list[Line2D]:
    kinds = _kinds(cells)
    return [
        Line2D([], [], linestyle="", label=kind, **_look(kinds, kind))
        for kind in dict.fromkeys(kinds)
    ]
