"""Tables and figure "Is a shared latent true?", for runs with labels of a known truth: how many
shared latents, and how many of the others, are atoms."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reseed.compare.cell import CellResult
from reseed.compare.dictionary import TRUTH_PREFIX
from reseed.compare.registry import Interval
from reseed.compare.strata import DECILES
from reseed.compare.truth import LABEL_COLUMN
from reseed.report.cell_labels import (
    Cell,
    columns,
    knob_values,
    label,
    label_knobs,
    pair_axis_name,
    row_labels,
)
from reseed.report.format import MISSING, format_number, with_interval
from reseed.report.style import BLUE, GREY, ORANGE, WIDTH, faint_grid, interval_handle, legend_below
from reseed.report.table import Table

TITLE = "Is a shared latent true?"
_MARK = TRUTH_PREFIX + "atom_given_shared"
_WITH_INTERVAL = ("atom_given_shared", "difference", "difference_adjusted")
_WORDS = ("atom", "composite", "group", "neither")
_SIDES = (("atom_given_orphan", ORANGE, "D", 0.13), ("atom_given_shared", BLUE, "o", -0.13))
"""Estimate, colour, marker, and the offset of the interval below its row."""
_SHOWN = (*_WITH_INTERVAL, "atom_given_orphan", "likelihood_ratio")


def truth_tables(cells: Sequence[Cell]) -> list[Table]:
    """Return two tables: whether shared latents are atoms more often than others, and how well the
    SAEs recover the true features. Empty if no cell has labels.

    There are two, so that each fits a terminal of 120 columns. Cells without labels are left out.
    """
    found = with_labels(cells)
    if not found:
        return []
    names = columns(cells)
    return [_sharing(cells, found, names), _quality(found, names)]


def with_labels(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells whose runs have labels of a known truth."""
    return [(knobs, cell) for knobs, cell in cells if _MARK in cell.estimates]


