"""Printing of the results of a study, after the command's work."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.evaluate.base import EvaluationConfig
from reseed.report.evaluation_results import write_evaluations
from reseed.report.evaluation_tables import evaluation_tables, run_tables
from reseed.report.terminal import print_summary, print_tables
from reseed.store.results import FOLDER
from reseed.store.sweeps import Sweep
from reseed.study.evaluate import SavedRun
from reseed.study.result import REPORT, StudyResult, collect, evaluated_runs, evaluated_saes
from reseed.system.console import say


def print_result(result: StudyResult, only_evaluations: bool = False) -> None:
    """Print the tables of a comparison, the names of its files, and the cells that lack runs.

    Args:
        only_evaluations: print only the tables of evaluations.
    """
    cells, title = result.cells, result.settings.name
    if only_evaluations:
        print_tables(evaluation_tables(cells), title=title)
    else:
        print_summary(cells, title=title)
    files = ["summary (md, csv, tex)", "pairs.csv", "latents.parquet", "strata.csv"]
    if not all(cell.settings.pairs_are_a_sample for _, cell in cells):
        files += ["pairings.csv", "matrix.csv"]
    if any(run.results for run in result.runs.values()):
        names = ("evaluations.csv", "letters.csv")
        files += [name for name in names if (result.path / name).is_file()]
    files.append("figures (png, svg)" if result.figures else "no figures")
    say(f"{result.path}/: {', '.join(files)}")
    say(f"report: {result.path / REPORT / 'index.html'}")
    for line in result.problems:  # last, so that they are not overlooked
        say(line)


def print_evaluations(
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
            print_result(collect(sweep), only_evaluations=True)
        else:
            runs = evaluated_runs(sweep)
            print_tables(run_tables(runs), title=sweep.path.name)
            files = ", ".join(write_evaluations(runs, sweep.path))
            say(f"{sweep.path}/: {files}; its runs have not been compared")
    told = {run.path.resolve() for sweep in sweeps for run in sweep.runs()}
    alone = [one for one in saved if one.folder.resolve() not in told]
    if alone:
        print_tables(run_tables(evaluated_saes(alone, configs)))
    for one in alone:
        say(f"{one.folder / FOLDER}/")
