"""A study as an object: train the missing runs, evaluate them, compare them.

`Study` does what ``reseed run`` does, one step for each method. An `Executor` does the work of a
step: here, in this process; the command line can replace it by jobs of Hydra's launchers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pandas as pd

from reseed.compare.config import ComparisonConfig
from reseed.errors import ReseedError
from reseed.evaluate.base import EvaluationConfig
from reseed.experiment import Experiment
from reseed.report.evaluation_results import run_frame
from reseed.store.runs import Run, refuse_damaged
from reseed.study.compare import compare_cell_of
from reseed.study.evaluate import Evaluator, SavedRun, evaluate_saved
from reseed.study.plan import Plan
from reseed.study.result import StudyResult, cells_of, collect, evaluated_saes, read_result
from reseed.study.train import (
    Failures,
    check_size,
    failure_lines,
    plan_missing,
    train_missing,
    train_plan,
)
from reseed.system.console import counted, messages_to, say
from reseed.system.environment import environment_variables, record_command
from reseed.system.files import DiskFullError
from reseed.train.config import RuntimeConfig


class Executor(Protocol):
    """The work of a study's steps. Each writes its results into the folders of runs and sweeps."""

    def check(self, plan: Plan) -> None:
        """Raise `ConfigError` for runs that the machine can never train."""
        ...

    def train(self, plan: Plan) -> Failures:
        """Train the unfinished runs, and return the errors of those that failed, by run id."""
        ...

    def evaluate(
        self,
        saved: Sequence[SavedRun],
        configs: Sequence[EvaluationConfig],
        runtime: RuntimeConfig,
        folder: Path,
    ) -> list[Exception]:
        """Run the evaluations that have no result yet, and return the errors.

        Args:
            folder: a folder for records of the work.
        """
        ...

    def compare(self, plan: Plan) -> list[Exception]:
        """Compare each cell that has no result yet, and return the errors."""
        ...


@dataclass(frozen=True)
class LocalExecutor:
    """Executor in this process; with ``runtime=ddp`` or ``spread``, several processes train.

    Attributes:
        environment: environment variables during the work.
    """

    environment: Mapping[str, str] = field(default_factory=dict)

    def check(self, plan: Plan) -> None:
        check_size(plan.experiments, plan.runtime)

    def train(self, plan: Plan) -> Failures:
        with environment_variables(self.environment):
            return train_missing(plan.experiments, plan.runtime)

    def evaluate(
        self,
        saved: Sequence[SavedRun],
        configs: Sequence[EvaluationConfig],
        runtime: RuntimeConfig,
        folder: Path,
    ) -> list[Exception]:
        with environment_variables(self.environment):
            evaluator = Evaluator(saved, runtime)
            return [error for config in configs if (error := evaluator.outcome(config))]

    def compare(self, plan: Plan) -> list[Exception]:
        errors: list[Exception] = []
        with environment_variables(self.environment):
            for axes in cells_of(plan.sweep, plan.comparison):
                settings = plan.comparison.of_arm(axes.get("arm", ""))
                try:
                    compare_cell_of(plan.sweep, axes, settings, plan.runtime)
                except DiskFullError:  # the next cell would fail too
                    raise
                except Exception as error:  # the other cells are compared all the same
                    errors.append(error)
        return errors


ParseEvaluations = Callable[[Sequence[str]], Sequence[EvaluationConfig]]
"""Function from overrides (``evaluation=reconstruction``) to checked evaluations."""


