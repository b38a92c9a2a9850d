"""Tables of evaluations: one per evaluation, with a row per cell of a comparison or per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reseed.compare.cell import CellResult
from reseed.report.cell_labels import Cell, pair_axis_name
from reseed.report.evaluation_results import ORPHAN, OVERLAP, SHARED, Runs
from reseed.report.format import format_number
from reseed.report.table import (
    Column,
    Table,
    cell_table,
    count_column,
    estimate_columns,
    mean_column,
)
from reseed.store.results import EvaluationDeclaration, column, declaration

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
        rows = tuple(
            (
                *(str(run.about.get(knob, "")) for knob in knobs),
                *(format_number(run.numbers.get(name, float("nan"))) for name in shown),
            )
            for run in own
        )
        header = (*knobs, *(metric.heading for metric in shown.values()))
        notes, spare = declared.notes(), _spare(declared)
        made.append(Table(header, rows, len(knobs), declared.title, notes, spare))
    return made


def _names(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the evaluations, those in `ORDER` first."""
    found = dict.fromkeys(name for names in each for name in names)
    return [name for name in ORDER if name in found] + [n for n in found if n not in ORDER]


def _spare(declared: Declaration) -> tuple[str, ...]:
    """Return the headings of the columns that a narrow window can leave out."""
    headings = {metric.name: metric.heading for metric in declared.shown().values()}
    return tuple(headings[name] for name in declared.spare)


def _table(cells: Sequence[Cell], declared: Declaration) -> Table:
    made: dict[str, Column] = {}
    for name, metric in declared.shown().items():
        if metric.interval:
            made |= estimate_columns({metric.heading: name})
        else:
            made[metric.heading] = count_column(name) if metric.count else mean_column(name)
    table = cell_table(cells, made, *declared.notes())
    return replace(table, caption=declared.title, spare=_spare(declared))


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
    made: dict[str, Column] = estimate_columns({"same words": OVERLAP})
    made |= {
        "by\nchance": lambda cell: format_number(cell.pair_mean(f"{OVERLAP}_expected")),
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
