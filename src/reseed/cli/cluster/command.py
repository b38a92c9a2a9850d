"""Commands with hydra/launcher=slurm (train, evaluate, compare, run): submit jobs, wait for them,
and print the outcome."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from reseed.cli.cluster.queue import SlurmSettings
from reseed.cli.cluster.states import (
    DONE,
    QueueSnapshot,
    cancel_sweep,
    counts,
    failed_jobs,
    other_jobs,
    states,
)
from reseed.cli.cluster.submit import Work, planning, submit
from reseed.cli.hydra_app import CommandLine
from reseed.cli.print_results import print_result
from reseed.compare.config import ComparisonConfig
from reseed.errors import Interrupted
from reseed.evaluate.base import EvaluationConfig
from reseed.store.sweeps import Sweep
from reseed.study.compare import is_complete
from reseed.study.evaluate import SavedRun
from reseed.study.plan import Plan
from reseed.study.result import cells_of, collect
from reseed.study.train import failure_lines, say_data
from reseed.system.console import counted, say
from reseed.train.config import RuntimeConfig
from reseed.train.plan import Machine, make_plan

_SPEAK_S = 30.0


def run_on_cluster(
    line: CommandLine,
    plan: Plan,
    evaluations: Sequence[EvaluationConfig] = (),
    trains: bool = True,
) -> int:
    """Submit all work that is neither done nor submitted, and wait for it unless wait=false.

    Args:
        plan: the runs of the sweep, whose manifest is written already, and their comparison.
        evaluations: evaluations of every run after its training.
        trains: train the missing runs.

    Returns:
        the exit status: 1 if a run failed or could not be evaluated, or a cell is incomplete.
    """
    sweep, runtime = plan.sweep, plan.runtime
    cells, complete = None, set()
    if plan.settings is not None:
        cells = _cells(sweep, plan.settings)
        complete = _complete(sweep, plan.settings, cells)
    experiments = tuple(plan.experiments)
    work = Work(
        sweep, experiments, runtime, _settings(line, runtime), cells, trains,
        tuple(evaluations), tuple(SavedRun(r.run(plan.store).path, r) for r in experiments),
    )  # fmt: skip
    waited = _carried_out(work, complete)
    return 0 if waited is None else _ended(plan, waited)


def evaluate_on_cluster(
    line: CommandLine,
    runtime: RuntimeConfig,
    sweep: Sweep,
    saved: Sequence[SavedRun],
    evaluations: Sequence[EvaluationConfig],
) -> int | None:
    """Submit the evaluations of a sweep's runs that have neither a result nor a job.

    Returns:
        the exit status, 1 if a result is missing; None if the command did not wait.
    """
    work = Work(
        sweep, (), runtime, _settings(line, runtime), None, False,
        tuple(evaluations), tuple(saved),
    )  # fmt: skip
    if _carried_out(work, set()) is None:
        return None
    for message in failed_jobs(QueueSnapshot.now(sweep)):
        say(message)
    lacking = [t for t in saved for config in evaluations if not t.has_result(config)]
    return 1 if lacking else 0


def _settings(line: CommandLine, runtime: RuntimeConfig) -> SlurmSettings:
    settings = SlurmSettings.of(line.launcher[1])
    settings.check(runtime.strategy)
    return settings


def _carried_out(work: Work, complete: set[tuple[tuple[str, str], ...]]) -> bool | None:
    """Submit the work, and wait for it unless wait=false.

    Returns:
        True if there were jobs, and they have ended; False if there were none; None if the command
        does not wait for them.
    """
    sweep = work.sweep
    try:
        active = submit(work, complete)
    except KeyboardInterrupt as stop:
        raise _stopped(stop, sweep) from None
    if active and not work.runtime.wait:
        say(
            f"submitted; `reseed status {sweep.path}` shows the progress (--watch), `reseed cancel "
            f"{sweep.path}` cancels the jobs, the same command with wait=true waits for them"
        )
        return None
    if active:
        say(
            f"waiting for {counted(len(active), 'job')}; Ctrl-C cancels them (with wait=false the "
            "command does not wait)"
        )
        try:
            _follow(sweep, work.settings.poll_s)
        except KeyboardInterrupt as stop:
            raise _stopped(stop, sweep) from None
    return bool(active)


def show_cluster_plan(line: CommandLine, plan: Plan) -> None:
    """Print the jobs that would be submitted."""
    runtime = plan.runtime
    settings = _settings(line, runtime)
    distinct = plan.experiments
    missing = [r for r in distinct if not r.run(plan.store).finished]
    groups = make_plan([r.spec for r in missing], Machine.of(planning(settings, runtime)))
    if runtime.tflops is not None or not missing:  # without tflops, times on a node are unknown
        groups.print(finished=len(distinct) - len(missing))
        say_data(missing)
        return
    finished = len(distinct) - len(missing)
    done = f" ({finished:,} more already finished)" if finished else ""
    jobs_told = f"{counted(len(missing), 'run')} in {counted(len(groups.groups), 'job')}"
    say(f"plan: {jobs_told}{done}; set runtime.tflops to estimate the hours")
    for group in groups.groups:
        say(f"  {group.description}")
    say_data(missing)


def _follow(sweep: Sweep, poll_s: float) -> None:
    """Print the progress until no job of the sweep is queued or running."""
    said, spoken = "", time.monotonic()
    while True:
        seen = QueueSnapshot.now(sweep)
        told = "; ".join([counts(states(sweep, seen)), *other_jobs(seen)])
        if seen.trouble:  # keep waiting: the controller may be restarting
            told = f"{told} ({seen.trouble})"
        rough = told.partition("%")[0].rpartition(",")[0] if "%" in told else told
        if rough != said or time.monotonic() - spoken > _SPEAK_S:
            say(f"  {told}")
            said, spoken = rough, time.monotonic()
        if seen.queue is not None and not seen.active:
            return
        time.sleep(poll_s)


def _stopped(stop: KeyboardInterrupt, sweep: Sweep) -> Interrupted:
    """Cancel the jobs after Ctrl-C (not after other signals), and return the exception to raise."""
    number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
    if number != signal.SIGINT:  # for example, when the user is logged out
        return Interrupted(
            f"stopped by {signal.Signals(number).name}; the jobs continue: see `reseed status "
            f"{sweep.path}`",
            number,
        )
    ids = cancel_sweep(sweep)
    return Interrupted(
        f"interrupted; cancelled {counted(len(ids), 'job')}. Saved results are kept, and the same "
        "command goes on",
        number,
    )


def _cells(sweep: Sweep, comparison: ComparisonConfig) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(tuple(axes.items()) for axes in cells_of(sweep, comparison))


def _complete(
    sweep: Sweep, comparison: ComparisonConfig, cells: Sequence[tuple[tuple[str, str], ...]]
) -> set[tuple[tuple[str, str], ...]]:
    found = set()
    for cell in cells:
        axes = dict(cell)
        if is_complete(sweep, axes, comparison.of_arm(axes.get("arm", ""))):
            found.add(cell)
    return found


def _ended(plan: Plan, waited: bool) -> int:
    """Print the failures and the tables, and return the exit status."""
    sweep = plan.sweep
    seen = QueueSnapshot.now(sweep)
    lacking = [state for state in states(sweep, seen) if state.state != DONE]
    recorded = {run.id for run in sweep.runs() if run.failure}
    failed = [r for r in plan.experiments if r.run(plan.store).id in recorded]
    for message in failure_lines(failed, plan.store):
        say(message)
    for state in lacking:
        if state.id not in recorded:
            say(f"{state.state}: {state.id}{': ' if state.note else ''}{state.note}")
    if plan.settings is None:
        if not lacking:
            said = "" if waited else "nothing to train: "
            say(f"{said}{counted(len(sweep.runs()), 'run')} in {plan.runtime.outputs}/")
        return 1 if lacking else 0
    not_done = failed_jobs(seen)
    for message in not_done:
        say(message)
    result = collect(sweep, plan.settings)
    print_result(result)
    return 0 if result.complete and not lacking and not not_done else 1
