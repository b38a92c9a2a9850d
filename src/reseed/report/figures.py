"""Figures of a comparison, as png and svg, drawn without a display.

`comparison_drawings` lists them all. Three are drawn here: the shared fraction of each cell, the
cosines of matched latents, and how many seeds share a latent (p_m and u_k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reseed.compare.cell import CellResult
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.compare.sharing_profile import fit_power_law
from reseed.compare.tables import lists
from reseed.report.axis_figures import axis_figure, axis_name
from reseed.report.captions import SOURCE, UNSHARED, compares_seeds
from reseed.report.cell_labels import (
    Cell,
    count_text,
    label,
    label_knobs,
    numeric_axes,
    pair_axis_name,
    row_labels,
    threshold_text,
    wrapped,
)
from reseed.report.line_figures import (
    cells_with_activations,
    coverage_figure,
    decile_figure,
    threshold_figure,
)
from reseed.report.sharing_by_firing import firing_figure
from reseed.report.style import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    ORANGE,
    REFERENCE,
    STYLE,
    WIDTH,
    faint_grid,
    legend_below,
    name_outer,
    panels,
    scatter_of_two,
)
from reseed.report.truth import truth_figure, with_labels
from reseed.report.value_matrix import matrix_figure, value_matrices
from reseed.system.files import atomic_write

_UNDATED: Mapping[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""No dates, so that equal data give equal files."""
MAX_POINTS = 4000
"""Maximum number of points per cell in the figure of cosines."""
MOST_RINGS = 8
"""Maximum number of cells that are drawn as rings; more are drawn as bars."""
FEWEST_FOR_REFERENCE = 4
"""Minimum number of seeds to draw the paper's u_k; with fewer, the cells' own lines are too short
to compare."""


def write_figures(cells: Sequence[Cell], folder: Path | str) -> list[Path]:
    """Write ``shared_fraction``, ``seeds``, ``cosines``, ``firing``, ``threshold`` and
    ``firing_deciles``, each as png and svg.

    Also write ``shared_fraction_by_<axis>`` for each numeric axis with at least 3 values,
    ``quality_coverage`` if cells were measured on activations, ``matrix`` if pairs differ in a
    chosen value, and ``truth`` if the truth is known. Without held-out tokens the figures of firing
    are left out.

    Returns:
        The files written, each atomically.
    """
    return save_figures(comparison_drawings(cells), folder)


def comparison_drawings(cells: Sequence[Cell]) -> dict[str, Callable[[], Figure]]:
    """Return name → drawing function of the figures that `write_figures` writes; empty if no cell
    has a common space."""
    if not cells:
        raise ValueError("there are no cells to draw figures of")
    # Runs without a common space have no shared fraction.
    cells = [(knobs, cell) for knobs, cell in cells if WEIGHTS_NOTE not in cell.pairs]
    if not cells:
        return {}
    drawings: dict[str, Callable[[Sequence[Cell]], Figure]]
    drawings = {
        "shared_fraction": shared_figure,
        "seeds": sharing_profile_figure,
        "cosines": cosine_figure,
        "firing": firing_figure,
        "threshold": threshold_figure,
        "firing_deciles": decile_figure,
    }
    for axis in numeric_axes(cells):
        drawings[f"shared_fraction_by_{axis_name(axis)}"] = partial(axis_figure, axis=axis)
    if cells_with_activations(cells):
        drawings["quality_coverage"] = coverage_figure
    if value_matrices(cells):
        drawings["matrix"] = matrix_figure
    if with_labels(cells):
        drawings["truth"] = truth_figure
    if not all(cell.held_out_tokens for _, cell in cells):  # firing is unknown
        for name in ("firing", "firing_deciles"):
            del drawings[name]
    return {name: partial(draw, cells) for name, draw in drawings.items()}


def save_figures(
    drawings: Mapping[str, Callable[[], Figure]],
    folder: Path | str,
    kinds: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """Draw each figure in the common style, and write it under its name.

    Args:
        kinds: png, svg, pdf.

    Returns:
        The files written, each atomically.
    """
    written = []
    for name, draw in drawings.items():
        with mpl.rc_context(STYLE):
            figure = draw()
            for kind in kinds:
                path = Path(folder) / f"{name}.{kind}"
                atomic_write(path, partial(figure.savefig, metadata=_UNDATED.get(kind)))
                written.append(path)
    return written


def draw_figure(draw: Callable[[], Figure]) -> Figure:
    """Draw a figure in the common style."""
    with mpl.rc_context(STYLE):
        return draw()


def shared_figure(cells: Sequence[Cell]) -> Figure:
    """Draw the shared fraction of each cell: interval, single pairs, live latents, untrained."""
    names, rows = row_labels(cells)
    height = 0.42 if len(cells) <= 8 else 0.32
    figure = Figure(figsize=(WIDTH * 0.8, 1.35 + height * (rows[-1] + 1)))
    axes = figure.add_subplot()
    for row, (_, cell) in zip(rows, cells, strict=True):
        _shared_row(axes, row, cell)
    axes.set_yticks(rows, names)
    axes.set_ylim(rows[-1] + 0.55, -0.55)
    axes.set_xlim(-0.015, 1.015)
    axes.tick_params(axis="y", length=0)
    faint_grid(axes, "x")
    settings = cells[0][1].settings
    other = pair_axis_name(cells, plural=False)
    broken = "\n" if max(map(len, names)) > 20 else " "  # long names leave little width
    axes.set_xlabel(
        f"fraction of latents shared with another {other},{broken}"
        f"both cosines ≥ {threshold_text(cells)}"
    )
    axes.set_ylabel(", ".join(label_knobs(cells)))
    interval = f"mean over pairs, {settings.confidence:.0%} interval over {count_text(cells)}"
    legend_below(figure, [
        Line2D([], [], color=BLUE, marker="o", markersize=6, linewidth=2, label=interval),
        Line2D([], [], color=GREY, marker="|", linestyle="", markersize=6, label="single pairs"),
        Line2D([], [], color=BLUE, marker="D", markerfacecolor="white", linestyle="",
               label="live latents only"),
        Line2D([], [], color=ORANGE, marker="x", linestyle="", markersize=5, markeredgewidth=1.4,
               label="untrained weights"),
    ], columns=2)  # fmt: skip
    return figure


def _shared_row(axes: Axes, row: float, cell: CellResult) -> None:
    """Draw one cell: mean with interval, live latents, single pairs, untrained weights."""
    estimate = cell.estimates["shared_fraction"]
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [row, row], color=BLUE, linewidth=2)
    else:
        left = estimate.mean <= 0.75  # beside the mark, within the axes
        at = (estimate.mean + (0.02 if left else -0.02), row - 0.2)
        side = "left" if left else "right"
        axes.text(*at, f"n = {estimate.n}, no interval", color=GREY, fontsize=6.5, ha=side)
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


