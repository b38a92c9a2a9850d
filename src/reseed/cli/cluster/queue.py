"""SLURM's jobs: the settings of a job, its state from SLURM's commands, and the submitted jobs.

Settings have the names that submitit and SLURM use (`hydra/launcher=slurm`). The commands are
squeue, sacct, scontrol and scancel.

sweeps/<sweep>/slurm/
    jobs.json     one entry per job: its id, kind and runs
    .lock         held by a process that submits or cancels
    <id>_0_log.out, <id>_0_log.err      output of the jobs
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from reseed.config import Config, make, setting
from reseed.errors import ConfigError, ReseedError
from reseed.system.files import hold_lock
from reseed.system.integrity import DamagedFileError, read_bytes, unseal, write_record

NAME = "slurm"
TARGET = "hydra_plugins.reseed_plugins.slurm.SlurmLauncher"
KEY = "hydra.launcher"
_TEAM = ("nodes", "tasks_per_node")
"""Settings that apply only to training jobs."""
_OURS = ("max_num_timeout", "requeue", "poll_s", "additional_parameters")
_ALIKE = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")
"""Settings whose submitit name has no ``slurm_`` prefix."""


@dataclass(frozen=True)
class SlurmSettings(Config):
    """Resources of every job, and the settings for requeueing jobs and waiting for them."""

    partition: str | None = setting(None)
    account: str | None = setting(None)
    qos: str | None = setting(None)
    constraint: str | None = setting(None)
    gres: str | None = setting(None)
    nodes: int = setting(1, at_least=1)
    """Number of nodes of a training job. Several nodes or tasks need runtime=ddp or spread."""
    tasks_per_node: int = setting(1, at_least=1)
    """Number of processes that SLURM starts on each node of a training job: one per GPU of the
    node. With one node and one task, the job starts the other processes itself."""
    gpus_per_node: int | None = setting(None, at_least=0)
    cpus_per_task: int = setting(4, at_least=1)
    mem_gb: float | None = setting(None, above=0)
    """Memory of a job; null: the partition's default."""
    timeout_min: int = setting(240, at_least=1)
    """Time limit of a job. A job that reaches it saves and is requeued."""
    array_parallelism: int = setting(64, at_least=1)
    """Maximum number of tasks of an array that run at once."""
    setup: tuple[str, ...] = setting(())
    """Shell commands that run before Python starts, such as ``module load cuda`` and exports."""
    signal_delay_s: int = setting(120, at_least=1)
    """Seconds between SLURM's warning and the time limit: the time that a job has to save."""
    max_num_timeout: int = setting(10, at_least=0)
    """Maximum number of requeues of a job at its time limit; pre-emptions do not count."""
    requeue: bool = setting(True)
    """Let SLURM restart a job that was pre-empted or whose node failed."""
    additional_parameters: dict[str, Any] | None = setting(None)  # noqa: RUF009
    """Further options of sbatch by their long names."""
    poll_s: float = setting(10.0, above=0)
    """Seconds between two queries of the queue while a command waits."""

    def validate(self) -> None:
        # SLURM sends the signal up to a minute early.
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ConfigError(
                f"{{key}} (={self.signal_delay_s}) must be shorter than the time limit "
                f"({KEY}.timeout_min={self.timeout_min})",
                "signal_delay_s",
            )

    @property
    def tasks(self) -> int:
        """Number of processes that SLURM starts for a training job."""
        return self.nodes * self.tasks_per_node

    def check(self, strategy: str) -> None:
        """Raise `ConfigError` if ``strategy`` cannot use the requested number of processes."""
        if strategy == "single" and self.tasks > 1:
            key = "nodes" if self.nodes > 1 else "tasks_per_node"
            raise ConfigError(
                f"{{key}} (={getattr(self, key)}) needs runtime=ddp or runtime=spread: with "
                "runtime.strategy=single one process trains",
                f"{KEY}.{key}",
            )

    def submitit(self, name: str, dependency: str | None, trains: bool = True) -> dict[str, Any]:
        """Return the parameters of submitit's AutoExecutor for a job called ``name``."""
        given: dict[str, Any] = {"name": name}
        for f in fields(self):
            value = 1 if f.name in _TEAM and not trains else getattr(self, f.name)
            if f.name not in _OURS and value not in (None, ()):
                given[f.name if f.name in _ALIKE else f"slurm_{f.name}"] = value
        if self.setup:
            given["slurm_setup"] = list(self.setup)
        more = {"requeue" if self.requeue else "no-requeue": True}
        given["slurm_additional_parameters"] = more | dict(self.additional_parameters or {})
        # append: a requeued job keeps its earlier output.
        # kill: if one process fails, the others would wait for it forever.
        given["slurm_srun_args"] = ["--open-mode=append", "--kill-on-bad-exit=1"]
        return given | ({"slurm_dependency": dependency} if dependency else {})

    @classmethod
    def of(cls, node: dict[str, Any]) -> SlurmSettings:
        """Build the settings from the composed ``hydra.launcher``."""
        values = {key: value for key, value in node.items() if key != "_target_"}
        return make(cls, values, KEY)