class Study:
    """Runs that are trained, evaluated and compared together.

    `reseed.compose` makes one from the overrides of the command line. A step that was interrupted
    continues when it is called again: finished runs, results and cells are kept.
    """

    def __init__(
        self,
        plan: Plan,
        evaluations: Sequence[EvaluationConfig] = (),
        *,
        parse_evaluations: ParseEvaluations | None = None,
        executor: Executor | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Make the study of a plan.

        Args:
            plan: the checked jobs.
            evaluations: those that `run` performs, and `evaluate` by default.
            parse_evaluations: makes evaluations from the overrides that `evaluate` is given.
            executor: does the work.
            progress: called with each message; by default messages are printed.
        """
        self._plan = plan
        self.evaluations = tuple(evaluations)
        self._parse_evaluations = parse_evaluations
        self._executor: Executor = executor or LocalExecutor()
        self._progress = progress

    @property
    def experiments(self) -> list[Experiment]:
        """The distinct experiments, as declared."""
        return [resolved.experiment for resolved in self._plan.experiments]

    @property
    def runs(self) -> list[Run]:
        """The distinct runs, finished or not."""
        return self._plan.runs

    @property
    def settings(self) -> ComparisonConfig | None:
        """The settings of the comparison; None if the study has none."""
        return self._plan.settings

    @property
    def path(self) -> Path:
        """The folder of the sweep."""
        return self._plan.sweep.path

    @property
    def failures(self) -> list[str]:
        """Lines about the runs that are not finished; runs with the same error share a line."""
        return failure_lines([job.resolved for job in self._plan.jobs], self._plan.store)

    def plan(self) -> None:
        """Print the runs that `train` would train, in groups, with tokens, time and memory."""
        with self._at_work():
            plan_missing(self._plan.experiments, self._plan.runtime)

    def train(self, *, strict: bool = True) -> list[Run]:
        """Train the runs that are not finished.

        Args:
            strict: raise an error if a run failed, after the others have been trained; otherwise
                print a message.

        Returns:
            all runs.

        Raises:
            ReseedError: a run failed.
        """
        with self._at_work():
            self._executor.check(self._plan)
            failures = train_plan(self._plan, self._executor.train)
            if strict and failures:
                raise ReseedError("\n".join(failures))
            for message in failures:
                say(message)
        return self.runs

    def evaluate(self, *evaluations: str | EvaluationConfig) -> pd.DataFrame:
        """Evaluate the finished runs.

        Args:
            evaluations: names (``reconstruction``), overrides of their settings
                (``evaluation.tokens=4096``) and evaluations; by default those of the study.

        Returns:
            a row per run: its settings, and the metrics of these evaluations.

        Raises:
            ConfigError: there is no such evaluation, or it does not apply to a run.
            ReseedError: no run is finished, or an evaluation failed.
        """
        configs = self._configs(evaluations) if evaluations else self.evaluations
        with self._at_work():
            saved = self._finished()
            if not saved:
                raise ReseedError("there is nothing to evaluate: no run is finished")
            errors = self._evaluate(saved, configs)
            if self.settings is not None and self._plan.sweep.compared:
                collect(self._plan.sweep, self.settings)  # the tables show the results
        if errors:
            raise ReseedError("\n".join(map(str, errors)))
        return run_frame(evaluated_saes(saved, configs))

    def compare(self) -> StudyResult:
        """Compare the finished runs, and write tables, figures and report.

        Raises:
            ConfigError: the study has no comparison.
            ReseedError: no cell has two finished runs, or a run is damaged.
        """
        _ = self._plan.comparison
        refuse_damaged(self.runs)
        if not any(run.finished for run in self.runs):
            raise none_finished(self._plan)
        return self._compare()

    def run(self) -> StudyResult:
        """Train the runs that are not finished, evaluate them if the study asks for it, and compare
        them.

        Failed runs are named by messages and by `StudyResult.problems`; the others are compared.

        Raises:
            ConfigError: the study has no comparison.
            ReseedError: no cell has two finished runs.
        """
        _ = self._plan.comparison
        self.train(strict=False)
        refuse_damaged(self.runs)
        saved = self._finished() if self.evaluations else []
        with self._at_work():
            errors = self._evaluate(saved, self.evaluations) if saved else []
        return self._compare([f"not evaluated: {error}" for error in errors])

    def result(self) -> StudyResult:
        """Read the result of the last `compare` or `run`, without computing anything.

        Raises:
            ReseedError: nothing has been compared yet.
        """
        sweep, settings = self._plan.sweep, self._plan.comparison
        if not sweep.compared:
            raise ReseedError(f"{sweep.path}: its runs have not been compared")
        with self._at_work():
            return read_result(sweep, settings)

    def _compare(self, problems: Sequence[str] = ()) -> StudyResult:
        with self._at_work():
            self._plan.write()
            errors = self._executor.compare(self._plan)
            problems = [*problems, *(f"not compared: {error}" for error in errors)]
            return collect(self._plan.sweep, self._plan.settings, problems)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Send messages to the caller's function, and name the command in records."""
        with messages_to(self._progress), record_command(self._plan.command):
            yield

    def _finished(self) -> list[SavedRun]:
        plan = self._plan
        both = [(resolved.run(plan.store), resolved) for resolved in plan.experiments]
        return [SavedRun(run.path, resolved) for run, resolved in both if run.finished]

    def _evaluate(
        self, saved: Sequence[SavedRun], configs: Sequence[EvaluationConfig]
    ) -> list[Exception]:
        plan = self._plan
        if plan.multirun:
            plan.write()
        sweeps = (plan.sweep,) if plan.multirun else ()
        return evaluate_saved(saved, configs, sweeps, plan.runtime, self._executor.evaluate)

    def _configs(self, given: Sequence[str | EvaluationConfig]) -> list[EvaluationConfig]:
        words = [word for word in given if isinstance(word, str)]
        made = [config for config in given if isinstance(config, EvaluationConfig)]
        if words:
            assert self._parse_evaluations is not None
            made += self._parse_evaluations(words)
        return made

    def __repr__(self) -> str:
        runs = self.runs
        done = sum(run.finished for run in runs)
        named = "" if self.settings is None else f"{self.settings.name}: "
        return f"<Study {named}{counted(len(runs), 'run')}, {done} finished>"


def none_finished(plan: Plan) -> ReseedError:
    """Return the error for a comparison without any finished run."""
    return ReseedError(
        f"none of the {len(plan.runs)} runs is finished: `reseed run` with the same arguments "
        "trains them"
    )
