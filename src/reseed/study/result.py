"""The result of a study: read from the files that compare jobs wrote, written as tables, figures
and report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from reseed.compare.cell import CellResult, cell_settings, unify_sparsity
from reseed.compare.config import ComparisonConfig, pair_axes
from reseed.compare.dictionary import numbers
from reseed.compare.difference import run_draws
from reseed.config import Config
from reseed.errors import ConfigError, ReseedError, did_you_mean
from reseed.evaluate import load_all
from reseed.evaluate.base import EvaluationConfig
from reseed.report.cell_labels import Cell, sort_cells
from reseed.report.evaluation_results import EvaluatedRun, joined, run_frame, write_evaluations
from reseed.report.figures import draw_figure, save_figures
from reseed.report.page.content import ReportData
from reseed.report.page.render import table_html
from reseed.report.page.write import data_file_names, figure_drawings, write_report
from reseed.report.power import PowerResult, power_result
from reseed.report.power_tables import Question
from reseed.report.table_files import (
    first_tables,
    latent_table,
    pair_frame,
    summary_frame,
    write_tables,
)
from reseed.report.terminal import print_table
from reseed.sae.checkpoint import WEIGHTS_FILE
from reseed.store.contexts import Contexts
from reseed.store.results import StoredEvaluation, result_folder
from reseed.store.runs import Run, refuse_damaged
from reseed.store.sweeps import Sweep, sweep_error
from reseed.study.absorbed_words import with_overlaps
from reseed.study.compare import stale_runs
from reseed.study.evaluate import SavedRun
from reseed.system.console import counted, say
from reseed.system.integrity import DamagedFileError

REPORT = "report"
"""The report's folder within the sweep's folder."""
REPORT_FORMATS = ("html", "md", "tex")


class NotebookFigure(Figure):
    """Figure that shows itself in a notebook, which otherwise shows only figures of pyplot."""

    def _repr_png_(self) -> bytes:
        written = BytesIO()
        self.savefig(written, format="png", dpi=110, bbox_inches="tight")
        return written.getvalue()


@dataclass(frozen=True, eq=False)
class StudyResult:
    """The result of a comparison, read from the files of a sweep.

    Attributes:
        sweep: the folder of the sweep.
        settings: the settings of the comparison.
        cells: the compared cells, with the results of evaluations.
        runs: the evaluated runs, by id.
        problems: a message for each cell with missing runs, and for each cell that could not be
            compared or run that could not be evaluated.
    """

    sweep: Sweep
    settings: ComparisonConfig
    cells: list[Cell]
    runs: dict[str, EvaluatedRun]
    problems: list[str]

    @property
    def path(self) -> Path:
        """The sweep's folder, which holds the tables and figures."""
        return self.sweep.path

    @property
    def complete(self) -> bool:
        """True if every cell has all of its runs, and everything was compared and evaluated."""
        return not self.problems

    @cached_property
    def summary(self) -> pd.DataFrame:
        """``summary.csv``: a row per cell, with every estimate and its interval."""
        return summary_frame(self.cells)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """``pairs.csv``: a row per pair of runs, with every measure of the pair."""
        return pair_frame(self.cells)

    @cached_property
    def latents(self) -> pd.DataFrame:
        """``latents.parquet``: a row per latent of each run, with its matches in the other runs."""
        return latent_table(self.cells).to_pandas()

    @property
    def evaluations(self) -> pd.DataFrame:
        """``evaluations.csv``: a row per run, with the metrics of its evaluations."""
        return run_frame(self.runs)

    @property
    def figures(self) -> list[str]:
        """Names of the figures."""
        return list(self._drawings)

    def figure(self, name: str) -> Figure:
        """Draw a figure of the report.

        Args:
            name: one of `figures`.

        Raises:
            ReseedError: there is no such figure.
        """
        if name not in self._drawings:
            names = ", ".join(self.figures) or "none"
            raise ReseedError(
                f"there is no figure {name!r}.{did_you_mean(name, self.figures)} Figures: {names}"
            )
        figure = draw_figure(self._drawings[name])
        figure.__class__ = NotebookFigure  # the drawing functions make plain figures
        return figure

    def power(
        self,
        difference: float = 0.05,
        power: float = 0.8,
        confidence: float | None = None,
        measure: str = "",
        tokens: float | Sequence[float] = (),
        differences: int = 1,
    ) -> PowerResult:
        """Compute the seeds and tokens that a larger comparison needs; this one is the pilot.

        Args:
            difference: true difference of two cells that Welch's test is to find.
            power: probability with which it finds this difference.
            confidence: level of the test and of all intervals; by default the comparison's.
            measure: a fraction of docs/measures.md; by default the primary measure.
            tokens: budget or budgets at which the measure is predicted; by default twice and four
                times the largest. Predictions need at least three budgets.
            differences: number of differences that are tested together. Above 1, the seeds suffice
                for the first step of Holm's correction.

        Raises:
            ConfigError: a value is out of range, or there is no such measure.
            ReseedError: runs are missing, or no cell has three seeds.
        """
        question = Question(
            measure or self.settings.primary,
            difference,
            power,
            self.settings.confidence if confidence is None else confidence,
            tokens,
            differences,
        )
        if self.problems:
            raise ReseedError(
                f"{self.path} is not finished ({self.problems[0]}): `reseed run` with the "
                "arguments of the sweep trains and compares what is missing"
            )
        records = {run.id: run.record for run in self.sweep.runs()}
        return power_result(self.cells, records, question)

    def report(self, format: str = "html", out: Path | str | None = None) -> Path:
        """Write the report into a folder of its own, replacing an older one.

        Args:
            format: ``html``, ``md`` or ``tex``.
            out: the folder; by default ``report``, ``report-md`` or ``report-tex`` in `path`.

        Returns:
            the file to open.
        """
        if format not in REPORT_FORMATS:
            raise ConfigError(f"{{key}} must be one of {', '.join(REPORT_FORMATS)}; got {format!r}",
                              "format")  # fmt: skip
        damage = self.sweep.damaged_output()
        if damage is not None:
            say(f"{damage}: tables and figures are written again")
        if damage is not None or not (self.path / "summary.csv").is_file():
            self.write_tables()
        own = REPORT if format == "html" else f"{REPORT}-{format}"
        self._save(
            {n: d for n, d in self._drawings.items() if damage or not _is_drawn(self.path, n)}
        )
        data = data_file_names(self.path, self.cells, self.runs)
        contexts = {r.id: read for r in self.sweep.runs() if (read := Contexts.of(r.path))}
        of = ReportData(
            self.sweep, self.cells, self.runs, self.problems, tuple(self.figures), data, contexts
        )
        return write_report(of, Path(out) if out else self.path / own, format)

    def write_tables(self) -> list[str]:
        """Write the tables, and return the names of those that evaluations added."""
        paths = write_tables(self.cells, self.path, self.problems)
        names = write_evaluations(self.runs, self.path)
        self.sweep.record_outputs([*(path.name for path in paths), *names])
        return names

    def write_figures(self) -> list[str]:
        """Draw the figures into `path`, and return their names."""
        self._save(self._drawings)
        return self.figures

    def _save(self, drawings: Mapping[str, Callable[[], Figure]]) -> None:
        if drawings:
            paths = save_figures(drawings, self.path)
            self.sweep.record_outputs(path.name for path in paths)

    @cached_property
    def _drawings(self) -> dict[str, Callable[[], Figure]]:
        return figure_drawings(self.cells, self.runs)

    def __repr__(self) -> str:
        told = [f"{self.settings.name}: {counted(len(self.cells), 'cell')} in {self.path}/"]
        return "\n".join([*told, *self.problems])

    def __str__(self) -> str:
        """Return the main table, as text of at most 100 columns."""
        text = StringIO()
        first, *_ = first_tables(self.cells, self.problems)
        print_table(first, Console(file=text, width=100), self.settings.name)
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """Return the tables of the summary for a notebook."""
        return "".join(map(table_html, first_tables(self.cells, self.problems)))


