"""State of every run of a sweep, from its folder, the record of jobs, and SLURM's queue.

`print_sweep` and `watch` show it: ``reseed status SWEEP``, once or repeatedly. `cancel_sweep`
cancels the jobs.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reseed.cli.cluster.queue import (
    COLLECT,
    COMPARE,
    EVALUATE,
    TRAIN,
    InQueue,
    QueueError,
    Record,
    Submitted,
    cancel,
    last_states,
    queue,
    there_is_slurm,
)
from reseed.store.runs import PROGRESS_FILE, Run
from reseed.store.sweeps import Sweep
from reseed.system.console import console, print_rows, say

QUEUED, STARTING, RUNNING, DONE, FAILED = "queued", "starting", "running", "done", "failed"
_PLAIN = {"missing": "not started"}
_WAITS = {"BeginTime": "requeued", "Dependency": "after other jobs"}
_TAIL = 4_096
_SRUN = "Exited with exit code|Force Terminated|_step_signal: Terminating|Job step aborted"
_OTHERS = {EVALUATE: "evaluations", COMPARE: "comparisons", COLLECT: "tables"}
_NOT_DONE = {EVALUATE: "not evaluated: ", COMPARE: "not compared: ", COLLECT: "tables"}


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        id: the name of the run's folder.
        state: queued, starting, running, done, failed, cancelled, interrupted, damaged, not
            started.
        note: the reason why the run waits, or failed, or is damaged; may be empty.
        tokens, of: number of tokens trained so far, and the budget, if known.
        rate: tokens per second, while the run is training.
        traceback: traceback of an error whose message does not explain it; else empty.
    """

    id: str
    state: str
    note: str = ""
    tokens: int | None = None
    of: int | None = None
    rate: float | None = None
    traceback: str = ""


@dataclass(frozen=True)
class QueueSnapshot:
    """Snapshot of a sweep's jobs in SLURM.

    Attributes:
        queue: queued and running jobs; None if SLURM could not be asked.
        ended: final states of the sweep's other jobs, as far as they are known.
        trouble: the reason why SLURM could not be asked.
    """

    record: Record
    queue: Mapping[str, InQueue] | None
    ended: Mapping[str, str]
    trouble: str = ""

    @classmethod
    def now(cls, sweep: Sweep) -> QueueSnapshot:
        """Ask SLURM, if the sweep has jobs."""
        record = Record(sweep.path)
        jobs = record.jobs
        if not jobs:
            return cls(record, {}, {})
        if not there_is_slurm():
            return cls(record, None, {}, "there is no `squeue` here")
        try:
            found = queue()
        except QueueError as error:
            return cls(record, None, {}, str(error))
        # Only the last job for each work item matters; earlier ones were submitted again.
        last = {part: job.job for job in jobs for part in job.parts}
        return cls(record, found, last_states(job for job in last.values() if job not in found))

    @property
    def active(self) -> list[Submitted]:
        """The sweep's queued and running jobs."""
        return self.record.active(self.queue or {})


def states(sweep: Sweep, seen: QueueSnapshot) -> list[RunState]:
    """Return the states of the distinct runs of a sweep, in the order of its manifest."""
    jobs = [job for job in seen.record.jobs if job.kind == TRAIN]
    runs = {run.path: run for run in sweep.runs()}
    return [
        _state(run, [j for j in jobs if run.signature in j.runs], seen) for run in runs.values()
    ]


def _state(run: Run, jobs: list[Submitted], seen: QueueSnapshot) -> RunState:
    status, _, damage = run.state()
    last = jobs[-1] if jobs else None
    waits = (seen.queue or {}).get(last.job) if last else None
    tokens, of, rate = _progress(run)
    if status == "damaged":
        return RunState(run.id, status, damage)
    if run.finished:
        return RunState(run.id, DONE, tokens=of, of=of)
    failure = run.failure
    if failure is not None and (waits is None or last is None or failure["ended"] >= last.at):
        where = "" if failure["explained"] else failure["traceback"]
        return RunState(run.id, FAILED, _said(failure), tokens, of, traceback=where)
    if status == "running":
        return RunState(run.id, RUNNING, "", tokens, of, rate)
    if last is None:
        return RunState(run.id, _PLAIN.get(status, status), "", tokens, of)
    if waits is not None:
        if waits.running:
            # Another machine's lock may be invisible here, but the record says "running".
            begun = status == "interrupted" and run.record["status"] == "running"
            return RunState(run.id, RUNNING if begun else STARTING, "", tokens, of, rate)
        return RunState(run.id, QUEUED, _WAITS.get(waits.reason, waits.reason), tokens, of)
    if seen.queue is None:
        return RunState(run.id, "submitted", f"job {last.job}", tokens, of)
    if last.cancelled:
        return RunState(run.id, "cancelled", "", tokens, of)
    ended = seen.ended.get(last.job, "")
    if ended == "COMPLETED":  # the run was removed after its job ended
        return RunState(run.id, _PLAIN.get(status, status), "", tokens, of)
    return RunState(run.id, FAILED, ended_message(last, seen), tokens, of)


