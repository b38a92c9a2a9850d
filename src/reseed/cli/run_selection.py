"""Choice of the runs that a command evaluates: named runs, sweeps and folders, or declared runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.hydra_app import CommandLine
from reseed.cli.names import check_used, find_by_name, runtime_of
from reseed.cli.plan import Plan, check_jobs, make_plan
from reseed.errors import ReseedError
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.system.console import counted
from reseed.train.config import RuntimeConfig


@dataclass(frozen=True)
class SelectedRuns:
    """The SAEs that a command line chooses.

    Attributes:
        folders: the folders of the available SAEs.
        lacking: one line for each run that is not finished, with its state.
        sweeps: the sweeps whose tables get the results.
    """

    runtime: RuntimeConfig
    folders: tuple[Path, ...]
    lacking: tuple[str, ...] = ()
    sweeps: tuple[Sweep, ...] = field(default=())

    @property
    def are_runs(self) -> bool:
        """True if every folder is a run, whose record says what it was trained on."""
        return all(Run(folder).exists for folder in self.folders)


def select_runs(words: Sequence[str], line: CommandLine) -> SelectedRuns:
    """Find the SAEs that a command line names.

    Args:
        words: folders and names; if empty, the overrides of ``line`` declare the runs.

    Raises:
        ReseedError: no SAE is available, or a word names nothing.
    """
    if words:
        found = _named(words, line)
    elif any(o.partition("=")[0] == "comparison" for o in line.overrides):
        found = _of_comparison(line)
    else:
        found = _declared(line)
    if not found.folders:
        missing = "; ".join(found.lacking)
        raise ReseedError(f"there is nothing to evaluate: no run is finished ({missing})")
    return found


def _of_comparison(line: CommandLine) -> SelectedRuns:
    plan = make_plan(line)
    found = select_comparison_runs(plan)
    if found.folders:
        plan.write()
    return found


def select_comparison_runs(plan: Plan) -> SelectedRuns:
    """Return the finished runs of a comparison."""
    return replace(_finished(plan.runs, plan.runtime), sweeps=(plan.sweep,))


def _declared(line: CommandLine) -> SelectedRuns:
    jobs, runtime = check_jobs(line, line.overrides, multirun=True)
    runs = {job.resolved.signature: job.resolved.run(RunStore(runtime.outputs)) for job in jobs}
    return _finished(list(runs.values()), runtime)


def _named(words: Sequence[str], line: CommandLine) -> SelectedRuns:
    runtime = runtime_of(line)
    runs: dict[Path, Run] = {}
    saes: list[Path] = []
    sweeps: list[Sweep] = []
    for word in words:
        meant = find_by_name(word, runtime)
        if isinstance(meant, Sweep):
            sweeps.append(meant)
            runs |= {run.path: run for run in meant.runs()}
        elif isinstance(meant, Run):
            runs[meant.path] = meant
        else:
            saes.append(meant)
    found = _finished(list(runs.values()), runtime)
    if not saes:
        check_used(line, ("wait",) if line.launcher[0] == SLURM else ())
    return replace(found, folders=(*found.folders, *saes), sweeps=tuple(sweeps))


def _finished(runs: Sequence[Run], runtime: RuntimeConfig) -> SelectedRuns:
    lacking = tuple(f"{run.id}: {_state(run)}" for run in runs if not run.finished)
    return SelectedRuns(runtime, tuple(run.path for run in runs if run.finished), lacking)


def _state(run: Run) -> str:
    words = {"missing": "not trained"}
    failure = run.failure
    return f"failed ({failure['message']})" if failure else words.get(run.status, run.status)


def unfinished_lines(lacking: Sequence[str]) -> list[str]:
    """Return the message lines about runs that are not finished."""
    if not lacking:
        return []
    return [
        f"not evaluated, as not finished: {counted(len(lacking), 'run')}",
        *(f"  {x}" for x in lacking),
    ]
