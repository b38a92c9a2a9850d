"""The figures of a comparison, as png and svg, drawn without a display.

Colours are those of Okabe & Ito, which colour-blind readers tell apart; a marker or a shade says
the same as each colour, so that the figures can be read in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reseed.atomic import atomic_write
from reseed.compare.cell import CellResult
from reseed.compare.stability import fit_power_law
from reseed.report.wording import Cell, label, paired, varying

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
    "svg.fonttype": "path",
    "svg.hashsalt": "reseed",
}
WIDTH = 6.8
"""Inches: a page's text width."""
MAX_POINTS = 4000
"""Points drawn of one cell in the figure of cosines."""


def write_figures(cells: Sequence[Cell], folder: Path | str) -> list[Path]:
    """Write ``shared_fraction``, ``seeds`` and ``cosines``, each as png and svg.

    Returns:
        The files written; each is whole or not there.
    """
    if not cells:
        raise ValueError("there are no cells to draw figures of")
    drawings = {"shared_fraction": shared_figure, "seeds": seeds_figure, "cosines": cosine_figure}
    written = []
    for name, draw in drawings.items():
        with mpl.rc_context(STYLE):
            figure = draw(cells)
            for kind, metadata in (("png", {}), ("svg", {"Date": None})):
                path = Path(folder) / f"{name}.{kind}"
                atomic_write(path, partial(figure.savefig, metadata=metadata))
                written.append(path)
    return written


def shared_figure(cells: Sequence[Cell]) -> Figure:
    """Shared fraction of each cell with its interval, its single pairs, live and untrained."""
    figure = Figure(figsize=(WIDTH * 0.8, 1.35 + 0.42 * len(cells)))
    axes = figure.add_subplot()
    for row, (_, cell) in enumerate(cells):
        estimate = cell.estimates["shared_fraction"]
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [row, row], color=BLUE, linewidth=2)
        else:
            at = (estimate.mean, row - 0.2)
            axes.text(*at, f"n = {estimate.n}, no interval", color=GREY, fontsize=6.5, ha="left")
        axes.plot(estimate.mean, row, "o", color=BLUE, markersize=6)
        axes.plot(
            cell.estimates["shared_fraction_live"].mean,
            row,
            "D",
            markerfacecolor="white",
            markeredgecolor=BLUE,
            markersize=4.5,
        )
        pairs = cell.pairs["shared_fraction"]
        axes.plot(pairs, np.full(len(pairs), row + 0.26), "|", color=GREY, markersize=6)
        start = cell.pair_mean("untrained_shared_fraction")
        axes.plot(start, row, "x", color=ORANGE, markersize=5, markeredgewidth=1.4)
    axes.set_yticks(range(len(cells)), [label(cells, knobs) for knobs, _ in cells])
    axes.set_ylim(len(cells) - 0.45, -0.55)
    axes.set_xlim(-0.015, 1.015)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    knobs, settings = varying(cells), cells[0][1].settings
    other = paired(cells, plural=False)
    axes.set_xlabel(
        f"fraction of latents shared with another {other}, both cosines ≥ {_tau(cells)}"
    )
    axes.set_ylabel(", ".join(knobs))
    interval = f"mean over pairs, {settings.confidence:.0%} interval over {_seeds(cells)}"
    _legend_below(figure, [
        Line2D([], [], color=BLUE, marker="o", markersize=6, linewidth=2, label=interval),
        Line2D([], [], color=GREY, marker="|", linestyle="", markersize=6, label="single pairs"),
        Line2D([], [], color=BLUE, marker="D", markerfacecolor="white", linestyle="",
               label="live latents only"),
        Line2D([], [], color=ORANGE, marker="x", linestyle="", markersize=5, markeredgewidth=1.4,
               label="untrained weights"),
    ], columns=2)  # fmt: skip
    return figure


def seeds_figure(cells: Sequence[Cell]) -> Figure:
    """The rings of p_m, one per cell, beside the lines of u_k."""
    columns = 1 if len(cells) == 1 else 2 if len(cells) <= 6 else 3
    rows = ceil(len(cells) / columns)
    figure = Figure(figsize=(WIDTH, max(2.5, 1.25 * rows + 0.6)))
    halves: Any = figure.subfigures(1, 2, width_ratios=[1.0, 1.25])
    left, right = halves
    grid = left.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(cells) :]:
        axes.set_visible(False)
    most = max(cell.n_seeds for _, cell in cells)
    for axes, (knobs, cell) in zip(grid, cells, strict=False):
        _ring(axes, cell, label(cells, knobs), most)
    left.legend(
        handles=[Patch(facecolor=_shade(m, most), label=str(m)) for m in range(most)],
        loc="outside lower center",
        ncols=min(most, 5),
        title=f"shared with so many others of {_seeds(cells)}",
        handlelength=1,
        columnspacing=1,
    )
    axes = right.subplots()
    _unshared_lines(axes, cells)
    if len(cells) <= 4:
        axes.legend(loc="best", title=", ".join(varying(cells)))
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