def ended_message(job: Submitted, seen: QueueSnapshot) -> str:
    """Return the message about a job that ended without doing its work."""
    log = seen.record.log(job)
    state = seen.ended.get(job.job, "")
    told = f"its job {job.job} is gone" + (f" ({state.lower().replace('_', ' ')})" if state else "")
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return told
    # srun's last lines say nothing about the cause.
    line = last_line(re.sub(rf"(?m)^srun: .*({_SRUN}).*$", "", text))
    return f"{told}; {log} ends: {line}" if line else told


def other_jobs(seen: QueueSnapshot) -> list[str]:
    """Return a line for each kind of job, except training, of which jobs are queued or running."""
    told = []
    for kind, what in _OTHERS.items():
        jobs = [job for job in seen.active if job.kind == kind]
        running = sum((seen.queue or {})[job.job].running for job in jobs)
        numbers = {"running": running, "queued": len(jobs) - running}
        parts = [f"{number} {word}" for word, number in numbers.items() if number]
        if parts:
            told.append(f"{what}: {', '.join(parts)}")
    return told


def failed_jobs(seen: QueueSnapshot) -> list[str]:
    """Return a line for each failed job that evaluates, compares, or makes the tables.

    A job that was submitted again is left out.
    """
    last = {part: job for job in seen.record.jobs if job.kind != TRAIN for part in job.parts}
    told = []
    for job in dict.fromkeys(last.values()):
        state = seen.ended.get(job.job, "COMPLETED")
        if job.cancelled or state in ("COMPLETED", "CANCELLED") or job in seen.active:
            continue
        told.append(f"{_NOT_DONE[job.kind]}{job.cell}: {ended_message(job, seen)}")
    return told


def last_line(text: str) -> str:
    """Return the last line that is not blank, or ""."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _said(failure: Mapping[str, Any]) -> str:
    """Return the last line of an error, with its type unless the message explains the error."""
    line = last_line(failure["message"])
    return line if failure["explained"] else f"{failure['type']}: {line}"


def _progress(run: Run) -> tuple[int | None, int | None, float | None]:
    """Return the number of tokens trained so far, the budget, and the tokens per second."""
    of = run.record.get("tokens") if run.status not in ("missing", "damaged") else None
    try:
        found = json.loads((run.path / PROGRESS_FILE).read_text(encoding="utf-8"))
        return int(found["tokens"]), of, float(found["tokens_per_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, of, None


def counts(found: list[RunState]) -> str:
    """Summarise states as ``1 running, 2 queued, 3 done, 45% of the tokens``."""
    order = (RUNNING, STARTING, QUEUED, DONE, FAILED)
    number = Counter(state.state for state in found)
    listed = sorted(number, key=lambda s: (order.index(s) if s in order else len(order), s))
    told = [f"{number[state]:,} {state}" for state in listed]
    budget = sum(state.of or 0 for state in found)
    if number[RUNNING] and budget and all(state.of for state in found):
        told.append(f"{sum(state.tokens or 0 for state in found) / budget:.0%} of the tokens")
    return ", ".join(told)


COLUMNS = ("run", "state", "tokens", "of", "%", "tokens/s")
WATCH_S = 5.0
_ON = ("running", "starting", "queued", "submitted")


def print_sweep(sweep: Sweep) -> bool:
    """Print every run of a sweep, and the state of its other jobs.

    Returns:
        True if a job or run is queued or running.
    """
    seen = QueueSnapshot.now(sweep)
    found = states(sweep, seen)
    title = f"{sweep.path}/: {counts(found)}"
    print_rows([_row(state) for state in found], title, COLUMNS, ("run", "state"))
    for state in found:
        if state.state == FAILED:
            say(f"  {state.id}: {state.note}")
    for traceback in dict.fromkeys(state.traceback for state in found if state.traceback):
        say("\n".join(f"    {line}" for line in traceback.splitlines()))
    for line in (*other_jobs(seen), *failed_jobs(seen)):
        say(f"  {line}")
    if seen.trouble:
        say(f"  SLURM was not asked: {seen.trouble}")
    return bool(seen.active) or any(state.state in _ON for state in found)


def watch(sweep: Sweep, every_s: float = WATCH_S) -> None:
    """Print a sweep repeatedly until nothing is queued or running; clear a terminal each time."""
    while True:
        if console().is_terminal:
            console().clear()
        if not print_sweep(sweep):
            return
        time.sleep(every_s)


def _row(state: RunState) -> tuple[str, ...]:
    """Return the entries of `COLUMNS`; empty if unknown."""
    waits = f" ({state.note})" if state.note and state.state in ("queued", "submitted") else ""
    share = f"{state.tokens / state.of:.0%}" if state.tokens is not None and state.of else ""
    tokens = "" if state.tokens is None else f"{state.tokens:,}"
    of = "" if state.of is None else f"{state.of:,}"
    rate = "" if state.rate is None else f"{state.rate:,.0f}"
    return state.id, state.state + waits, tokens, of, share, rate


def cancel_sweep(sweep: Sweep) -> list[str]:
    """Cancel every queued or running job of a sweep, and return their ids.

    Raises:
        QueueError: SLURM does not answer.
    """
    record = Record(sweep.path)
    if not record.path.is_file():
        return []
    with record.lock():
        seen = QueueSnapshot.now(sweep)
        if seen.queue is None:
            raise QueueError(f"nothing was cancelled: {seen.trouble}")
        ids = [job.job for job in seen.active]
        record.mark_cancelled(ids)
        cancel(reversed(ids))  # dependent jobs first, so that none starts when its dependency ends
    return ids
