"""The work of a study as jobs of Hydra's launchers: one run, evaluation or cell in each job.

A job gets its description as JSON, in the key ``job``; a run is composed again from its overrides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from reseed import activations, evaluate, sae
from reseed.cli.hydra_app import CommandLine, override
from reseed.compare.config import ComparisonConfig
from reseed.evaluate.base import EvaluationConfig
from reseed.experiment import Experiment
from reseed.experiment.resolve import resolve_experiment, resolved_from
from reseed.store.sweeps import Sweep
from reseed.study.compare import compare_cell_of
from reseed.study.evaluate import Evaluator, SavedRun, saved_run
from reseed.study.plan import Plan
from reseed.study.result import cells_of
from reseed.study.study import Executor, LocalExecutor
from reseed.study.train import Failures, train_missing
from reseed.system.console import open_streams
from reseed.system.files import DiskFullError
from reseed.train.config import RuntimeConfig


def executor_of(line: CommandLine) -> Executor:
    """Return the executor that ``hydra/launcher=`` chooses."""
    return LocalExecutor(line.environment) if line.runs_here else HydraExecutor(line)


class HydraExecutor:
    """Executor that launches jobs with Hydra's launchers (basic, joblib, submitit).

    Args:
        line: the command line, whose flags and settings of Hydra the jobs get.
    """

    def __init__(self, line: CommandLine) -> None:
        self.line = line

    def check(self, plan: Plan) -> None:
        if self.line.launcher[0] != "submitit_slurm":  # the jobs run on this machine
            LocalExecutor().check(plan)

    def train(self, plan: Plan) -> Failures:
        if not plan.multirun:  # a launcher is for the jobs of a sweep
            return LocalExecutor().train(plan)
        failures: dict[str, BaseException] = {}
        before = {run.id: run.failure for run in plan.runs}
        own = [override("hydra.sweep.dir", plan.sweep.path), override("++job", json.dumps(_here()))]
        for launch in plan.launches:
            if all(job.resolved.run(plan.store).finished for job in launch.jobs):
                continue
            try:
                self.line.launch(train_one, [*launch.overrides, *own])
            except DiskFullError:
                raise
            except Exception as error:
                runs = [job.resolved.run(plan.store) for job in launch.jobs]
                if all(run.failure == before[run.id] for run in runs):  # an error of the launcher
                    failures |= {run.id: error for run in runs if not run.finished}
        return failures

    def evaluate(
        self,
        saved: Sequence[SavedRun],
        configs: Sequence[EvaluationConfig],
        runtime: RuntimeConfig,
        folder: Path,
    ) -> list[Exception]:
        saes = {
            str(one.folder.resolve()): None if one.is_run else one.resolved.experiment.to_dict()
            for one in saved
        }
        jobs = [{"evaluation": config.to_dict(), "saes": saes} for config in configs]
        return self._launch(evaluate_one, jobs, runtime, folder)

    def compare(self, plan: Plan) -> list[Exception]:
        sweep = plan.sweep
        cells = cells_of(sweep, plan.comparison)
        jobs = [{"sweep": str(sweep.path.resolve()), "axes": axes} for axes in cells]
        return self._launch(compare_one, jobs, plan.runtime, sweep.path)

    def _launch(
        self,
        task: Callable[[DictConfig], None],
        jobs: Sequence[Mapping[str, Any]],
        runtime: RuntimeConfig,
        folder: Path,
    ) -> list[Exception]:
        settings = [o for o in self.line.overrides if o.lstrip("+~").startswith("hydra")]
        each = [{**job, **_here(), "runtime": runtime.to_dict()} for job in jobs]
        listed = ",".join(override("", json.dumps(job))[1:] for job in each)
        try:
            self.line.launch(
                task, [*settings, override("hydra.sweep.dir", folder), f"++job={listed}"]
            )
        except DiskFullError:
            raise
        except Exception as error:
            return [error]
        return []


def train_one(config: DictConfig) -> None:
    """Train one run: the Hydra job."""
    values = _plain(config)
    _enter(json.loads(values.pop("job")))
    resolved, runtime = resolved_from(values)
    for error in train_missing([resolved], runtime).values():
        raise error


def evaluate_one(config: DictConfig) -> None:
    """Perform one evaluation of all SAEs: the Hydra job."""
    job, runtime = _job(config)
    for package in (activations, evaluate, sae):
        package.load_all()
    evaluation = EvaluationConfig.from_dict(job["evaluation"], "evaluation")
    saved = [_saved(Path(folder), declared, runtime) for folder, declared in job["saes"].items()]
    if error := Evaluator(saved, runtime).outcome(evaluation):
        raise error


def compare_one(config: DictConfig) -> None:
    """Compare one cell of a sweep: the Hydra job."""
    job, runtime = _job(config)
    sweep = Sweep(Path(job["sweep"]))
    settings = ComparisonConfig.from_dict(sweep.settings, "comparison")
    axes = job["axes"]
    compare_cell_of(sweep, axes, settings.of_arm(axes.get("arm", "")), runtime)


def _saved(folder: Path, declared: Mapping[str, Any] | None, runtime: RuntimeConfig) -> SavedRun:
    if declared is None:
        return saved_run(folder, runtime)
    return SavedRun(folder, resolve_experiment(Experiment.from_dict(declared), runtime))


def _job(config: DictConfig) -> tuple[dict[str, Any], RuntimeConfig]:
    job = json.loads(config.job)
    _enter(job)
    return job, RuntimeConfig.from_dict(job["runtime"], "runtime")


def _here() -> dict[str, str]:
    """Return the entry of a job for its working directory, which relative paths refer to."""
    return {"folder": os.getcwd()}


def _enter(job: Mapping[str, Any]) -> None:
    open_streams()
    os.chdir(job["folder"])  # joblib keeps processes that another command started elsewhere


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