def read_result(
    sweep: Sweep, settings: ComparisonConfig | None = None, failed: Sequence[str] = ()
) -> StudyResult:
    """Read the cells of a sweep and the evaluations of its runs.

    Args:
        settings: the comparison; by default that of the sweep's folder.
        failed: messages about what could not be compared or evaluated, for `StudyResult.problems`.

    Raises:
        ReseedError: no cell has been compared yet, or a file of a run or of a cell is damaged.
    """
    settings = settings or ComparisonConfig.from_dict(sweep.settings, "comparison")
    refuse_damaged(sweep.runs())
    cells: list[Cell] = []
    problems: list[str] = []
    for axes in cells_of(sweep, settings):
        rows = sweep.rows(axes)
        finished = [run for run in sweep.runs(**axes) if run.finished]
        if len(finished) < len(rows):
            name = ", ".join(f"{axis}={value}" for axis, value in axes.items()) or "all runs"
            count = f"{len(finished)} of {len(rows)} runs"
            problems.append(f"incomplete: {name}: {count}{_why(sweep.runs(**axes))}")
        try:
            result = CellResult.read(sweep.cell_folder(axes))
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            raise sweep_error(error) from None
        except ValueError as error:  # of another format
            raise ReseedError(str(error)) from None
        if stale := stale_runs(result, finished):
            raise ReseedError(
                f"{sweep.cell_folder(axes)} was compared before {stale[0].id} was trained again: "
                "`reseed compare` with the arguments of the sweep compares it again"
            )
        # The user may have changed the primary measure since the cell was compared.
        own = replace(result.settings, primary=settings.primary)
        draws = {run.id: run_draws(run) for run in finished}
        cells.append((cell_settings(finished, axes), replace(result, settings=own, draws=draws)))
    problems += failed
    if not cells:
        told = "".join(f"\n  {line}" for line in problems)
        raise ReseedError(f"{sweep.path}: no cell has two finished runs to compare{told}")
    runs = evaluated_runs(sweep)
    cells = with_overlaps(joined(sort_cells(unify_sparsity(cells)), runs), runs)
    return StudyResult(sweep, settings, cells, runs, problems)


