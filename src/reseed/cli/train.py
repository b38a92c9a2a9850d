"""``reseed train``: train one SAE, or with -m a sweep. Finished runs are not trained again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from reseed.cli import tune
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine, override
from reseed.cli.plan import Job, check_jobs
from reseed.errors import ReseedError
from reseed.experiment.resolve import resolved_from
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.system.console import counted, say
from reseed.system.files import DiskFullError
from reseed.train.config import RuntimeConfig


def task(config: DictConfig) -> None:
    """Train one run in this process: the Hydra job."""
    (outcome,) = train_many([config])
    if isinstance(outcome, Exception):
        raise outcome


def train_many(configs: Sequence[DictConfig]) -> list[Any]:
    """Train several runs; runs that read the same activations are trained together.

    Returns:
        for each configuration the run's folder, or the exception with which the run failed.
    """
    from reseed.study.train import train_missing

    plain = [OmegaConf.to_container(config, resolve=True) for config in configs]
    pairs = [resolved_from(values) for values in plain]  # type: ignore[arg-type]
    runtime = pairs[0][1]
    failures = train_missing([resolved for resolved, _ in pairs], runtime)
    runs = [resolved.run(RunStore(runtime.outputs)) for resolved, _ in pairs]
    return [failures.get(run.id, str(run.path)) for run in runs]


task.many = train_many  # type: ignore[attr-defined]  # called by the fused launcher


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(CommandLine("train", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    if tune.searches(line):
        return tune.tune(line, trial)
    jobs, runtime = check_jobs(line, line.overrides, line.multirun)
    if runtime.plan_only:
        show_plan(line, jobs, runtime)
        return 0
    together = line.multirun or line.launcher[0] == SLURM
    sweep = sweep_of(jobs, runtime) if together else None
    return train_jobs(line, [(line.overrides, jobs)], runtime, sweep)


def sweep_of(jobs: Sequence[Job], runtime: RuntimeConfig) -> Sweep:
    """Write the manifest of a sweep that is trained and not compared, and return the sweep."""
    sweep = Sweep.of(runtime.sweeps, "train", [job.resolved.signature for job in jobs])
    sweep.write_manifest(jobs, RunStore(runtime.outputs))
    return sweep


def trial(overrides: Sequence[str], names: Sequence[str]) -> list[float]:
    """Train the runs that the overrides declare, and return the means of the named metrics.

    Raises:
        ReseedError: a run failed.
    """
    line = CommandLine("train", ["-m", *overrides])
    jobs, runtime = check_jobs(line, line.overrides, multirun=True)
    if train_jobs(line, [(line.overrides, jobs)], runtime, sweep_of(jobs, runtime)):
        raise ReseedError("a run of this trial failed, so the search stops")
    store = RunStore(runtime.outputs)
    return tune.of_runs([job.resolved.run(store).metrics for job in jobs], names)


def show_plan(line: CommandLine, jobs: Sequence[Job], runtime: RuntimeConfig) -> None:
    """Print the runs that would be trained or, with hydra/launcher=slurm, submitted."""
    from reseed.cli.cluster.command import show_cluster_plan
    from reseed.study.train import plan_missing

    if line.launcher[0] == SLURM:
        show_cluster_plan(line, jobs, runtime)
    else:
        plan_missing([job.resolved for job in jobs], runtime)


def train_jobs(
    line: CommandLine,
    launches: Sequence[tuple[Sequence[str], Sequence[Job]]],
    runtime: RuntimeConfig,
    sweep: Sweep | None,
) -> int:
    """Launch the training of checked jobs, and print the outcome.

    Args:
        launches: pairs of Hydra's overrides and the checked jobs that they expand to, launched one
            after the other. A run that is in several launches is trained once.
        sweep: the folder of the sweep, or None for a single run.

    Returns:
        the exit status: 1 if a run failed.
    """
    from reseed.cli.cluster.command import run_on_cluster
    from reseed.study.train import failure_lines

    if sweep is not None and line.launcher[0] == SLURM:
        return run_on_cluster(line, [job for _, jobs in launches for job in jobs], runtime, sweep)
    store = RunStore(runtime.outputs)
    every = [job for _, jobs in launches for job in jobs]
    runs = {job.resolved.signature: job.resolved.run(store) for job in every}
    done = [run for run in runs.values() if run.finished]
    for run in done:
        run.drop_checkpoint()  # left behind if its process was killed after finishing
    if len(done) == len(runs):
        say(f"nothing to train: {counted(len(runs), 'run')} already finished")
    else:
        if done:
            say(f"{len(done)} of {counted(len(runs), 'run')} already finished")
        own = [override("hydra.sweep.dir", sweep.path)] if sweep else []
        before = {run.id: run.failure for run in runs.values()}
        for overrides, jobs in launches:
            if all(runs[job.resolved.signature].finished for job in jobs):
                continue
            try:
                errors = line.launch(task, [*overrides, *own], multirun=sweep is not None)
                if full := [error for error in errors if isinstance(error, DiskFullError)]:
                    raise full[0]
            except (KeyboardInterrupt, DiskFullError):
                say(_how_far(list(runs.values())))
                raise
            except Exception:
                # Failed runs have recorded their errors, which are printed below.
                if before == {run.id: run.failure for run in runs.values()}:
                    raise
    failed = [run for run in runs.values() if not run.finished]
    for message in failure_lines([job.resolved for job in every], store):
        say(message)
    if not failed:
        say(
            f"{counted(len(runs), 'run')} in {runtime.outputs}/"
            if sweep
            else str(next(iter(runs.values())).path)
        )
    return 1 if failed else 0


_STATES = {"missing": "not started", "running": "running in another process"}


def _how_far(runs: Sequence[Run]) -> str:
    """Summarise a stopped command: how many runs are finished, interrupted, not started."""
    found = Counter(_STATES.get(run.status, run.status) for run in runs)
    finished = found.pop("finished", 0)
    others = [f"{count:,} {state}" for state, count in sorted(found.items())]
    return ", ".join([f"{finished:,} of {counted(len(runs), 'run')} finished", *others])
