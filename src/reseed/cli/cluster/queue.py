"""What SLURM knows of jobs, asked by its own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from reseed.config import ReseedError

RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED")
_PATIENCE_S = 30
_NEVER = ("DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS")


class QueueError(ReseedError):
    """SLURM did not answer."""


@dataclass(frozen=True)
class InQueue:
    """A job that waits or runs.

    Attributes:
        state: in SLURM's words, ``PENDING``, ``RUNNING``, ...
        reason: why it waits, in SLURM's words; may be empty.
    """

    state: str
    reason: str = ""

    @property
    def running(self) -> bool:
        return self.state in RUNNING


def there_is_slurm() -> bool:
    return shutil.which("squeue") is not None


def queue() -> dict[str, InQueue]:
    """The user's jobs that wait or run, by id; a task of an array as ``12_3``.

    Raises:
        QueueError: SLURM does not answer.
    """
    # -r: a line for each task of an array that waits.
    told = _asked("squeue", "--noheader", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r")
    found = {}
    for line in told.splitlines():
        job, state, reason = (*line.strip().split("|"), "", "")[:3]
        # A job that waits for what will never be is over.
        if job and reason not in _NEVER:
            found[job] = InQueue(state, "" if reason == "None" else reason)
    return found


def last_states(jobs: Iterable[str]) -> dict[str, str]:
    """How jobs ended that are in the queue no more, as far as SLURM still knows.

    From the accounting where there is one, else from the controller, which forgets soon.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    ids = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    found: dict[str, str] = {}
    try:
        told = _asked("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ids)
        pairs = [line.split("|")[:2] for line in told.splitlines() if line.count("|") == 1]
        found = {job: state.split()[0] for job, state in pairs if state.strip()}
    except (QueueError, FileNotFoundError):
        pass
    for job in ids.split(","):
        if any(one.partition("_")[0] == job and one not in found for one in wanted):
            found |= {k: v for k, v in _controller(job).items() if k not in found}
    return {job: state for job, state in found.items() if job in wanted}


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs, in this order. They are sent SIGTERM, and some seconds later SIGKILL.

    Raises:
        QueueError: SLURM does not answer.
    """
    wanted = list(jobs)
    if wanted:
        _asked("scancel", "--quiet", *wanted)


def _controller(job: str) -> dict[str, str]:
    try:
        told = _asked("scontrol", "-o", "show", "job", job)
    except (QueueError, FileNotFoundError):
        return {}
    found = {}
    for line in told.splitlines():
        words = dict(re.findall(r"(\w+)=(\S*)", line))
        task = words.get("ArrayTaskId")
        name = f"{words.get('ArrayJobId')}_{task}" if task else words.get("JobId", "")
        found[name] = words.get("JobState", "")
    return found


def _asked(*command: str) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise QueueError(
            f"SLURM does not answer: `{command[0]}` took over {_PATIENCE_S} s"
        ) from None
    if ended.returncode:
        said = " ".join(ended.stderr.split())
        raise QueueError(f"SLURM does not answer: `{command[0]}` said: {said}")
    return ended.stdout