def cosine_figure(cells: Sequence[Cell]) -> Figure:
    """Draw encoder against decoder cosine of the matched latents, marked by index agreement."""
    columns = min(len(cells), 4 if len(cells) > 6 else 3)
    rows = ceil(len(cells) / columns)
    side = min(2.9, WIDTH / columns)
    size = (max(4.2, columns * side), rows * side + 0.75)
    figure = Figure(figsize=size, layout="compressed")
    grid = panels(figure, len(cells), columns)
    for axes, (knobs, cell) in zip(grid, cells, strict=True):
        _cosines(axes, cell)
        axes.set_title(wrapped(label(cells, knobs), round(13 * side)))
    name_outer(grid, columns, "cosine by encoder", "cosine by decoder")
    legend_below(figure, [
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="same match by both"),
        Line2D([], [], color=ORANGE, marker="+", linestyle="", label="different matches"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.7,
               label=f"threshold {threshold_text(cells)}, for shared"),
        Line2D([], [], color="black", marker="x", linestyle="", label="random rows, matched"),
    ], columns=2)  # fmt: skip
    return figure


def _cosines(axes: Axes, cell: CellResult) -> None:
    encoder, decoder, agrees = matched_cosines(cell)
    scatter_of_two(axes, encoder, decoder, agrees)
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
    """Return encoder cosine, decoder cosine and index agreement of latents that have both matches.

    All runs are compared with all other runs; of more than ``at_most`` latents, a uniform sample
    is returned.
    """

    def flat(name: str) -> np.ndarray:
        return lists(cell.latents, name).ravel()

    by_encoder, by_decoder = flat("partner_encoder"), flat("partner_decoder")
    kept = np.flatnonzero((by_encoder >= 0) & (by_decoder >= 0))
    if len(kept) > at_most:
        kept = np.random.default_rng(0).choice(kept, at_most, replace=False)
    agrees = (by_encoder == by_decoder)[kept]
    return flat("cosine_encoder")[kept], flat("cosine_decoder")[kept], agrees


def sharing_profile_figure(cells: Sequence[Cell]) -> Figure:
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
    _shades_below(left, cells, most, columns=min(most, 5))
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
    axes.text(0, 0, f"{cell.p[0]:.0%}\nunshared", ha="center", va="center", fontsize=7.5)
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
    axes.text(1.02, -1, "unshared", va="center", fontsize=7)
    axes.set_yticks(rows, names)
    axes.set_ylim(rows[-1] + 0.6, -1.5)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("fraction of latents")
    _shades_below(figure, cells, most, columns=min(most, 10))
    return figure


def _shades_below(figure: FigureBase, cells: Sequence[Cell], most: int, columns: int) -> None:
    """Draw the legend of the shades; each shade is a number of others that share a latent."""
    handles = [Patch(facecolor=_shade(m, most), label=str(m)) for m in range(most)]
    title = f"number of others that share a latent; {count_text(cells)}"
    legend_below(figure, handles, columns, title=title, handlelength=1, columnspacing=1)


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
    if most >= FEWEST_FOR_REFERENCE and compares_seeds(cells):
        known = {k: u for k, u in UNSHARED.items() if k <= most}
        axes.plot(list(known), list(known.values()), label=SOURCE, **REFERENCE)
    axes.set_xticks(range(2, most + 1))
    axes.set_xlim(1.7, most + 0.3)
    axes.set_ylim(-0.02, 1.02)
    faint_grid(axes, "y")
    axes.set_xlabel(f"number k of {pair_axis_name(cells)}, of {count_text(cells)}")
    axes.set_ylabel(f"fraction in only one of k {pair_axis_name(cells)}")
    if any(fit_power_law(cell.u) for _, cell in cells):
        axes.set_title("lines: a·k$^{-b}$ + c fitted, limit c", parse_math=True)
