"""Collect what compare jobs wrote: tables, figures, and the summary on the terminal."""

from __future__ import annotations

from typing import Any

from reseed.compare.cell import CellResult
from reseed.compare.config import ComparisonConfig
from reseed.config import ReseedError
from reseed.console import say
from reseed.report.figures import write_figures
from reseed.report.tables import print_summary, write_tables
from reseed.sweeps import Sweep


def collect(sweep: Sweep, settings: ComparisonConfig) -> None:
    """Read the cells of a sweep; write tables and figures beside them; print the summary.

    Raises:
        ReseedError: no cell has been compared.
    """
    cells: list[tuple[dict[str, Any], CellResult]] = []
    lacking: list[str] = []
    for axes in _cells(sweep, settings.pair_by):
        name = ", ".join(f"{axis}={value}" for axis, value in axes.items()) or "all runs"
        rows = sweep.rows(axes)
        runs = [run for run in sweep.runs(**axes) if run.finished]
        if len(runs) < len(rows):
            lacking.append(f"{name}: {len(runs)} of {len(rows)} runs")
        try:
            cells.append((knobs(runs[0].record, axes), CellResult.read(sweep.cell_folder(axes))))
        except (FileNotFoundError, IndexError):
            continue
    if not cells:
        raise ReseedError(f"{sweep.path}: no cell has two finished runs to compare")
    write_tables(cells, sweep.path)
    write_figures(cells, sweep.path)
    print_summary(cells)
    for line in lacking:
        say(f"incomplete: {line}")
    say(f"{sweep.path}/: summary.md, summary.csv, pairs.csv, latents.parquet, figures (png, svg)")


def knobs(record: dict[str, Any], axes: dict[str, str]) -> dict[str, Any]:
    """What tells a cell apart, by the names of the command line."""
    e = record["experiment"]
    out = {
        "model": record["labels"]["model"],
        "layer": e["layer"],
        "hookpoint": e["hookpoint"]["site"],
        "dataset": record["labels"]["dataset"],
        "sae": e["sae"]["type"],
        "num_latents": record["num_latents"],
        "sparsity": record["sparsity"],
        "tokens": record["tokens"],
        "training": e["training"]["recipe"],
    }
    for axis, value in axes.items():
        if axis not in out and axis != "sae.num_latents":
            out[axis] = value
    return out


def _cells(sweep: Sweep, pair_by: str) -> list[dict[str, str]]:
    """The distinct values of all axes but the one that pairs up, in the manifest's order."""
    found: dict[tuple[tuple[str, str], ...], None] = {}
    for row in sweep.manifest:
        found[tuple((a, v) for a, v in row["axes"].items() if a != pair_by)] = None
    return [dict(cell) for cell in found]
