"""Tables, figures, report and terminal summary from the files that compare jobs wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reseed.compare.cell import CellResult, cell_settings, unify_sparsity
from reseed.compare.config import ComparisonConfig, pair_axes
from reseed.config import Config
from reseed.errors import ConfigError, ReseedError
from reseed.evaluate import load_all
from reseed.evaluate.base import EvaluationConfig
from reseed.report.cell_labels import Cell, sort_cells
from reseed.report.evaluation_figures import write_evaluation_figures
from reseed.report.evaluation_results import EvaluatedRun, joined, write_evaluations
from reseed.report.evaluation_tables import evaluation_tables, run_tables
from reseed.report.figures import write_figures
from reseed.report.page.content import ReportData
from reseed.report.page.write import data_file_names, write_report
from reseed.report.table_files import write_tables
from reseed.report.terminal import print_summary, print_tables
from reseed.store.contexts import Contexts
from reseed.store.results import FOLDER, StoredEvaluation, result_folder
from reseed.store.runs import Run
from reseed.store.sweeps import Sweep
from reseed.study.absorbed_words import with_overlaps
from reseed.study.evaluate import SavedRun
from reseed.system.console import say

REPORT = "report"
"""The report's folder within the sweep's folder."""


@dataclass(frozen=True, eq=False)
class SweepResults:
    """Results read from the files of a sweep.

    Attributes:
        cells: the compared cells, with the results of evaluations.
        runs: the evaluated runs, by id.
        lacking: a message for each cell with missing runs.
    """

    cells: list[Cell]
    runs: dict[str, EvaluatedRun]
    lacking: list[str]


def gather(sweep: Sweep, settings: ComparisonConfig) -> SweepResults:
    """Read the cells of a sweep and the evaluations of its runs.

    Raises:
        ReseedError: no cell has been compared yet.
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
        # The user may have changed the primary measure since the cell was compared.
        own = replace(result.settings, primary=settings.primary)
        cells.append((cell_settings(finished, axes), replace(result, settings=own)))
    if not cells:
        _say_all(lacking)
        raise ReseedError(f"{sweep.path}: no cell has two finished runs to compare")
    runs = evaluated_runs(sweep)
    cells = with_overlaps(joined(sort_cells(unify_sparsity(cells)), runs), runs)
    return SweepResults(cells, runs, lacking)


def collect(sweep: Sweep, settings: ComparisonConfig, only_evaluations: bool = False) -> bool:
    """Read the cells of a sweep, write its tables, figures and report, and print the summary.

    Args:
        only_evaluations: print only the tables of evaluations. All tables are written anyway.

    Returns:
        True if every cell has all of its runs.

    Raises:
        ReseedError: no cell has been compared yet.
    """
    found = gather(sweep, settings)
    cells, runs, lacking = found.cells, found.runs, found.lacking
    more = write_numbers(sweep, found)
    drawn = write_figures(cells, sweep.path) + write_evaluation_figures(cells, runs, sweep.path)
    if only_evaluations:
        print_tables(evaluation_tables(cells), title=settings.name)
    else:
        print_summary(cells, title=settings.name)
    if not all(c.settings.pairs_are_a_sample for _, c in cells):
        more = ["pairings.csv", "matrix.csv", *more]
    files = ["summary (md, csv, tex)", "pairs.csv", "latents.parquet", "strata.csv", *more]
    files.append("figures (png, svg)" if drawn else "no figures")
    say(f"{sweep.path}/: {', '.join(files)}")
    figures = dict.fromkeys(path.stem for path in drawn)
    say(f"report: {report_of(sweep, found, figures, sweep.path / REPORT)}")
    _say_all(lacking)  # printed last, so that they are not overlooked
    return not lacking


def write_numbers(sweep: Sweep, found: SweepResults) -> list[str]:
    """Write the tables of a sweep, and return the names of those that evaluations added."""
    write_tables(found.cells, sweep.path, found.lacking)
    return write_evaluations(found.runs, sweep.path)


def report_of(
    sweep: Sweep,
    found: SweepResults,
    figures: Iterable[str],
    out: Path,
    format: str = "html",
) -> Path:
    """Write the report of a sweep whose tables and figures exist.

    Args:
        figures: names of the figures in the report.
        out: the report's folder.

    Returns:
        the file to open.
    """
    data = data_file_names(sweep.path, found.cells, found.runs)
    contexts = {run.id: read for run in sweep.runs() if (read := Contexts.of(run.path))}
    of = ReportData(sweep, found.cells, found.runs, found.lacking, tuple(figures), data, contexts)
    return write_report(of, out, format)


