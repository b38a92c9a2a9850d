"""Training of missing runs: from resolved experiments to finished runs in the store.

declared (`reseed.experiment`)  →  resolved  →  grouped (`reseed.train.plan`)
         →  calibrated (`reseed.study.calibrate`), trained (`reseed.train.group`)
         →  recorded (`reseed.store.runs`)
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from reseed.distributed.launcher import Processes, open_processes, slurm_tasks
from reseed.distributed.worker import group_message
from reseed.errors import ConfigError, ReseedError
from reseed.experiment.resolve import Resolved
from reseed.store.runs import Run, RunStore
from reseed.study.calibrate import Train, calibrate
from reseed.study.plan import Plan
from reseed.system.console import counted, format_duration, say
from reseed.system.devices import cpus, total_memory
from reseed.system.environment import allow_open_files, record_command
from reseed.system.files import DiskFullError
from reseed.train.config import RuntimeConfig
from reseed.train.group import fit_group
from reseed.train.plan import (
    Cost,
    Group,
    Machine,
    OutOfMemory,
    cost,
    format_bytes,
    make_plan,
    print_start,
)

Failures = Mapping[str, BaseException]
"""Run id → error."""


def train_plan(plan: Plan, train: Callable[[Plan], Failures]) -> list[str]:
    """Train the unfinished runs of a plan, and print how many there are and where they are.

    Args:
        train: trains the unfinished runs, and returns the errors of those that failed. Most of the
            errors are recorded in the runs' folders; one that prevented this is not.

    Returns:
        the lines of `failure_lines`; empty if all runs are finished.

    Raises:
        ConfigError: a folder for the results cannot be written.
    """
    runs = plan.runs
    if plan.multirun:
        _check_writable("runtime.sweeps", plan.runtime.sweeps)
        plan.write()
    for run in runs:
        _, _, damage = run.state(thorough=True)
        if damage:
            say(f"trained again: {damage}")
    unrecorded: Failures = {}
    done = [run for run in runs if run.finished]
    for run in done:
        run.drop_checkpoint()  # left behind if its process was killed after finishing
    if len(done) == len(runs):
        say(f"nothing to train: {counted(len(runs), 'run')} already finished")
    else:
        _check_writable("runtime.outputs", plan.runtime.outputs)
        if done:
            say(f"{len(done)} of {counted(len(runs), 'run')} already finished")
        recorded = {run.id: run.failure for run in runs}
        try:
            with record_command(plan.command):
                failed = train(plan)
        except (KeyboardInterrupt, DiskFullError):
            say(_how_far(runs))
            raise
        unrecorded = {
            run.id: failed[run.id]
            for run in runs
            if run.id in failed and run.failure == recorded[run.id]
        }
    failures = failure_lines([job.resolved for job in plan.jobs], plan.store, unrecorded)
    if not failures:
        whole = f"{counted(len(runs), 'run')} in {plan.runtime.outputs}/"
        say(whole if plan.multirun else str(runs[0].path))
    return failures


def _check_writable(key: str, folder: str) -> None:
    """Raise `ConfigError` unless files can be written into a folder, which is made if missing."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if isinstance(error, FileExistsError):
            reason = "it is a file"
        else:
            reason = error.strerror or str(error)
        raise ConfigError(
            f"{{key}} must be a folder that can be written; got {folder} ({reason})", key
        ) from None


_STATES = {"missing": "not started", "running": "running in another process"}


def _how_far(runs: Sequence[Run]) -> str:
    """Summarise a stopped study: how many runs are finished, interrupted, not started."""
    states = ("finished" if run.finished else run.status for run in runs)
    found = Counter(_STATES.get(state, state) for state in states)
    finished = found.pop("finished", 0)
    others = [f"{count:,} {state}" for state, count in sorted(found.items())]
    return ", ".join([f"{finished:,} of {counted(len(runs), 'run')} finished", *others])


LONGEST_S = 100 * 365 * 86_400.0
"""Estimated seconds from which on a plan is refused: such a budget is a mistake."""


def check_size(experiments: Sequence[Resolved], runtime: RuntimeConfig) -> None:
    """Refuse runs that this machine can never train, before anything is computed or written.

    The bound is all memory of the device, or ``runtime.memory_gib`` if it is larger. Less may be
    free; then the run fails when it trains, since the free memory changes.

    Raises:
        ConfigError: a run needs more memory than the machine has, or more time than `LONGEST_S`.
    """
    store = RunStore(runtime.outputs)
    missing = [r.spec for r in experiments if not r.run(store).finished]
    if not missing:
        return
    machine = Machine.of(runtime)
    there = max(total_memory(machine.device), (runtime.memory_gib or 0) * 2**30)
    for spec in missing:
        own = cost([spec])
        if own.memory > there:
            raise ConfigError(
                f"{spec.label} needs about {format_bytes(own.memory)} of memory "
                f"({spec.num_latents:,} latents of width {spec.d_in:,}, batches of "
                f"{spec.training.batch_size:,} and chunks of {spec.data.config.chunk_tokens:,} "
                f"tokens); the {machine.device.type} of this machine has {format_bytes(there)}. "
                "Lower sae.num_latents, training.batch_size or dataset.chunk_tokens"
            )
        measured = spec.data.config.held_out_tokens * spec.source_flops([spec.hookpoint])
        seconds = machine.seconds(own) + machine.seconds(Cost(measured, 0, 0))
        if seconds > LONGEST_S:
            raise ConfigError(
                f"{spec.label} would take about {format_duration(seconds)}: training.tokens is "
                f"{spec.tokens:,}, and dataset.held_out_tokens is "
                f"{spec.data.config.held_out_tokens:,}"
            )


