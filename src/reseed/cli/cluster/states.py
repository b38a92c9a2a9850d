"""What became of every run of a sweep: from its folders, its list of jobs, and SLURM's queue."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reseed.cli.cluster.queue import InQueue, QueueError, last_states, queue, there_is_slurm
from reseed.cli.cluster.record import COLLECT, COMPARE, EVALUATE, TRAIN, Record, Submitted
from reseed.cli.names import begun_by
from reseed.runs import PROGRESS_FILE, Run
from reseed.sweeps import Sweep

QUEUED, STARTING, RUNNING, DONE, FAILED = "queued", "starting", "running", "done", "failed"
_PLAIN = {"missing": "not started"}
_WAITS = {"BeginTime": "requeued", "Dependency": "after other jobs"}
_TAIL = 4_096
_SRUN = "Exited with exit code|Force Terminated|_step_signal: Terminating|Job step aborted"
_OTHERS = {EVALUATE: "evaluations", COMPARE: "comparisons", COLLECT: "tables"}
_NOT_DONE = {EVALUATE: "not evaluated: ", COMPARE: "not compared: ", COLLECT: "tables"}


@dataclass(frozen=True)
class RunState:
    """One run.

    Attributes:
        id: its folder's name.
        state: queued, starting, running, done, failed, cancelled, interrupted, not started.
        note: why it waits or failed; may be empty.
        tokens, of: how far it is, and its budget, where that is known.
        rate: tokens per second, while it runs.
        traceback: of an error that does not say all.
    """

    id: str
    state: str
    note: str = ""
    tokens: int | None = None
    of: int | None = None
    rate: float | None = None
    traceback: str = ""


@dataclass(frozen=True)
class Seen:
    """SLURM's side of a sweep at one moment.

    Attributes:
        queue: jobs that wait or run; None where SLURM could not be asked.
        ended: how the sweep's other jobs ended, as far as that is known.
        trouble: why SLURM could not be asked.
    """

    record: Record
    queue: Mapping[str, InQueue] | None
    ended: Mapping[str, str]
    trouble: str = ""

    @classmethod
    def now(cls, sweep: Sweep) -> Seen:
        """Ask, where there is anything to ask about."""
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
        # Of jobs that were submitted again nobody wants to know.
        last = {part: job.job for job in jobs for part in job.parts}
        return cls(record, found, last_states(job for job in last.values() if job not in found))

    @property
    def active(self) -> list[Submitted]:
        """Jobs that wait or run."""
        return self.record.active(self.queue or {})


def states(sweep: Sweep, seen: Seen) -> list[RunState]:
    """The distinct runs of a sweep, in the order of its manifest."""
    jobs = [job for job in seen.record.jobs if job.kind == TRAIN]
    runs = {run.path: run for run in sweep.runs()}
    return [
        _state(run, [j for j in jobs if run.signature in j.runs], seen) for run in runs.values()
    ]


def _state(run: Run, jobs: list[Submitted], seen: Seen) -> RunState:
    status = run.status
    last = jobs[-1] if jobs else None
    waits = (seen.queue or {}).get(last.job) if last else None
    tokens, of, rate = _progress(run)
    if status == "finished":
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
            # Where locks of another machine are not seen, the record still says it.
            begun = status == "interrupted" and run.record["status"] == "running"
            return RunState(run.id, RUNNING if begun else STARTING, "", tokens, of, rate)
        return RunState(run.id, QUEUED, _WAITS.get(waits.reason, waits.reason), tokens, of)
    if seen.queue is None:
        return RunState(run.id, "submitted", f"job {last.job}", tokens, of)
    if last.cancelled:
        return RunState(run.id, "cancelled", "", tokens, of)
    ended = seen.ended.get(last.job, "")
    if ended == "COMPLETED":  # what it made was removed since
        return RunState(run.id, _PLAIN.get(status, status), "", tokens, of)
    return RunState(run.id, FAILED, gone(last, seen), tokens, of)


def gone(job: Submitted, seen: Seen) -> str:
    """What to say of a job that is over and did not do what it should."""
    log = seen.record.log(job)
    state = seen.ended.get(job.job, "")
    told = f"its job {job.job} is gone" + (f" ({state.lower().replace('_', ' ')})" if state else "")
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return told
    # What srun says at last says nothing.
    line = last_line(re.sub(rf"(?m)^srun: .*({_SRUN}).*$", "", text))
    return f"{told}; {log} ends: {line}" if line else told


def other_jobs(seen: Seen) -> list[str]:
    """Jobs in the queue that train nothing."""
    told = []
    for kind, what in _OTHERS.items():
        jobs = [job for job in seen.active if job.kind == kind]
        running = sum((seen.queue or {})[job.job].running for job in jobs)
        numbers = {"running": running, "queued": len(jobs) - running}
        parts = [f"{number} {word}" for word, number in numbers.items() if number]
        if parts:
            told.append(f"{what}: {', '.join(parts)}")
    return told


def failed_jobs(seen: Seen) -> list[str]:
    """A line for each job that evaluates, compares, or makes the tables, and did not; the last of
    its kind."""
    last = {part: job for job in seen.record.jobs if job.kind != TRAIN for part in job.parts}
    told = []
    for job in dict.fromkeys(last.values()):
        state = seen.ended.get(job.job, "COMPLETED")
        if job.cancelled or state in ("COMPLETED", "CANCELLED") or job in seen.active:
            continue
        told.append(f"{_NOT_DONE[job.kind]}{job.cell}: {gone(job, seen)}")
    return told


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _said(failure: Mapping[str, Any]) -> str:
    """The last line of an error; with its type where the message does not say all."""
    line = last_line(failure["message"])
    return line if failure["explained"] else f"{failure['type']}: {line}"


def _progress(run: Run) -> tuple[int | None, int | None, float | None]:
    """Tokens seen, tokens in all, tokens per second."""
    of = run.record.get("tokens") if run.status not in ("missing", "damaged") else None
    try:
        found = json.loads((run.path / PROGRESS_FILE).read_text())
        return int(found["tokens"]), of, float(found["tokens_per_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, of, None


def counts(found: list[RunState]) -> str:
    """``1 running, 2 queued, 3 done, 45% of the tokens``."""
    order = (RUNNING, STARTING, QUEUED, DONE, FAILED)
    number = Counter(state.state for state in found)
    listed = sorted(number, key=lambda s: (order.index(s) if s in order else len(order), s))
    told = [f"{number[state]:,} {state}" for state in listed]
    budget = sum(state.of or 0 for state in found)
    if number[RUNNING] and budget and all(state.of for state in found):
        told.append(f"{sum(state.tokens or 0 for state in found) / budget:.0%} of the tokens")
    return ", ".join(told)


def find_sweep(word: str, root: Path) -> Sweep:
    """The sweep that a word means: a folder, a name under ``root``, or the start of one.

    Raises:
        ReseedError: there is none, or there are several.
    """
    from reseed.config import ReseedError, nearest

    for folder in (Path(word), root / word):
        if (folder / "manifest.jsonl").is_file():
            return Sweep(folder)
    names = sorted(p.parent.name for p in root.glob("*/manifest.jsonl"))
    if name := begun_by(word, names):
        return Sweep(root / name)
    raise ReseedError(f"there is no sweep {word} in {root}/.{nearest(word, names)}")
