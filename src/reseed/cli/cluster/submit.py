"""Submission of a plan: an array of groups to train, then arrays of evaluations and of cells to
compare, then a job for the tables."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reseed.cli.cluster.queue import (
    COLLECT,
    COMPARE,
    EVALUATE,
    TRAIN,
    Record,
    SlurmSettings,
    Submitted,
    queue,
)
from reseed.cli.cluster.tasks import Collect, Compare, Evaluate, Task, Train, in_words
from reseed.config import digest
from reseed.errors import ReseedError
from reseed.evaluate.base import EvaluationConfig
from reseed.experiment.resolve import Resolved, cache_folder
from reseed.store.runs import RunStore
from reseed.store.sweeps import Sweep
from reseed.study.evaluate import SavedRun
from reseed.system.console import counted, say
from reseed.system.files import user_path
from reseed.train.config import RuntimeConfig
from reseed.train.plan import MEMORY_SHARE, Group, Machine, make_plan

if TYPE_CHECKING:
    from submitit import AutoExecutor

_ANY_MEMORY_GIB = 2.0**30


@dataclass(frozen=True)
class Work:
    """The work that a command requests.

    Attributes:
        experiments: every run of the sweep.
        settings: the settings of the jobs.
        cells: the cells to compare if necessary, as values of axes; None: compare nothing.
        trains: whether to train the missing runs.
        evaluations: evaluations of ``evaluated``; those with a result are left out.
        evaluated: runs of the sweep that are evaluated after their training.
    """

    sweep: Sweep
    experiments: tuple[Resolved, ...]
    runtime: RuntimeConfig
    settings: SlurmSettings
    cells: tuple[tuple[tuple[str, str], ...], ...] | None = None
    trains: bool = True
    evaluations: tuple[EvaluationConfig, ...] = ()
    evaluated: tuple[SavedRun, ...] = ()

    @property
    def record(self) -> Record:
        return Record(self.sweep.path.resolve())

    @property
    def nodes_runtime(self) -> RuntimeConfig:
        """The runtime for a job, with absolute paths: a job may start in another folder."""
        r = self.runtime
        kept = r.activation_cache
        return replace(
            r,
            outputs=str(Path(r.outputs).resolve()),
            sweeps=str(Path(r.sweeps).resolve()),
            cache=str(cache_folder(r).resolve()),
            activation_cache=str(user_path(kept).resolve()) if kept else None,
            wait=True,
        )


def submit(work: Work, compared: set[tuple[tuple[str, str], ...]]) -> list[Submitted]:
    """Submit all work that is neither done nor submitted already.

    Args:
        compared: the cells whose runs are all finished and compared.

    Returns:
        the sweep's queued and running jobs.

    Raises:
        ReseedError: SLURM or submitit is missing, or SLURM refuses a job.
    """
    check_slurm()
    record = work.record
    with record.lock():
        active = record.active(queue())
        missing = _missing(work, active) if work.trains else []
        new: list[Submitted] = []
        stage = _Stage(work, record)
        if missing:
            machine = Machine.of(planning(work.settings, work.runtime))
            groups = make_plan([r.spec for r in missing], machine).groups
            _say_plan(groups, active)
            new += stage.submit([_train(work, group) for group in groups], TRAIN, [])
        made: list[Submitted] = []
        evaluations = _evaluations(work, active)
        if evaluations:
            trained = [job for job in (*active, *new) if job.kind == TRAIN]
            made += stage.submit(evaluations, EVALUATE, trained)
        wanted = [c for c in work.cells or () if c not in compared]
        # Queued comparisons already run after all queued training.
        if wanted and (missing or not any(job.kind == COMPARE for job in active)):
            made += stage.submit(_compares(work, wanted), COMPARE, [*active, *new])
        if made:
            others = [job for job in active if job.kind != TRAIN]
            made += stage.submit([_collect(work)], COLLECT, [*others, *made])
        new += made
        return [*active, *new]


def check_slurm() -> None:
    """Raise `ReseedError` if jobs cannot be submitted from this machine."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ReseedError(
            "hydra/launcher=slurm needs submitit: pip install 'reseed[slurm]'"
        ) from None
    lacking = [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]
    if lacking:
        raise ReseedError(
            f"hydra/launcher=slurm needs SLURM's commands on the submitting machine: there is no "
            f"`{lacking[0]}` here"
        )


def _missing(work: Work, active: Sequence[Submitted]) -> list[Resolved]:
    """Return the distinct runs that are neither finished nor in a queued or running job."""
    store = RunStore(work.runtime.outputs)
    submitted = {signature for job in active if job.kind == TRAIN for signature in job.runs}
    distinct = {r.signature: r for r in work.experiments}
    return [
        resolved
        for signature, resolved in distinct.items()
        if signature not in submitted and not resolved.run(store).finished
    ]


