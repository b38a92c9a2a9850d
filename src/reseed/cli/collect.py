"""Collect what compare jobs wrote: tables, figures, and the summary on the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from reseed.compare.cell import CellResult
from reseed.compare.config import ComparisonConfig, pair_axes
from reseed.compare.load import knobs, named_alike
from reseed.config import ReseedError
from reseed.console import say
from reseed.report.axes import Cell, ordered
from reseed.report.figures import write_figures
from reseed.report.tables import write_tables
from reseed.report.terminal import print_summary
from reseed.runs import Run
from reseed.sweeps import Sweep


def collect(sweep: Sweep, settings: ComparisonConfig) -> bool:
    """Read the cells of a sweep; write tables and figures beside them; print the summary.

    Returns:
        whether every cell has all of its runs.

    Raises:
        ReseedError: no cell has been compared.
    """
    cells: list[Cell] = []
    lacking: list[str] = []
    for axes in cells_of(sweep, settings):
        rows = sweep.rows(axes)
        finished = [run for run in sweep.runs(**axes) if run.finished]
        if len(finished) < len(rows):
            name = ", ".join(f"{axis}={value}" for axis, value in axes.items()) or "all runs"
            count = f"{len(finished)} of {len(rows)} runs"
            lacking.append(f"incomplete: {name}: {count}{_why(sweep.runs(**axes))}")
        try:
            result = CellResult.read(sweep.cell_folder(axes))
        except FileNotFoundError:
            continue
        # A cell that was compared before has the primary measure of that time.
        own = replace(result.settings, primary=settings.primary)
        cells.append((knobs(finished, axes), replace(result, settings=own)))
    if not cells:
        _say_all(lacking)
        raise ReseedError(f"{sweep.path}: no cell has two finished runs to compare")
    cells = ordered(named_alike(cells))
    write_tables(cells, sweep.path, lacking)
    drawn = write_figures(cells, sweep.path)
    print_summary(cells, title=settings.name)
    more = (
        "" if all(c.settings.pairs_are_a_sample for _, c in cells) else "pairings.csv, matrix.csv, "
    )
    say(
        f"{sweep.path}/: summary (md, csv, tex), pairs.csv, latents.parquet, strata.csv, {more}"
        + ("figures (png, svg)" if drawn else "no figures")
    )
    _say_all(lacking)  # last, where they are not overlooked
    return not lacking


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        say(line)


def _why(runs: Sequence[Run]) -> str:
    """The first sentence of the first failure, in brackets; empty where none has failed."""
    messages = [failure["message"] for run in runs if (failure := run.failure)]
    if not messages:
        return ""
    first = re.split(r"\.\s|\n", messages[0].strip())[0]
    return f" ({first.rstrip('.')})"


def cells_of(sweep: Sweep, settings: ComparisonConfig) -> list[dict[str, str]]:
    """The distinct values of all axes but those that pair up, in the manifest's order."""
    paired = {arm.name: pair_axes(arm.pair_by) for arm in settings.each_arm()}
    found: dict[tuple[tuple[str, str], ...], None] = {}
    for row in sweep.manifest:
        others = paired[row["axes"].get("arm", "")]
        found[tuple((a, v) for a, v in row["axes"].items() if a not in others)] = None
    return [dict(cell) for cell in found]