def defaults() -> dict[str, Any]:
    """Return the launcher's default node for Hydra's config store."""
    found: dict[str, Any] = {"_target_": TARGET}
    for f in fields(SlurmSettings):
        value = f.default
        found[f.name] = list(value) if isinstance(value, tuple) else value
    found["additional_parameters"] = {}
    return found


RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED")
_PATIENCE_S = 30
_NEVER = ("DependencyNeverSatisfied", "InvalidAccount", "InvalidQOS")


class QueueError(ReseedError):
    """Error raised when SLURM does not answer."""


@dataclass(frozen=True)
class InQueue:
    """A queued or running job.

    Attributes:
        state: SLURM's state, ``PENDING``, ``RUNNING``, ...
        reason: SLURM's reason why the job waits; may be empty.
    """

    state: str
    reason: str = ""

    @property
    def running(self) -> bool:
        return self.state in RUNNING


def there_is_slurm() -> bool:
    return shutil.which("squeue") is not None


def queue() -> dict[str, InQueue]:
    """Return the user's queued and running jobs by id; a task of an array has the id ``12_3``.

    Raises:
        QueueError: SLURM does not answer.
    """
    # -r: one line for each queued task of an array.
    told = _asked("squeue", "--noheader", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r")
    found = {}
    for line in told.splitlines():
        job, state, reason = (*line.strip().split("|"), "", "")[:3]
        # A job whose condition can never be met counts as ended.
        if job and reason not in _NEVER:
            found[job] = InQueue(state, "" if reason == "None" else reason)
    return found


def last_states(jobs: Iterable[str]) -> dict[str, str]:
    """Return the final states of jobs that have left the queue, as far as SLURM knows them.

    The states come from SLURM's accounting if there is one, else from the controller, which soon
    forgets ended jobs.
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
    """Cancel jobs, in this order. SLURM sends SIGTERM, and SIGKILL some seconds later.

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
        ended = subprocess.run(
            command, capture_output=True, timeout=_PATIENCE_S, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise QueueError(
            f"SLURM does not answer: `{command[0]}` took over {_PATIENCE_S} s"
        ) from None
    if ended.returncode:
        said = " ".join(ended.stderr.split())
        raise QueueError(f"SLURM does not answer: `{command[0]}` said: {said}")
    return ended.stdout


TRAIN, EVALUATE, COMPARE, COLLECT = "train", "evaluate", "compare", "collect"


@dataclass(frozen=True)
class Submitted:
    """A submitted job.

    Attributes:
        job: SLURM's id; ``12_3`` for a task of an array.
        kind: train, evaluate, compare or collect.
        at: time of submission, ISO 8601.
        runs: signatures of the runs that the job trains or evaluates.
        cell: the cell that the job compares (`in_words`), or its evaluation, by name and digest.
        cancelled: True if reseed has cancelled the job.
    """

    job: str
    kind: str
    at: str
    runs: tuple[str, ...] = ()
    cell: str = ""
    cancelled: bool = False

    @property
    def parts(self) -> list[tuple[str, str, str]]:
        """Identities of the job's work items; two jobs with the same item do the same work."""
        return [(self.kind, self.cell, run) for run in self.runs or ("",)]


class Record:
    """The jobs of one sweep."""

    def __init__(self, sweep: Path) -> None:
        self.folder = sweep / "slurm"

    @property
    def path(self) -> Path:
        return self.folder / "jobs.json"

    @property
    def jobs(self) -> list[Submitted]:
        """Every job ever submitted, in order of submission."""
        try:
            data = read_bytes(self.path)
        except FileNotFoundError:
            return []
        if data.lstrip().startswith(b"["):  # of version 0.1, without a checksum
            data = b'{"jobs": %s}' % data
        try:
            listed = unseal(data, self.path)["jobs"]
            return [Submitted(**{**entry, "runs": tuple(entry["runs"])}) for entry in listed]
        except (KeyError, TypeError) as error:
            raise DamagedFileError(self.path, f"it lists no jobs ({error})") from None

    def add(self, jobs: Sequence[Submitted]) -> None:
        """Append new jobs. The caller holds the lock."""
        self._write([*self.jobs, *jobs])

    def mark_cancelled(self, ids: Sequence[str]) -> None:
        """Mark jobs as cancelled. The caller holds the lock."""
        self._write([replace(j, cancelled=j.cancelled or j.job in ids) for j in self.jobs])

    def _write(self, jobs: Sequence[Submitted]) -> None:
        write_record(self.path, {"jobs": [asdict(job) for job in jobs]})

    def active(self, queue: Mapping[str, InQueue]) -> list[Submitted]:
        """Return the jobs that are queued or running."""
        return [job for job in self.jobs if job.job in queue]

    def log(self, job: Submitted | str) -> Path:
        """Return the path of a job's stderr, which contains its errors."""
        name = job if isinstance(job, str) else job.job
        return self.folder / f"{name}_0_log.err"

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from submitting or cancelling jobs of this sweep."""
        return hold_lock(self.folder / ".lock")
