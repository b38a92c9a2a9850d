"""Tables of evaluations: one per evaluation, with a row per cell of a comparison or per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan, nan
from typing import Any

import numpy as np

from reseed.compare.cell import CellResult
from reseed.report.cell_labels import Cell, label, pair_axis_name
from reseed.report.evaluation_results import ORPHAN, OVERLAP, SHARED, Runs
from reseed.report.format import format_bounds, format_number
from reseed.report.table import (
    Column,
    Table,
    cell_table,
    column_of,
    count_column,
    estimate_columns,
    mean_column,
)
from reseed.store.results import EvaluationDeclaration, Metric, column, declaration

ORDER = ("reconstruction", "faithfulness", "splitting", "absorption", "contexts")
"""Order of the tables; those of other evaluations follow."""

Declaration = type[EvaluationDeclaration]


def evaluation_tables(cells: Sequence[Cell]) -> list[Table]:
    """Return the tables of all evaluations that cells have results of, in the order of `ORDER`."""
    made = []
    for name in _names([cell.evaluated for _, cell in cells]):
        own = [(knobs, cell) for knobs, cell in cells if name in cell.evaluated]
        columns = dict.fromkeys(c for _, cell in own for c in cell.evaluated[name])
        declared = declaration(name, columns)
        made.append(_table(own, declared))
        if any(metric.heading for metric in declared.latents):
            made.append(_sharing_table(own, declared))
    return [*made, *_overlaps(cells)]


def run_tables(runs: Runs) -> list[Table]:
    """Return the tables of evaluations for runs outside a comparison: a row per run."""
    made = []
    for name in _names([run.results for run in runs.values()]):
        own = [run for run in runs.values() if name in run.results]
        columns = dict.fromkeys(c for run in own for c in run.metrics if c.startswith(name))
        declared = declaration(name, columns)
        shown = declared.shown()
        knobs = _distinguishing_knobs([run.about for run in own])
        titles = [tuple(str(run.about.get(knob, "")) for knob in knobs) for run in own]
        numbers = [
            tuple(_with_words(run.numbers, name, metric) for name, metric in shown.items())
            for run in own
        ]
        rows = tuple((*title, *found) for title, found in zip(titles, numbers, strict=True))
        header = (*knobs, *(metric.heading for metric in shown.values()))
        remarks = _remarks(
            declared, [(" ".join(t), run.numbers) for t, run in zip(titles, own, strict=True)]
        )
        known = any(_words_bounds(run.numbers, name) for run in own for name in shown)
        words = [_OVER_WORDS.format("Intervals are")] if known else []
        notes = (*declared.notes(), *words, *remarks)
        made.append(Table(header, rows, len(knobs), declared.title, notes, _spare(declared)))
    return made


def _names(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the evaluations, those in `ORDER` first."""
    found = dict.fromkeys(name for names in each for name in names)
    return [name for name in ORDER if name in found] + [n for n in found if n not in ORDER]


def _spare(declared: Declaration) -> tuple[str, ...]:
    """Return the headings of the columns that a narrow window can leave out."""
    headings = {metric.name: metric.heading for metric in declared.shown().values()}
    return tuple(headings[name] for name in declared.spare)


_OVER_WORDS = (
    "{} over words: those of each letter are a sample of its words, and the letters are fixed."
)


def _table(cells: Sequence[Cell], declared: Declaration) -> Table:
    made: dict[str, Column] = {}
    for name, metric in declared.shown().items():
        if metric.interval:
            made[metric.heading] = _interval_column(name)
        else:
            made[metric.heading] = count_column(name) if metric.count else mean_column(name)
    means = [{name: of.mean for name, of in cell.estimates.items()} for _, cell in cells]
    names = [label(cells, knobs) for knobs, _ in cells]
    remarks = _remarks(declared, list(zip(names, means, strict=True)))
    words = [
        _OVER_WORDS.format("The interval after **/** is the mean of the runs' intervals")
        for name in declared.shown()
        if any(_words_bounds(row, name) for row in means)
    ]
    table = cell_table(cells, made, *declared.notes(), *words[:1], *remarks)
    return replace(table, caption=declared.title, spare=_spare(declared))