def _shade(m: int, n: int) -> tuple[float, float, float, float]:
    """From light for latents of one seed to dark for those of all."""
    return mpl.colormaps["Blues"](0.16 + 0.8 * m / max(1, n - 1))


def _unshared_lines(axes: Axes, cells: Sequence[Cell]) -> None:
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
    most = max(cell.n_seeds for _, cell in cells)
    axes.set_xticks(range(2, most + 1))
    axes.set_xlim(1.7, most + 0.3)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"number k of {paired(cells)}, of {_seeds(cells)}")
    axes.set_ylabel(f"fraction in one of k {paired(cells)} only")
    if any(fit_power_law(cell.u) for _, cell in cells):
        axes.set_title("lines: a·k$^{-b}$ + c fitted, limit c")


def cosine_figure(cells: Sequence[Cell]) -> Figure:
    """Encoder against decoder cosine of the matched latents, by index agreement."""
    columns = min(len(cells), 4 if len(cells) > 6 else 3)
    rows = ceil(len(cells) / columns)
    side = min(2.9, WIDTH / columns)
    size = (max(4.2, columns * side), rows * side + 0.75)
    figure = Figure(figsize=size, layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.ravel()[len(cells) :]:
        axes.set_visible(False)
    for axes, (knobs, cell) in zip(grid.ravel(), cells, strict=False):
        _cosines(axes, cell)
        axes.set_title(label(cells, knobs))
    for i, axes in enumerate(grid.ravel()[: len(cells)]):
        if i + columns >= len(cells):  # nothing below
            axes.set_xlabel("cosine by encoder")
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel("cosine by decoder")
    _legend_below(figure, [
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="same match by both"),
        Line2D([], [], color=ORANGE, marker="+", linestyle="", label="different matches"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.7,
               label=f"threshold {_tau(cells)}, for shared"),
        Line2D([], [], color="black", marker="x", linestyle="", label="random rows, matched"),
    ], columns=2)  # fmt: skip
    return figure


def _cosines(axes: Axes, cell: CellResult) -> None:
    encoder, decoder, agrees = matched_cosines(cell)
    for which, colour, marker in ((~agrees, ORANGE, "+"), (agrees, BLUE, "o")):
        axes.scatter(
            encoder[which],
            decoder[which],
            s=9 if marker == "+" else 4,
            c=colour,
            marker=marker,
            alpha=0.5,
            linewidths=0.5 if marker == "+" else 0,
            rasterized=True,
        )
    for line in (axes.axvline, axes.axhline):
        line(cell.settings.threshold, color="black", linestyle="--", linewidth=0.7)
    null = cell.pair_mean("null_cosine")
    axes.plot(null, null, "x", color="black", markersize=5)
    low = min(0.0, float(encoder.min(initial=0)), float(decoder.min(initial=0)))
    axes.set(xlim=(low - 0.03, 1.03), ylim=(low - 0.03, 1.03), aspect="equal")
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])


def matched_cosines(
    cell: CellResult, at_most: int = MAX_POINTS
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Encoder cosine, decoder cosine and index agreement of latents that have both matches.

    All latents of all runs against all others, thinned evenly at random to ``at_most``.
    """

    def flat(name: str) -> np.ndarray:
        return cell.latents.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)

    by_encoder, by_decoder = flat("partner_encoder"), flat("partner_decoder")
    kept = np.flatnonzero((by_encoder >= 0) & (by_decoder >= 0))
    if len(kept) > at_most:
        kept = np.random.default_rng(0).choice(kept, at_most, replace=False)
    agrees = (by_encoder == by_decoder)[kept]
    return flat("cosine_encoder")[kept], flat("cosine_decoder")[kept], agrees


def _legend_below(figure: Figure, handles: list[Line2D], columns: int) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.5)


def _tau(cells: Sequence[Cell]) -> str:
    return f"{cells[0][1].settings.threshold:g}"


def _seeds(cells: Sequence[Cell]) -> str:
    counts = sorted({cell.n_seeds for _, cell in cells})
    return f"n = {counts[0]}" + (f"–{counts[-1]}" if len(counts) > 1 else "") + f" {paired(cells)}"