def train_missing(
    experiments: Sequence[Resolved], runtime: RuntimeConfig
) -> dict[str, BaseException]:
    """Train every experiment that has no finished run; runs on one stream train together.

    With ``runtime=ddp`` or ``runtime=spread``, this process distributes the work over several.

    Returns:
        the error of each failed run, by run id.
    """
    store, machine = RunStore(runtime.outputs), Machine.of(runtime)
    if machine.device.type == "cpu" and slurm_tasks() == 1 and machine.ranks > cpus():
        say(
            f"warning: runtime.ranks={machine.ranks} is more than the {cpus()} CPUs of this "
            "process: the processes will wait for each other"
        )
    missing = [r for r in experiments if not r.run(store).finished]
    plan = make_plan([r.spec for r in missing], machine)
    largest = max((len(group.runs) for group in plan.groups), default=0)
    allow_open_files(largest, f"a group of {largest:,} runs")
    if len(plan.groups) > 1:
        plan.print(finished=len({r.signature for r in experiments}) - plan.num_runs)
    say_data(missing)
    with open_processes(runtime) as processes:
        train = partial(_train_groups, store, runtime, machine, processes)
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
    plan = make_plan([r.spec for r in missing], Machine.of(runtime))
    plan.print(finished=len(distinct) - len(missing))
    say_data(list(distinct))


def say_data(experiments: Sequence[Resolved]) -> None:
    """Print what is known of the data of experiments, once for each data set."""
    for lines in dict.fromkeys(resolved.data.summary for resolved in experiments):
        for line in lines:
            say(line)


def _train_groups(
    store: RunStore,
    runtime: RuntimeConfig,
    machine: Machine,
    processes: Processes,
    experiments: Sequence[Resolved],
) -> dict[str, BaseException]:
    """Train the unfinished runs, group by group.

    Runs that another process has locked come last: by then that process may have finished them. If
    it has not, this process waits for the lock. If a group runs out of memory, its two halves are
    trained separately.
    """
    by_signature = {r.signature: r for r in experiments}
    groups = make_plan([r.spec for r in experiments], machine).groups
    waiting = deque((group, False) for group in groups)
    failures: dict[str, BaseException] = {}
    number = 0
    while waiting:
        group, patient = waiting.popleft()
        specs = {spec.run(store): spec for spec in group.runs}
        with store.locks(list(specs), say if patient else None) as owned:
            others = [spec for run, spec in specs.items() if run not in owned]
            if others:
                waiting.append((Group.of(others), True))
            missing = [spec for run, spec in specs.items() if run in owned and not run.finished]
            if not missing:
                continue
            mine, number = Group.of(missing), number + 1
            if not any(spec.role for spec in missing):  # calibration prints its own messages
                print_start(mine, machine, number, of=number + len(waiting))
            try:
                message = group_message([by_signature[s.signature] for s in missing], runtime)
                failures |= fit_group(missing, store, runtime, processes, message)
            except OutOfMemory as error:
                processes.discard()
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
                processes.discard()
                failures |= {spec.run(store).id: error for spec in missing}
    return failures


def failure_lines(
    experiments: Sequence[Resolved], store: RunStore, unrecorded: Failures | None = None
) -> list[str]:
    """Describe the runs that are not finished; runs of a cell with the same error share a line.

    If the message does not explain the error, further lines give the source line that raised it and
    the path of the traceback.

    Args:
        unrecorded: errors that are not in the records of the runs.
    """
    unrecorded = unrecorded or {}
    alike: dict[tuple[str, ...], dict[str, tuple[Run, int]]] = {}
    for resolved in experiments:
        run = resolved.run(store)
        if not run.finished:
            error, other = run.failure, unrecorded.get(run.id)
            message = error["message"] if error else "not trained"
            message = message if other is None else _described(other)
            cell = resolved.label.removesuffix(f"-seed{resolved.experiment.seed}")
            found = alike.setdefault((run.status, cell, message), {})
            found[run.id] = run, resolved.experiment.seed
    lines = []
    for (status, cell, message), found in alike.items():
        run, _ = next(iter(found.values()))
        seeds = {seed for _, seed in found.values()}
        kind = "seed" if len(seeds) == len(found) else "run"
        who = run.id if len(found) == 1 else f"{cell} ({counted(len(found), kind)})"
        lines.append(f"{status}: {who}: {message}")
        if run.id not in unrecorded and run.failure and not run.failure["explained"]:
            lines += [f"  {line}" for line in _last_frame(run.failure["traceback"])]
            lines.append(f"  the full traceback is in {run.path / 'run.json'}")
    return lines


def _described(error: BaseException) -> str:
    """Return the message of an error, with its type unless the message is for the user."""
    text = str(error).strip()
    return text if isinstance(error, ReseedError) else f"{type(error).__name__}: {text}"


def _last_frame(traceback: str) -> list[str]:
    """Return the file, line and source where the error was raised."""
    lines = [line.strip() for line in traceback.splitlines()]
    files = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not files:
        return []
    last = lines[files[-1] : files[-1] + 2]
    return [last[0], *(f"  {line}" for line in last[1:] if line)]
