"""Figures of a comparison, as png and svg, drawn without a display."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reseed.compare.cell import CellResult
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.compare.tables import lists
from reseed.report.axes import Cell, label, label_knobs, numeric_axes, row_labels, wrapped
from reseed.report.axis_figures import axis_figure, axis_name, seeds_figure
from reseed.report.curves import coverage_figure, decile_figure, threshold_figure, with_activations
from reseed.report.evaluation_results import Runs
from reseed.report.firing import firing_figure
from reseed.report.matrix import matrix_figure, value_matrices
from reseed.report.style import (
    BLUE,
    GREY,
    ORANGE,
    STYLE,
    WIDTH,
    faint_grid,
    legend_below,
    name_outer,
    panels,
    scatter_of_two,
)
from reseed.report.table import count_text, pair_axis_name
from reseed.report.truth import truth_figure, with_labels
from reseed.system.files import atomic_write

# MERGED Tables of the numbers in figures that no other file of a sweep has.
_UNDATED: Mapping[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""No dates, so that equal data give equal files."""
MAX_POINTS = 4000
"""Most points drawn per cell in the figure of cosines."""


def write_figures(cells: Sequence[Cell], folder: Path | str) -> list[Path]:
    """Write ``shared_fraction``, ``seeds``, ``cosines``, ``firing``, ``threshold`` and
    ``firing_deciles``, each as png and svg.

    Also write ``shared_fraction_by_<axis>`` for each numeric axis with at least 3 values,
    ``quality_coverage`` if cells were measured on activations, ``matrix`` if chosen values pair up,
    and ``truth`` if the truth is known. Without held-out tokens the figures of firing are left out.

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
        "seeds": seeds_figure,
        "cosines": cosine_figure,
        "firing": firing_figure,
        "threshold": threshold_figure,
        "firing_deciles": decile_figure,
    }
    for axis in numeric_axes(cells):
        drawings[f"shared_fraction_by_{axis_name(axis)}"] = partial(axis_figure, axis=axis)
    if with_activations(cells):
        drawings["quality_coverage"] = coverage_figure
    if value_matrices(cells):
        drawings["matrix"] = matrix_figure
    if with_labels(cells):
        drawings["truth"] = truth_figure
    if not all(cell.held_out_tokens for _, cell in cells):  # weights alone: nothing fires
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
        f"fraction of latents shared with another {other},{broken}both cosines ≥ {_tau(cells)}"
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
               label=f"threshold {_tau(cells)}, for shared"),
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

    Latents of all runs against all other runs, sampled uniformly down to ``at_most``.
    """

    def flat(name: str) -> np.ndarray:
        return lists(cell.latents, name).ravel()

    by_encoder, by_decoder = flat("partner_encoder"), flat("partner_decoder")
    kept = np.flatnonzero((by_encoder >= 0) & (by_decoder >= 0))
    if len(kept) > at_most:
        kept = np.random.default_rng(0).choice(kept, at_most, replace=False)
    agrees = (by_encoder == by_decoder)[kept]
    return flat("cosine_encoder")[kept], flat("cosine_decoder")[kept], agrees


def _tau(cells: Sequence[Cell]) -> str:
    return f"{cells[0][1].settings.threshold:g}"


def figure_tables(cells: Sequence[Cell], runs: Runs) -> dict[str, Callable[[], pd.DataFrame]]:
    """Return file name → function that makes the table."""
    made: dict[str, Callable[[], pd.DataFrame]] = {
        "seeds.csv": lambda: seeds_frame(cells),
        "cosines.csv": lambda: cosines_frame(cells),
    }
    if any("absorption" in run.results for run in runs.values()):
        made["absorbers.csv"] = lambda: absorbers_frame(runs)
    return made


def seeds_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return p_m and u_k of each cell: ``measure`` (p or u), ``count`` (m or k), ``fraction``."""
    rows = [
        {**knobs, "measure": name, "count": count, "fraction": value}
        for knobs, cell in cells
        for name, first, values in (("p", 0, cell.p), ("u", 2, cell.u))
        for count, value in enumerate(values.tolist(), first)
    ]
    return pd.DataFrame(rows)


def cosines_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return the drawn points: both cosines of a matched latent, and whether encoder and decoder
    give it the same match."""
    return _stacked(
        (knobs, dict(zip(("cosine_encoder", "cosine_decoder", "same_match"),
                         matched_cosines(cell), strict=True)))
        for knobs, cell in cells
    )  # fmt: skip


def absorbers_frame(runs: Runs) -> pd.DataFrame:
    """Return the latents that absorb words of each letter, of all runs."""
    return _stacked(
        (run.about, run.results["absorption"].tables["absorbers"])
        for run in runs.values()
        if "absorption" in run.results
    )


def _stacked(parts: Iterable[tuple[Mapping[str, Any], Any]]) -> pd.DataFrame:
    """Concatenate tables, each with the columns of what it is about first."""
    frames = []
    for about, values in parts:
        frame = pd.DataFrame(values)
        own = {k: v for k, v in about.items() if k not in frame}
        frames.append(
            pd.concat([pd.DataFrame([own] * len(frame), index=frame.index), frame], axis=1)
        )
    return pd.concat(frames, ignore_index=True)