def _interval_column(name: str) -> Column:
    """Return a column of an estimate: its interval over runs, and the mean one over words."""
    over_runs = column_of(name)

    def column(cell: CellResult) -> str:
        words = _words_bounds({n: of.mean for n, of in cell.estimates.items()}, name)
        return f"{over_runs(cell)} / {words}" if words else over_runs(cell)

    return column


def _with_words(numbers: Mapping[str, float], name: str, metric: Metric) -> str:
    """Format a run's number with its interval over words, if it has one."""
    value = numbers.get(name, nan)
    text = f"{value:.1f}" if metric.count and not isnan(value) else format_number(value)
    return f"{text} {_words_bounds(numbers, name)}".rstrip()


def _words_bounds(numbers: Mapping[str, float], name: str) -> str:
    low, high = (numbers.get(f"{name}_words_{end}", nan) for end in ("low", "high"))
    return "" if isnan(low) or isnan(high) else format_bounds(low, high)


def _remarks(declared: Declaration, rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Return each remark once, with the rows that it is about unless it is about all."""
    about: dict[str, list[str]] = {}
    for name, values in rows:
        if remark := declared.remark(values):
            about.setdefault(remark, []).append(name)
    return [
        f"**{remark}**" + ("" if len(names) == len(rows) else f": {'; '.join(names)}")
        for remark, names in about.items()
    ]


def _sharing_table(cells: Sequence[Cell], declared: Declaration) -> Table:
    """Return the table of means over shared latents and over orphans."""
    shown = [metric for metric in declared.latents if metric.heading]
    made: dict[str, Column] = {}
    for metric in shown:
        head, name = metric.heading, column(declared.name, metric.name)
        made |= estimate_columns(
            {f"{head},\nshared": name + SHARED, f"{head},\norphan": name + ORPHAN}
        )
    one = pair_axis_name(cells, plural=False)
    table = cell_table(
        cells,
        made,
        f"{' '.join(metric.note for metric in shown)} Among live latents that another {one} shares "
        "(**shared**), and among those that none shares (**orphan**); mean over runs.",
    )
    return replace(table, caption=f"{declared.title} Among shared latents and orphans")


def _overlaps(cells: Sequence[Cell]) -> list[Table]:
    """Return the table of whether runs of a cell absorb the same words; empty if not measured."""
    own = [(knobs, cell) for knobs, cell in cells if OVERLAP in cell.estimates]
    if not own:
        return []
    made: dict[str, Column] = estimate_columns(
        {"same words": OVERLAP, "by chance": f"{OVERLAP}_expected"}
    )
    made |= {
        "pairs\np < .05": _significant,
        "letters": lambda cell: f"{cell.pair_mean('absorbed_classes'):.1f}",
    }
    table = cell_table(
        own,
        made,
        f"**same words**: words absorbed in both of two {pair_axis_name(cells)} / in either, over "
        "**letters** whose latents are matched by the decoder; mean over pairs. **by chance**: the "
        "same after permuting words with one letter and similar frequency; **p**: p-value of a "
        "pair in that permutation test.",
    )
    return [replace(table, caption="Do runs absorb the same words?")]


def _significant(cell: CellResult) -> str:
    p = cell.pairs["absorbed_p"].dropna().to_numpy(dtype=np.float64)
    return f"{np.count_nonzero(p < 0.05)} of {len(p)}"


def _distinguishing_knobs(about: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the knobs that differ between runs; ``run`` if none does."""
    names = dict.fromkeys(name for own in about for name in own if name != "run")
    found = [n for n in names if len({str(own.get(n)) for own in about}) > 1]
    # An SAE that reseed did not train has no knobs, only its folder.
    return found if found and all(own.keys() >= set(found) for own in about) else ["run"]
