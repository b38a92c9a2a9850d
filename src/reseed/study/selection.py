"""Selection of saved SAEs by name: of runs, of the runs of a sweep, and of other SAE folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reseed.errors import ReseedError
from reseed.experiment.resolve import Resolved
from reseed.store.find import find_by_name
from reseed.store.runs import Run
from reseed.store.sweeps import Sweep
from reseed.study.evaluate import SavedRun, saved_run
from reseed.study.plan import Plan
from reseed.system.console import counted
from reseed.train.config import RuntimeConfig


@dataclass(frozen=True)
class Selection:
    """Available SAEs.

    Attributes:
        saved: the finished runs, then the other SAEs.
        lacking: one line for each run that is not finished, with its state.
        sweeps: the sweeps whose tables get the results.
    """

    saved: tuple[SavedRun, ...]
    runtime: RuntimeConfig
    lacking: tuple[str, ...] = ()
    sweeps: tuple[Sweep, ...] = ()

    def check(self) -> None:
        """Raise `ReseedError` if no SAE is available."""
        if not self.saved:
            missing = "; ".join(self.lacking)
            raise ReseedError(f"there is nothing to evaluate: no run is finished ({missing})")

    def unfinished_lines(self) -> list[str]:
        """Return the message lines about runs that are not finished."""
        if not self.lacking:
            return []
        count = counted(len(self.lacking), "run")
        return [f"not evaluated, because not finished: {count}", *(f"  {x}" for x in self.lacking)]


def select_named(
    names: Sequence[str], runtime: RuntimeConfig, declared: Callable[[], Resolved]
) -> Selection:
    """Select the SAEs that names stand for: runs, sweeps with all their runs, and SAE folders.

    Args:
        declared: resolves the experiment of the SAEs that are not runs.

    Raises:
        ReseedError: a name stands for nothing, or the model or data of a run has changed.
    """
    runs: dict[Path, Run] = {}
    saes: list[Path] = []
    sweeps: list[Sweep] = []
    for name in names:
        meant = find_by_name(name, runtime.outputs, runtime.sweeps)
        if isinstance(meant, Sweep):
            sweeps.append(meant)
            runs |= {run.path: run for run in meant.runs()}
        elif isinstance(meant, Run):
            runs[meant.path] = meant
        else:
            saes.append(meant)
    folders = [run.path for run in runs.values() if run.finished]
    saved = [saved_run(folder, runtime, declared) for folder in (*folders, *saes)]
    return Selection(tuple(saved), runtime, _lacking(list(runs.values())), tuple(sweeps))


def select_planned(plan: Plan) -> Selection:
    """Select the finished runs of a plan; of a comparison, its tables get the results."""
    both = [(one.run(plan.store), one) for one in plan.experiments]
    saved = tuple(SavedRun(run.path, one) for run, one in both if run.finished)
    sweeps = () if plan.settings is None else (plan.sweep,)
    return Selection(saved, plan.runtime, _lacking(plan.runs), sweeps)


def _lacking(runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(f"{run.id}: {_state(run)}" for run in runs if not run.finished)


def _state(run: Run) -> str:
    failure = run.failure
    if failure:
        return f"failed ({failure['message']})"
    return run.damage or ("not trained" if run.status == "missing" else run.status)