def planning(s: SlurmSettings, r: RuntimeConfig) -> RuntimeConfig:
    """Return the runtime for planning groups on a node, from the resources that jobs request.

    The submitting machine cannot see the node's GPU. If the node's memory is unknown, one job takes
    all runs of a stream; if they do not fit, the job splits them and trains one part after another.
    """
    memory = r.memory_gib
    if memory is None:
        on_cpu = not s.gpus_per_node and s.gres is None and s.mem_gb is not None
        memory = MEMORY_SHARE * s.mem_gb if on_cpu and s.mem_gb else _ANY_MEMORY_GIB
    ranks = None
    if r.strategy != "single":
        ranks = s.tasks if s.tasks > 1 else r.ranks or s.gpus_per_node
    # tflops is set so that the speed of this machine is not measured: it says nothing about a node.
    return replace(r, device="cpu", memory_gib=memory, tflops=r.tflops or 1.0, ranks=ranks)


def _say_plan(groups: Sequence[Group], active: Sequence[Submitted]) -> None:
    runs = sum(len(group.runs) for group in groups)
    already = sum(len(job.runs) for job in active if job.kind == TRAIN)
    more = f" ({counted(already, 'run')} submitted before)" if already else ""
    say(f"submitting {counted(runs, 'run')} in {counted(len(groups), 'job')}{more}")
    for group in groups:
        say(f"  {group.description}")


def _train(work: Work, group: Group) -> tuple[Task, Submitted]:
    experiments = {r.signature: r.experiment for r in work.experiments}
    signatures = tuple(spec.signature for spec in group.runs)
    task = Train(
        os.getcwd(), tuple(experiments[s] for s in signatures), signatures, work.nodes_runtime
    )
    return task, _entry(TRAIN, runs=signatures)


def _evaluations(work: Work, active: Sequence[Submitted]) -> list[tuple[Task, Submitted]]:
    """Return a task for each source and evaluation, with the runs that need it.

    Runs with a result, or in a queued or running job, are left out.
    """
    submitted = {part for job in active for part in job.parts}
    tasks: list[tuple[Task, Submitted]] = []
    for config in work.evaluations:
        called = f"{config.name}-{digest(config.signed())}"
        groups: dict[str, list[SavedRun]] = {}
        for run in work.evaluated:
            taken = (EVALUATE, called, run.resolved.signature) in submitted
            if not taken and not (run.trained and run.has_result(config)):
                groups.setdefault(run.source, []).append(run)
        for saved in groups.values():
            folders = tuple(str(run.folder.resolve()) for run in saved)
            signatures = tuple(run.resolved.signature for run in saved)
            task = Evaluate(os.getcwd(), folders, config, work.nodes_runtime)
            tasks.append((task, _entry(EVALUATE, runs=signatures, cell=called)))
    return tasks


def _compares(
    work: Work, cells: Sequence[tuple[tuple[str, str], ...]]
) -> list[tuple[Task, Submitted]]:
    here, sweep = os.getcwd(), str(work.sweep.path.resolve())
    return [
        (Compare(here, sweep, axes, work.nodes_runtime), _entry(COMPARE, cell=in_words(axes)))
        for axes in cells
    ]


def _collect(work: Work) -> tuple[Task, Submitted]:
    sweep = str(work.sweep.path.resolve())
    return Collect(os.getcwd(), sweep, compared=work.cells is not None), _entry(COLLECT)


def _entry(kind: str, **more: Any) -> Submitted:
    return Submitted("", kind, datetime.now(UTC).isoformat(timespec="seconds"), **more)


@dataclass(frozen=True)
class _Stage:
    """Submission of the jobs of one kind as an array, with their record."""

    work: Work
    record: Record

    def submit(
        self,
        tasks: Sequence[tuple[Task, Submitted]],
        kind: str,
        after: Sequence[Submitted],
    ) -> list[Submitted]:
        """Submit tasks as an array, and record its jobs.

        Args:
            after: jobs that have to end first, in whatever state.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        first = sorted({job.job.partition("_")[0] for job in after})
        with _unbroken():  # a job without a record would be submitted again
            try:
                executor = self._executor(kind, "afterany:" + ":".join(first) if first else None)
                with executor.batch():
                    made = [executor.submit(task) for task, _ in tasks]
                ids = [str(one.job_id) for one in made]
            except (FailedJobError, FailedSubmissionError, OSError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                last = lines[-1] if lines else error
                raise ReseedError(f"SLURM refuses the job: {last}") from error
            jobs = [replace(entry, job=id_) for id_, (_, entry) in zip(ids, tasks, strict=True)]
            self.record.add(jobs)
        many = f" ({counted(len(jobs), 'task')})" if len(jobs) > 1 else ""
        later = f", after {', '.join(first)}" if first else ""
        say(f"  {kind}: job {ids[0].partition('_')[0]}{many}{later}")
        return jobs

    def _executor(self, kind: str, dependency: str | None) -> AutoExecutor:
        from submitit import AutoExecutor

        settings = self.work.settings
        executor = AutoExecutor(
            self.record.folder, cluster="slurm", slurm_max_num_timeout=settings.max_num_timeout
        )
        name = f"reseed-{kind}-{self.work.sweep.path.name}"
        executor.update_parameters(**settings.submitit(name, dependency, kind == TRAIN))
        return executor


@contextmanager
def _unbroken() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
