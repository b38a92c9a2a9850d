"""Differences between cells: paired where the cells have the same random draws, else Welch's.

By default the initial weights of two cells are independent draws, even at the same seed
(`Resolved.init_seed`), and so are the means of the cells. With ``seed_scope=shared`` a seed has the
same initial weights in every cell, and an order of the data is the same in every cell: what such a
draw does to both means cancels in their difference, or adds up, and Welch's interval is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reseed.compare.cell import CellResult
from reseed.compare.config import REPLICATES
from reseed.compare.registry import Interval
from reseed.compare.statistics import (
    leave_one_out_interval,
    means_without_each,
    unknown_error,
    welch_difference,
)
from reseed.store.runs import Run


def run_draws(run: Run) -> dict[str, Any]:
    """Return the seeds of a run's random draws by their axis: of its initial weights, and of the
    order and the subset of its data. Two runs with an equal seed have the same draw."""
    data = run.record["experiment"]["dataset"]
    seeds = {axis: data.get(axis.partition(".")[2]) for axis in REPLICATES if axis != "seed"}
    return {"seed": run.record.get("init_seed"), **seeds}


def cell_difference(
    first: CellResult, second: CellResult, column: str, confidence: float
) -> Interval:
    """Return the mean of a column of pairs over one cell minus that over another.

    If the runs of both cells have the same draws (`share_draws`), the interval leaves the same draw
    out of both cells at a time, because their means then depend on each other. Otherwise it is
    Welch's. There is none if the error of either cell is not known (`statistics.unknown_error`).

    Args:
        first, second: cells whose pairs are a sample.
    """
    a, b = first.estimates[column], second.estimates[column]
    if not share_draws(first, second):
        return welch_difference(a, b, confidence)
    mean, n, cells = a.mean - b.mean, min(a.n, b.n), (first, second)
    labels = [cell.runs["seed"].tolist() for cell in cells]
    if set(labels[0]) != set(labels[1]):
        reason = "the cells have the same draws, but not every one was run for both: no interval"
        return Interval(mean, None, None, None, n, reason)
    reason = unknown_error(a, b)
    if reason:
        return Interval(mean, None, None, None, n, reason)
    lacking = [
        dict(zip(own, means_without_each(_pair_matrix(cell, column)), strict=True))
        for own, cell in zip(labels, cells, strict=True)
    ]
    return leave_one_out_interval(
        mean, [lacking[0][seed] - lacking[1][seed] for seed in labels[0]], confidence
    )


def share_draws(*cells: CellResult) -> bool:
    """Return whether draws that vary within two of the cells occur in both: the same initial
    weights (`seed_scope=shared`), or the same orders or subsets of the data.

    Cells whose draws are not known (`CellResult.draws`) count as independent.
    """
    for axis in REPLICATES:
        seen: set[Any] = set()
        for cell in cells:
            drawn = {own.get(axis) for own in cell.draws.values()}
            if len(drawn) > 1:
                if (drawn & seen) - {None}:
                    return True
                seen |= drawn
    return False


def _pair_matrix(cell: CellResult, column: str) -> np.ndarray:
    """Return a column of a cell's pairs as a symmetric matrix, in the order of its runs."""
    place = {run: i for i, run in enumerate(cell.runs["run"])}
    values = np.zeros((len(place), len(place)))
    for a, b, value in zip(*(cell.pairs[x] for x in ("a", "b", column)), strict=True):
        values[place[a], place[b]] = values[place[b], place[a]] = value
    return values
