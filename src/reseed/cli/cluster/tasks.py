"""Tasks that run on a node: train a group, evaluate runs, compare a cell, make the tables.

submitit pickles these objects and calls them in the job. SLURM sends a signal before a job's end,
and submitit's handler of that signal requeues the job. The handler of this module first lets
training save at the end of a step.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from reseed.compare.config import ComparisonConfig
from reseed.errors import Interrupted, ReseedError
from reseed.evaluate.base import EvaluationConfig
from reseed.experiment import Experiment
from reseed.experiment.resolve import resolve_experiment
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.system.console import counted
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

OUT_OF_RETRIES = "out of retries"


class JobFailed(ReseedError):
    """Error that ends a job with unfinished work, so that SLURM shows the job as failed."""


@dataclass(frozen=True)
class Task(ABC):
    """Base class of the jobs.

    Attributes:
        folder: the working directory of the command; paths are relative to it.
    """

    folder: str

    def __call__(self) -> None:
        os.chdir(self.folder)
        with preemption() as stopped:
            try:
                self.work()
            except Interrupted as stop:
                if not stopped.requeue and is_worker():
                    return  # an error here would kill the job while the leader may be saving
                if not stopped.requeue:
                    raise SystemExit(128 + stop.number) from None
                stopped.again(self.give_up)
            except Exception:
                if stopped.requeue:  # an error during the shutdown does not fail the job
                    stopped.again(self.give_up)
                raise

    @abstractmethod
    def work(self) -> None:
        """Do the work of the job."""

    def give_up(self, reason: str) -> None:  # noqa: B027 (nothing, unless a job has runs)
        """Record that the job will not be requeued again; by default, do nothing."""

    def checkpoint(self) -> Any:
        """Return this task for submitit to start again: its state is in the runs' folders."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class Stop:
    """State of the signal that SLURM sends before a job's end.

    Attributes:
        number: the signal.
        handler: submitit's handler, which requeues the job.
        requeue: True after the signal has arrived.
    """

    number: int
    handler: Callable[[int, FrameType | None], None]
    requeue: bool = field(default=False)

    def again(self, give_up: Callable[[str], None]) -> None:
        """Requeue this job and end it; if it is not requeued, call ``give_up`` with the reason."""
        from submitit.core.utils import UncompletedJobError

        # SLURM sends SIGTERM to a job that it requeues.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self.handler(self.number, None)
        except UncompletedJobError as error:
            give_up(str(error))
            raise


def is_worker() -> bool:
    """Return True if this process is a worker: a task of its job other than the first."""
    from submitit import JobEnvironment

    return JobEnvironment().global_rank > 0


@contextmanager
def preemption() -> Iterator[Stop]:
    """Make SIGTERM and the signal before a job's end stop the work without losing progress."""
    from submitit import JobEnvironment

    number = int(JobEnvironment._usr_sig())
    handler = signal.getsignal(number)
    assert callable(handler)
    stop = Stop(number, handler)

    def warned(number: int, frame: FrameType | None) -> None:
        # Training installs its own handler of SIGTERM, which saves first.
        stop.requeue = True
        signal.raise_signal(signal.SIGTERM)

    def ended(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    signal.signal(number, warned)
    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield stop
    finally:
        if not stop.requeue:
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Train(Task):
    """Training of the runs of one group.

    Attributes:
        experiments: the declared experiments.
        signatures: their signatures on the submitting machine.
    """

    experiments: tuple[Experiment, ...]
    signatures: tuple[str, ...]
    runtime: RuntimeConfig

    def work(self) -> None:
        from reseed.distributed.launcher import join_slurm
        from reseed.distributed.worker import run_worker
        from reseed.study.train import train_missing

        if is_worker():
            run_worker(join_slurm(pick_device(self.runtime.device).type))
            return
        resolved = [resolve_experiment(e, self.runtime) for e in self.experiments]
        for signature, found in zip(self.signatures, resolved, strict=True):
            if found.signature != signature:
                raise ReseedError(
                    f"{found.label} has signature {found.signature} here, and {signature} where it "
                    "was submitted: code, model or text differ"
                )
        failures = train_missing(resolved, self.runtime)
        if failures:
            run, error = next(iter(failures.items()))
            raise JobFailed(f"{len(failures)} of {len(resolved)} runs failed; {run}: {error}")

    def give_up(self, reason: str) -> None:
        """Mark the unfinished runs as failed, with the reason."""
        error = ReseedError(
            f"{OUT_OF_RETRIES}: its job reached the time limit more often than "
            "hydra.launcher.max_num_timeout allows. The same command continues from the last "
            "checkpoint."
        )
        for experiment in self.experiments:
            resolved = resolve_experiment(experiment, self.runtime)
            run = resolved.run(RunStore(self.runtime.outputs))
            if run.status not in ("missing", "interrupted", "damaged"):
                continue
            with run.lock(None) as owned:
                if owned and run.status in ("missing", "damaged"):
                    run.begin(resolved.record())
                if owned:
                    run.fail(error)


@dataclass(frozen=True)
class Evaluate(Task):
    """One evaluation of the runs of one source.

    Runs with a result are skipped, so a restarted job continues with the next run.

    Attributes:
        runs: the folders of the runs.
    """

    runs: tuple[str, ...]
    config: EvaluationConfig
    runtime: RuntimeConfig

    def work(self) -> None:
        from reseed.study.evaluate import Evaluator, saved_run

        there = [Path(folder) for folder in self.runs if Run(Path(folder)).finished]
        evaluator = Evaluator([saved_run(folder, self.runtime) for folder in there], self.runtime)
        error = evaluator.outcome(self.config)
        if error is not None:
            raise JobFailed(str(error)) from error
        lacking = len(self.runs) - len(there)
        if lacking:
            raise JobFailed(f"not evaluated, because not finished: {counted(lacking, 'run')}")


@dataclass(frozen=True)
class Compare(Task):
    """Comparison of one cell of a sweep."""

    sweep: str
    axes: tuple[tuple[str, str], ...]
    runtime: RuntimeConfig

    def work(self) -> None:
        from reseed.study.compare import compare_cell_of

        sweep = Sweep(Path(self.sweep))
        axes = dict(self.axes)
        settings = ComparisonConfig.from_dict(sweep.settings, "comparison")
        compare_cell_of(sweep, axes, settings.of_arm(axes.get("arm", "")), self.runtime)


@dataclass(frozen=True)
class Collect(Task):
    """Tables and figures of a sweep.

    Attributes:
        compared: True if the sweep has a comparison; otherwise only tables of evaluations are made.
    """

    sweep: str
    compared: bool

    def work(self) -> None:
        from reseed.cli.print_results import print_evaluations, print_result
        from reseed.study.result import collect

        sweep = Sweep(Path(self.sweep))
        if not self.compared:
            print_evaluations((), (sweep,), ())
            return
        result = collect(sweep)
        print_result(result)
        if not result.complete:
            raise JobFailed(f"{sweep.path}: incomplete")


def in_words(axes: Sequence[tuple[str, str]]) -> str:
    """Return the values of a cell as text: ``sae=topk, layer=2``."""
    return ", ".join(f"{axis}={value}" for axis, value in axes) or "all runs"