def with_labels_alike(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Give all tables of latents a column ``truth`` (null where unknown) if any of them has one."""
    if not any(LABEL_COLUMN in table.column_names for table in tables):
        return list(tables)
    return [
        table
        if LABEL_COLUMN in table.column_names
        else table.append_column(LABEL_COLUMN, pa.nulls(len(table), pa.string()))
        for table in tables
    ]


def _sharing(cells: Sequence[Cell], labelled: Sequence[Cell], names: Sequence[str]) -> Table:
    settings = labelled[0][1].settings
    percent = f"[{settings.confidence:.0%}]"
    header = (
        *names,
        "shared\nlive",
        f"P(atom | shared)\n{percent}",
        "P(atom |\norphan)",
        f"difference\n{percent}",
        f"adjusted\n{percent}",
        "likelihood\nratio",
    )
    rows = tuple(
        (
            *knob_values(names, knobs),
            format_number(cell.estimates["shared_fraction_live"].mean),
            _shown(cell, "atom_given_shared"),
            _shown(cell, "atom_given_orphan"),
            _shown(cell, "difference"),
            _shown(cell, "difference_adjusted"),
            _shown(cell, "likelihood_ratio"),
        )
        for knobs, cell in labelled
    )
    one = pair_axis_name(cells, plural=False)
    footnotes = (
        "**atom**: the decoder row has |cos| ≥ 0.9 with one true feature and fires with it (F1 ≥ "
        "0.8). **composite**: no atom, but a non-negative sum of at most 3 features has cos ≥ 0.9 "
        "with the row. **group**: neither, but the row's projection onto one group's subspace has "
        "norm ≥ 0.9.",
        "**P(atom | shared)**, **P(atom | orphan)**: fraction of atoms among live latents that "
        f"another {one} shares and among the other live latents, over all ordered pairs.",
        "**difference**: P(atom | shared) − P(atom | orphan). **adjusted**: the same among latents "
        f"of equal firing ({DECILES} deciles, Mantel–Haenszel).",
        "**likelihood ratio**: P(shared | atom) / P(shared | no atom); 1 means that sharing says "
        f"nothing about truth. Intervals leave one {one} out at a time.",
        *_reasons(cells, labelled),
    )
    # A narrow window can leave out the live fraction, because the main table has it, too.
    return Table(header, rows, len(names), TITLE, footnotes, ("shared\nlive",))


def _quality(labelled: Sequence[Cell], names: Sequence[str]) -> Table:
    metrics = {
        "MCC": "mcc",
        "F1": "f1",
        "recall of\nenergetic": "recall_energetic",
        "atoms": "atoms",
        "composites": "composites",
    }
    given = {f"P(shared |\n{word})": f"shared_given_{word}" for word in _WORDS}
    header = (*names, *metrics, *given)
    rows = tuple(
        (
            *knob_values(names, knobs),
            *(_shown(cell, name) for name in (*metrics.values(), *given.values())),
        )
        for knobs, cell in labelled
    )
    footnotes = (
        "**MCC**: mean |cos| of decoder rows with the true features, matched one to one. **F1**: "
        "of the live latents, each as a detector of its nearest feature.",
        "**recall of energetic**: fraction of the F features with the most energy (mean square; F "
        "is the number of latents) that have an atom among the live latents. **atoms**, "
        "**composites**: fractions of the live latents.",
        "**P(shared | …)**: fraction of the live latents with that label that is shared.",
    )
    title = "How true are the latents, and which are shared?"
    spare = ("P(shared |\nneither)", "P(shared |\ngroup)", "composites")
    return Table(header, rows, len(names), title, footnotes, spare)


def _shown(cell: CellResult, name: str) -> str:
    found = cell.estimates.get(TRUTH_PREFIX + name)
    if found is None:
        return MISSING
    return with_interval(found) if name in _WITH_INTERVAL else format_number(found.mean)


def _reasons(cells: Sequence[Cell], labelled: Sequence[Cell]) -> list[str]:
    """Return each reason why a number or an interval is missing, once, with its cells."""
    about: dict[str, dict[str, None]] = {}
    for knobs, cell in labelled:
        for name in _SHOWN:
            found = cell.estimates[TRUTH_PREFIX + name]
            if found.reason and (name in _WITH_INTERVAL or isnan(found.mean)):
                about.setdefault(found.reason, {})[label(cells, knobs)] = None
    return [
        f"**{reason}**" + ("" if len(names) == len(cells) else f": {'; '.join(names)}")
        for reason, names in about.items()
    ]


def truth_figure(cells: Sequence[Cell]) -> Figure:
    """Draw P(atom | shared) and P(atom | orphan) of each cell, joined by a line, with their
    difference as a number.

    Cells without labels are left out. If one of the two is undefined, the row is grey and gives the
    reason.

    Raises:
        ValueError: no cell has labels.
    """
    cells = with_labels(cells)
    if not cells:
        raise ValueError("no cell has labels of a known truth to draw")
    names, rows = row_labels(cells)
    figure = Figure(figsize=(WIDTH, 1.6 + (0.3 if len(cells) <= 8 else 0.26) * (rows[-1] + 1)))
    axes = figure.add_subplot()
    for row, (_, cell) in zip(rows, cells, strict=True):
        _row(axes, row, cell.estimates)
    axes.set_yticks(rows, names)
    axes.set_ylim(rows[-1] + 0.6, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.tick_params(axis="y", length=0)
    faint_grid(axes, "x")
    one = pair_axis_name(cells, plural=False)
    percent = f"{cells[0][1].settings.confidence:.0%}"
    axes.set_xlabel("fraction of live latents that are atoms: one true feature each")
    axes.set_ylabel(", ".join(label_knobs(cells)))
    axes.set_title(TITLE, fontsize=10)
    axes.text(1.04, -0.75, f"difference [{percent}]", va="bottom", fontsize=7.5)
    sides = [cell.estimates[TRUTH_PREFIX + name] for _, cell in cells for name, *_ in _SIDES]
    known = any(found.low is not None for found in sides)
    handles = [
        _mark(BLUE, "o", f"shared with another {one}"),
        _mark(ORANGE, "D", f"not shared with another {one}"),
        interval_handle(cells, known, GREY),
    ]
    if any(_undefined(cell.estimates) for _, cell in cells):
        handles.append(_mark(GREY, "o", "only one of the two is defined"))
    legend_below(figure, handles, columns=2)
    return figure


def _row(axes: Axes, row: float, estimates: dict[str, Interval]) -> None:
    found = {name: estimates[TRUTH_PREFIX + name] for name, *_ in _SIDES}
    undefined = _undefined(estimates)
    for name, hue, marker, below in _SIDES:
        e, colour = found[name], GREY if undefined else hue
        if e.low is not None and e.high is not None:
            axes.barh(row + below, e.high - e.low, left=e.low, height=0.2, color=colour, alpha=0.3)
        axes.plot(e.mean, row, marker, color=colour, markersize=5, zorder=3)
    difference = estimates[TRUTH_PREFIX + "difference"]
    if undefined:
        axes.text(1.04, row, difference.reason, va="center_baseline", fontsize=7, color=GREY)
        return
    axes.plot([e.mean for e in found.values()], [row, row], color=GREY, linewidth=1.6, zorder=2.5)
    axes.text(1.04, row, with_interval(difference), va="center_baseline", fontsize=7.5)


def _undefined(estimates: dict[str, Interval]) -> bool:
    return any(isnan(estimates[TRUTH_PREFIX + name].mean) for name, *_ in _SIDES)


def _mark(colour: str, marker: str, text: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markersize=5, linestyle="", label=text)
