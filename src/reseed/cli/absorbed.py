"""Overlap of the words that the runs of a cell absorb, from their results and the matchings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Int

from reseed.compare.apart import NO_SPACE
from reseed.compare.cell import CellResult
from reseed.compare.pairing import without_intervals
from reseed.compare.statistics import Interval, seed_interval
from reseed.compare.tables import lists
from reseed.evaluate.absorption.overlap import Overlap, absorbed_overlap
from reseed.report.axes import Cell
from reseed.report.evaluations import OVERLAP, Runs

_EVALUATION = "absorption"


def with_overlaps(cells: Sequence[Cell], runs: Runs) -> list[Cell]:
    """Add the overlap of absorbed words to the cells whose runs all have an absorption result.

    The pairs get the columns ``absorbed_overlap`` (Jaccard), ``…_expected`` (by chance),
    ``absorbed_p`` and ``absorbed_classes``; the cell gets the estimate of the first over pairs.
    """
    return [(knobs, _with_overlaps(cell, runs)) for knobs, cell in cells]


def _with_overlaps(cell: CellResult, runs: Runs) -> CellResult:
    tables = {
        name: (of["letters"], of["words"])
        for name, run in runs.items()
        if _EVALUATION in run.results and (of := run.results[_EVALUATION].tables)
    }
    if NO_SPACE in cell.pairs or not set(cell.runs["run"]) <= tables.keys():
        return cell
    found = {
        (a, b): absorbed_overlap(tables[a], tables[b], _partners(cell, a, b))
        for a, b in zip(cell.pairs["a"], cell.pairs["b"], strict=True)
    }
    return replace(
        cell,
        pairs=cell.pairs.assign(**_columns(list(found.values()))),
        estimates=cell.estimates
        | without_intervals({OVERLAP: _estimate(cell, found)}, cell.settings),
    )


def _partners(cell: CellResult, a: str, b: str) -> Int[np.ndarray, " num_latents"]:
    """Return the match by decoder in run ``b`` of each latent of run ``a``; −1 for none."""
    own = cell.latents.filter(pc.field("run") == a)
    return lists(own, "partner_decoder")[:, own["others"][0].as_py().index(b)].astype(np.int64)


def _columns(found: Sequence[Overlap]) -> dict[str, list[float]]:
    return {
        OVERLAP: [overlap.jaccard for overlap in found],
        f"{OVERLAP}_expected": [overlap.expected for overlap in found],
        "absorbed_p": [overlap.p for overlap in found],
        "absorbed_classes": [float(overlap.classes) for overlap in found],
    }


def _estimate(cell: CellResult, found: Mapping[tuple[str, str], Overlap]) -> Interval:
    """Estimate the overlap over pairs of seeds; pairs that absorb nothing have none."""
    place = {run: i for i, run in enumerate(cell.runs["run"])}
    values = np.zeros((len(place), len(place)))
    for (a, b), overlap in found.items():
        values[place[a], place[b]] = values[place[b], place[a]] = overlap.jaccard
    return seed_interval(values, cell.settings.confidence)
