"""Training of missing runs: experiments in, finished runs in the store.

declared  →  resolved (`reseed.experiment.resolve`)  →  grouped (`reseed.train.plan`)  →
calibrated, trained (`reseed.study.calibrate`, `reseed.train.group`)  →  recorded (`reseed.store.runs`)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from reseed.distributed.launcher import Processes, open_processes
from reseed.experiment.resolve import Resolved
from reseed.store.runs import RunStore
from reseed.study.calibrate import Train, calibrate
from reseed.system.console import say
from reseed.system.files import DiskFullError
from reseed.train.config import RuntimeConfig
from reseed.train.plan import Group, Machine, OutOfMemory, make_plan, print_start


def train_missing(
    experiments: Sequence[Resolved], runtime: RuntimeConfig
) -> dict[str, BaseException]:
    """Train every experiment that has no finished run; runs on one stream train together.

    With ``runtime=ddp`` or ``spread`` this process leads a team of processes.

    Returns:
        the error of each failed run, by run id.
    """
    store, machine = RunStore(runtime.outputs), Machine.of(runtime)
    missing = [r for r in experiments if not r.run(store).finished]
    plan = make_plan(missing, machine)
    if len(plan.groups) > 1:
        plan.say(finished=len({r.signature for r in experiments}) - plan.runs)
    with open_processes(runtime) as team:
        train = partial(_train_groups, store, runtime, machine, team)
        return _calibrate_and_train(missing, store, train)


def _calibrate_and_train(
    missing: Sequence[Resolved], store: RunStore, train: Train
) -> dict[str, BaseException]:
    # Only missing runs are calibrated; finished runs have their penalty weight in the record.
    ready, failures = calibrate(missing, store, train)
    failed = {run: r for r in missing if (run := r.run(store)).id in failures}
    for run, resolved in failed.items():
        with run.lock(waiting=say):
            if run.finished:  # another process trained it meanwhile
                del failures[run.id]
            else:
                run.begin(resolved.record())
                run.fail(failures[run.id])
    return failures | train(ready)


def plan_missing(experiments: Sequence[Resolved], runtime: RuntimeConfig) -> None:
    """Print the plan of `train_missing` without training."""
    store = RunStore(runtime.outputs)
    distinct = {r.signature: r for r in experiments}.values()
    missing = [r for r in distinct if not r.run(store).finished]
    make_plan(missing, Machine.of(runtime)).say(finished=len(distinct) - len(missing))


def _train_groups(
    store: RunStore,
    runtime: RuntimeConfig,
    machine: Machine,
    team: Processes,
    experiments: Sequence[Resolved],
) -> dict[str, BaseException]:
    """Train the unfinished runs, group by group.

    Runs locked by another process come last, when that process may have finished them; only then
    this one waits for the lock. A group that runs out of memory is retried in halves.
    """
    from reseed.distributed.worker import GroupMessage, RunMessage
    from reseed.train.group import fit_group

    groups = make_plan(experiments, machine).groups
    waiting = deque((group, False) for group in groups)
    failures: dict[str, BaseException] = {}
    number = 0
    while waiting:
        group, patient = waiting.popleft()
        members = {r.run(store): r for r in group.members}
        with store.locks(list(members), say if patient else None) as owned:
            others = [r for run, r in members.items() if run not in owned]
            if others:
                waiting.append((Group.of(others), True))
            missing = [r for run, r in members.items() if run in owned and not run.finished]
            if not missing:
                continue
            mine, number = Group.of(missing), number + 1
            if not any(r.role for r in missing):  # calibration prints its own messages
                print_start(mine, machine, number, of=number + len(waiting))
            try:
                order = GroupMessage(tuple(RunMessage.of(r) for r in missing), runtime)
                failures |= fit_group(missing, store, runtime, team, order)
            except OutOfMemory as error:
                team.broken()
                if len(missing) > 1:
                    say(f"  {error}: retrying with half of the runs")
                    waiting.extendleft((half, True) for half in reversed(mine.halves()))
                else:
                    run = missing[0].run(store)
                    run.fail(error)
                    failures[run.id] = error
            except DiskFullError:  # the next group would fail too
                raise
            except Exception as error:  # recorded in each run's folder; other groups continue
                team.broken()
                failures |= {r.run(store).id: error for r in missing}
    return failures
