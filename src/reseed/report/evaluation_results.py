"""Results of evaluations, joined to comparisons: their columns, rows and files.

An evaluation concerns one run. Its metrics become columns of a cell's runs, with a mean over runs
and its interval, like FVU and L0. Its values per latent become columns of ``latents.parquet``, with
means over the latents that other runs share and over orphans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Bool, Float

from reseed.compare.cell import CellResult
from reseed.compare.pairing import without_intervals
from reseed.compare.registry import Interval
from reseed.compare.statistics import run_interval
from reseed.report.cell_labels import Cell
from reseed.store.results import StoredEvaluation, column
from reseed.system.files import atomic_write

LETTERS = "letters"
"""Name of the table of a result that has a row per class of words."""
OVERLAP = "absorbed_overlap"
"""Column of pairs: words absorbed in both over words absorbed in either
(`reseed.study.absorbed_words`)."""
SHARED, ORPHAN = "_shared", "_orphan"
"""Suffixes of means over latents that another run shares, and over latents that no run shares."""


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """A run with the results of its evaluations.

    Attributes:
        about: identity of the run: its knobs, ``seed`` and ``run``.
        results: name of the evaluation → its result.
        quality: measures at the end of training: ``fvu``, ``l0``, ``dead_fraction``.
    """

    about: Mapping[str, Any]
    results: Mapping[str, StoredEvaluation]
    quality: Mapping[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Column → value of all metrics; NaN for a metric that could not be measured."""
        return {
            column(name, metric): float("nan") if value is None else float(value)
            for name, result in self.results.items()
            for metric, value in result.metrics.items()
        }

    @property
    def numbers(self) -> dict[str, float]:
        """Column → value of `quality` and `metrics`."""
        return {**self.quality, **self.metrics}

    @property
    def latents(self) -> dict[str, np.ndarray]:
        """Column → values per latent."""
        return {
            column(name, of): values
            for name, result in self.results.items()
            for of, values in result.latents.items()
        }


Runs = Mapping[str, EvaluatedRun]
"""Runs by their ids."""


def joined(cells: Sequence[Cell], runs: Runs) -> list[Cell]:
    """Join the results of evaluations to the cells of their runs. A run without results has NaN,
    and so has the mean over runs."""
    if not any(run.results for run in runs.values()):
        return list(cells)
    types = _latent_types(runs)
    return [(knobs, _joined(cell, runs, types)) for knobs, cell in cells]


def _joined(cell: CellResult, runs: Runs, types: Mapping[str, pa.DataType]) -> CellResult:
    own = [runs.get(run, EvaluatedRun({}, {})) for run in cell.runs["run"]]
    names: dict[str, dict[str, None]] = {}
    for run in own:
        for name, result in run.results.items():
            names.setdefault(name, {}).update(
                dict.fromkeys(column(name, m) for m in result.metrics)
            )
    columns = {
        name: [run.metrics.get(name, float("nan")) for run in own]
        for of in names.values()
        for name in of
    }
    level = cell.settings.confidence
    estimates = {name: run_interval(values, level) for name, values in columns.items()}
    estimates |= _by_sharing(cell, own, level)
    return replace(
        cell,
        runs=pd.concat(
            [cell.runs.drop(columns=[*columns], errors="ignore"), pd.DataFrame(columns)], axis=1
        ),
        latents=_with_latents(cell, own, types),
        estimates=cell.estimates | without_intervals(estimates, cell.settings),
        evaluated={name: tuple(of) for name, of in names.items()},
    )


def _latent_types(runs: Runs) -> dict[str, pa.DataType]:
    """Return the columns of latents with their types, for all cells, so that their tables can be
    concatenated."""
    return {
        name: pa.from_numpy_dtype(values.dtype)
        for run in runs.values()
        for name, values in run.latents.items()
    }


def _with_latents(
    cell: CellResult, own: Sequence[EvaluatedRun], types: Mapping[str, pa.DataType]
) -> pa.Table:
    table = cell.latents
    for name, kind in types.items():
        parts = []
        for run, size in zip(own, cell.runs["num_latents"].astype(int), strict=True):
            values = run.latents.get(name)
            parts.append(pa.nulls(size, kind) if values is None else pa.array(values, kind))
        table = table.append_column(name, pa.chunked_array(parts, kind))
    return table


def _by_sharing(
    cell: CellResult, own: Sequence[EvaluatedRun], confidence: float
) -> dict[str, Interval]:
    """Average the values of live latents within each run, for shared latents and for orphans apart,
    and then over runs. Integer columns are identifiers and have no mean."""
    found: dict[str, list[float]] = {}
    sizes = np.cumsum([0, *cell.runs["num_latents"].astype(int)])
    shared = cell.latents["shared_with"].to_numpy() > 0
    live = cell.latents["live"].to_numpy(zero_copy_only=False).astype(bool)
    for i, run in enumerate(own):
        rows = slice(sizes[i], sizes[i + 1])
        for name, values in run.latents.items():
            if values.dtype.kind in "bf":
                for end, group in ((SHARED, shared[rows]), (ORPHAN, ~shared[rows])):
                    found.setdefault(name + end, []).append(_mean(values, group & live[rows]))
    return {
        name: run_interval(values, confidence)
        for name, values in found.items()
        if len(values) == len(own)
    }


def _mean(values: Float[np.ndarray, " F"], kept: Bool[np.ndarray, " F"]) -> float:
    """Average the kept values that are not NaN; NaN if there are none."""
    known = values[kept].astype(np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")


def run_frame(runs: Runs) -> pd.DataFrame:
    """Return ``evaluations.csv``: a row per run, its identity first, then every metric."""
    return pd.DataFrame([{**run.about, **run.numbers} for run in runs.values()])


def letter_frame(runs: Runs) -> pd.DataFrame:
    """Return ``letters.csv``: a row per class of words, run and evaluation that has classes."""
    frames = []
    for run in runs.values():
        for name, result in run.results.items():
            if LETTERS in result.tables:
                frame = result.tables[LETTERS]
                own = {k: v for k, v in {**run.about, "evaluation": name}.items() if k not in frame}
                lists = [c for c in frame if any(map(_is_list, frame[c]))]
                frame = frame.assign(**{c: frame[c].map(_in_words) for c in lists})
                frames.append(pd.concat([_repeated(own, frame.index), frame], axis=1))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def write_evaluations(runs: Runs, folder: Path) -> list[str]:
    """Write ``evaluations.csv`` and, where classes of words were evaluated, ``letters.csv``.

    Returns:
        the names of the files.
    """
    if not any(run.results for run in runs.values()):
        return []
    made: dict[str, Callable[[Path], Any]] = {
        "evaluations.csv": partial(run_frame(runs).to_csv, index=False)
    }
    letters = letter_frame(runs)
    if not letters.empty:
        made["letters.csv"] = partial(letters.to_csv, index=False)
    for name, write in made.items():
        atomic_write(folder / name, write)
    return list(made)


def _repeated(values: Mapping[str, Any], index: pd.Index) -> pd.DataFrame:
    return pd.DataFrame({name: [value] * len(index) for name, value in values.items()}, index=index)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _in_words(value: Any) -> str:
    """Write nested lists as ``3 17; 3``."""
    if not _is_list(value):
        return str(value)
    return ("; " if any(map(_is_list, value)) else " ").join(_in_words(item) for item in value)