def collect_evaluated(
    saved: Sequence[SavedRun], sweeps: Sequence[Sweep], configs: Sequence[EvaluationConfig]
) -> None:
    """Write and print the results of evaluations.

    The results of sweeps that have been compared are added to the tables of these sweeps; all other
    results get tables of their own, with a row per run.

    Args:
        saved: all SAEs that were evaluated.
        configs: the requested evaluations.
    """
    for sweep in sweeps:
        if sweep.compared:
            settings = ComparisonConfig.from_dict(sweep.settings, "comparison")
            collect(sweep, settings, only_evaluations=True)
        else:
            runs = evaluated_runs(sweep)
            print_tables(run_tables(runs), title=sweep.path.name)
            files = ", ".join(write_evaluations(runs, sweep.path))
            say(f"{sweep.path}/: {files}; its runs have not been compared")
    told = {run.path.resolve() for sweep in sweeps for run in sweep.runs()}
    alone = [one for one in saved if one.folder.resolve() not in told]
    if alone:
        print_tables(
            run_tables(
                {t.id: _evaluated(t.folder, {c.name: t.result_folder(c) for c in configs})
                 for t in alone}
            )
        )  # fmt: skip
    for one in alone:
        say(f"{one.folder / FOLDER}/")


def evaluated_runs(sweep: Sweep) -> dict[str, EvaluatedRun]:
    """Return the finished runs of a sweep with the evaluation results for its tables."""
    asked = sweep.evaluations
    for name in [name for name, of in asked.items() if _is_outdated(name, of["signed"])]:
        say(
            f"{sweep.path}: the results of evaluation={name} are from another version of it and "
            "are left out; `reseed evaluate` computes them again"
        )
        del asked[name]
    if not asked:
        return {}
    distinct = {run.id: run for run in sweep.runs() if run.finished}
    return {
        name: _evaluated(
            run.path, {e: result_folder(run.path, e, of["signed"]) for e, of in asked.items()}
        )
        for name, run in distinct.items()
    }


def _is_outdated(name: str, signed: Mapping[str, Any]) -> bool:
    """Return True if results are from another version of an evaluation.

    A user's own evaluation may be unknown here; its results are never outdated.
    """
    load_all()
    try:
        known = Config.registered(EvaluationConfig.family, name)
    except ConfigError:
        return False
    return signed.get("version", 1) != known.version


def _evaluated(folder: Path, results: Mapping[str, Path]) -> EvaluatedRun:
    """Read the existing results of some evaluations of a run, or of an SAE that is not a run."""
    run = Run(folder)
    about: dict[str, Any] = {"run": str(folder)}
    quality: dict[str, float] = {}
    if run.exists:
        about = cell_settings([run], {}) | {"seed": run.record["experiment"]["seed"], "run": run.id}
        quality = {name: run.metrics[name] for name in ("fvu", "l0", "dead_fraction")}
    found = {}
    for name, path in results.items():
        with suppress(FileNotFoundError):
            found[name] = StoredEvaluation.read(path)
    return EvaluatedRun(about, found, quality)


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        say(line)


def _why(runs: Sequence[Run]) -> str:
    """Return the first sentence of the first failure, in parentheses; "" if no run has failed."""
    messages = [failure["message"] for run in runs if (failure := run.failure)]
    if not messages:
        return ""
    first = re.split(r"\.\s|\n", messages[0].strip())[0]
    return f" ({first.rstrip('.')})"


def cells_of(sweep: Sweep, settings: ComparisonConfig) -> list[dict[str, str]]:
    """Return the cells: the distinct values of all unpaired axes, in the manifest's order."""
    paired = {arm.name: pair_axes(arm.pair_by) for arm in settings.each_arm()}
    found: dict[tuple[tuple[str, str], ...], None] = {}
    for row in sweep.manifest:
        others = paired[row["axes"].get("arm", "")]
        found[tuple((a, v) for a, v in row["axes"].items() if a not in others)] = None
    return [dict(cell) for cell in found]
