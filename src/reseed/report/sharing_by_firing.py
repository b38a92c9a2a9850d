"""Shared fraction by how often latents fire: tables of ``summary.md``, ``strata.csv``, and the
figure of firing against the cosine of matched latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from reseed.compare.cell import CellResult
from reseed.compare.strata import shared_by_stratum, standardised
from reseed.compare.tables import lists
from reseed.report.cell_labels import (
    Cell,
    columns,
    count_text,
    knob_values,
    label,
    threshold_text,
    wrapped,
)
from reseed.report.format import format_number, with_interval
from reseed.report.style import BLUE, ORANGE, WIDTH, legend_below, panels, scatter_of_two
from reseed.report.table import Column, Table, cell_table, measure_columns, measure_notes

TEN_MILLION = 10_000_000
MAX_POINTS = 3000
"""Maximum number of points drawn per cell; the histograms count all latents."""
_BINS = 40


def cells_with_strata(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with strata: those whose runs have a common space, where latents can be
    shared."""
    return [(knobs, cell) for knobs, cell in cells if not cell.strata.empty]


def sharing_by_decile_table(cells: Sequence[Cell]) -> Table:
    """Return the table of the shared fraction of latents by how often they fire."""
    knobs = columns(cells)
    tables = [
        shared_by_stratum(cell.strata, "decile", cell.settings.confidence) for _, cell in cells
    ]
    names = [str(name).replace("decile ", "") for name in tables[0]["name"]]
    rows = tuple(
        (*knob_values(knobs, k), *(format_number(float(x)) for x in table["shared_fraction"]))
        for (k, _), table in zip(cells, tables, strict=True)
    )
    limit = cells[0][1].settings.live_at_least
    footnotes = (
        "Strict shared fraction of latents that **never fired** in the held-out tokens, that fired "
        f"fewer than {limit} times (**not live**), and of each decile of live latents by firing, "
        "**1** (rarest) to **10**; the partner's firing does not matter. strata.csv has intervals, "
        "and bins of density that are the same for all cells.",
    )
    return Table((*knobs, *names), rows, len(knobs), "", footnotes)


def sharing_at_equal_firing_table(cells: Sequence[Cell]) -> Table:
    """Return the table of other shared fractions: at equal firing, with weighted latents, and of
    kinds of latents (dense, duplicate, antipodal)."""
    made: dict[str, Column] = {}
    footnotes = []
    if len(cells) > 1:
        confidence = cells[0][1].settings.confidence
        alike = standardised([cell.strata for _, cell in cells], confidence)
        texts = {id(c): with_interval(s.estimate) for (_, c), s in zip(cells, alike, strict=True)}
        made["at equal firing"] = lambda cell: texts[id(cell)]
        footnotes.append(
            "**at equal firing**: shared fraction of each cell if its latents fired like those of "
            "all cells together (direct standardisation over bins of density, without latents that "
            f"never fired; {alike[0].coverage:.0%} of that distribution lies in bins that all "
            "cells have)."
        )
    made |= measure_columns("firing")
    return cell_table(cells, made, *footnotes, *measure_notes("firing"))


def strata_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return ``strata.csv``: a row per stratum of each cell, its knobs first; see
    `compare.strata`."""
    frames = []
    for knobs, cell in cells_with_strata(cells):
        for kind in ("decile", "density"):
            frame = shared_by_stratum(cell.strata, kind, cell.settings.confidence)
            frame.insert(0, "kind", kind)
            for i, (name, value) in enumerate(knobs.items()):
                if name not in frame:
                    frame.insert(i, name, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


@dataclass(frozen=True, eq=False)
class MatchedLatents:
    """Pairs of a latent and another run in which the decoder matching gives the latent a match.

    Attributes:
        rate: firings in ten million tokens (Paulo & Belrose's unit); 0 for never.
        cosine: cosine of the latent's decoder row with that of its match.
        shared: whether the run shares the latent by the strict rule.
    """

    rate: Float[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]
    shared: Bool[np.ndarray, " n"]


def matched_latents(cell: CellResult) -> MatchedLatents:
    """Return the points of the figure of firing against cosine."""
    table = cell.latents
    partner, cosine, shared = (
        lists(table, name) for name in ("partner_decoder", "cosine_decoder", "shared")
    )
    tokens = cell.runs.set_index("run")["held_out_tokens"]
    seen = tokens.loc[table["run"].to_pylist()].to_numpy(dtype=np.float64)
    rate = table["firing"].to_numpy() / np.maximum(seen, 1) * TEN_MILLION
    kept = partner >= 0
    every = np.broadcast_to(rate[:, None], partner.shape)
    return MatchedLatents(every[kept], cosine[kept].astype(np.float64), shared[kept].astype(bool))


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
    found = [matched_latents(cell) for _, cell in cells]
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
        if i + columns >= len(cells):  # no panel is below
            axes.set_xlabel("firing in 10M tokens" if columns > 2 else _below(cell))
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel("cosine by decoder")
    sample = f"all pairs of {count_text(cells)}; histograms scaled to equal height"
    legend_below(figure, [
        Line2D([], [], color=BLUE, marker="o", linestyle="", label="shared with that run"),
        Line2D([], [], color=ORANGE, marker="+", linestyle="", label="not shared with that run"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.7,
               label=f"threshold {threshold_text(cells)}, also for the encoder"),
        Line2D([], [], linestyle="", label=sample),
    ], columns=2)  # fmt: skip
    return figure


def _below(cell: CellResult) -> str:
    return f"firing in 10M tokens (of {cell.held_out_tokens:,} held out)"


def _points(axes: Axes, own: MatchedLatents, never: float) -> None:
    kept = np.arange(len(own.rate))
    if len(kept) > MAX_POINTS:
        kept = np.random.default_rng(0).choice(kept, MAX_POINTS, replace=False)
    rate, cosine, shared = (values[kept] for values in (own.rate, own.cosine, own.shared))
    # Counts are integers: without a jitter, of a tenth of a decade, points would form columns.
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
    axes.set_xticks([never, *powers], ["0", *names], parse_math=True)
    axes.xaxis.set_minor_locator(NullLocator())


def _margins(
    axes: Axes, own: MatchedLatents, never: float, most: float, low: float, title: str
) -> None:
    """Draw histograms above and at the right, each scaled to the same height: filled for orphans,
    a line for shared latents."""
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