def collect(
    sweep: Sweep, settings: ComparisonConfig | None = None, failed: Sequence[str] = ()
) -> StudyResult:
    """Read the result of a sweep, and write its tables, figures and report.

    Args:
        failed: messages about what could not be compared or evaluated, for `StudyResult.problems`.

    Raises:
        ReseedError: no cell has been compared yet.
    """
    result = read_result(sweep, settings, failed)
    result.write_tables()
    result.write_figures()
    result.report()
    return result


def evaluated_saes(
    saved: Sequence[SavedRun], configs: Sequence[EvaluationConfig]
) -> dict[str, EvaluatedRun]:
    """Read the results of evaluations of single SAEs, by the SAE's id."""
    return {
        one.id: _evaluated(one.folder, {c.name: one.result_folder(c) for c in configs})
        for one in saved
    }


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
    weights: str | None = None
    about: dict[str, Any] = {"run": str(folder)}
    quality: dict[str, float] = {}
    if run.exists:
        about = cell_settings([run], {}) | {"seed": run.record["experiment"]["seed"], "run": run.id}
        metrics, weights = run.metrics, run.hashes().get(WEIGHTS_FILE)
        quality = numbers({name: metrics[name] for name in ("fvu", "l0", "dead_fraction")})
    found = {}
    for name, path in results.items():
        with suppress(FileNotFoundError):
            found[name] = StoredEvaluation.read(path, weights)
    return EvaluatedRun(about, found, quality)


def _is_drawn(folder: Path, name: str) -> bool:
    return all((folder / f"{name}.{kind}").is_file() for kind in ("svg", "png"))


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
