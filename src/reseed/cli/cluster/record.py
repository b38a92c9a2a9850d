"""Record of the jobs submitted for a sweep, in the sweep's folder.

sweeps/<sweep>/slurm/
    jobs.json     one entry per job: its id, kind and runs
    .lock         held by a process that submits or cancels
    <id>_0_log.out, <id>_0_log.err      output of the jobs
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reseed.atomic import atomic_write_json
from reseed.cli.cluster.queue import InQueue
from reseed.config import ReseedError
from reseed.locks import take

TRAIN, EVALUATE, COMPARE, COLLECT = "train", "evaluate", "compare", "collect"


@dataclass(frozen=True)
class Submitted:
    """A submitted job.

    Attributes:
        job: SLURM's id; ``12_3`` for a task of an array.
        kind: train, evaluate, compare or collect.
        at: time of submission, ISO 8601.
        runs: signatures of the runs that the job trains or evaluates.
        cell: the cell that it compares, in words; or the evaluation, by name and digest.
        cancelled: reseed has cancelled the job.
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
            listed = json.loads(self.path.read_text())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ReseedError(f"{self.path} is damaged: {error}") from None
        return [Submitted(**{**entry, "runs": tuple(entry["runs"])}) for entry in listed]

    def add(self, jobs: Sequence[Submitted]) -> None:
        """Append new jobs. The caller holds the lock."""
        self._write([*self.jobs, *jobs])

    def mark_cancelled(self, ids: Sequence[str]) -> None:
        """Mark jobs as cancelled. The caller holds the lock."""
        self._write([replace(j, cancelled=j.cancelled or j.job in ids) for j in self.jobs])

    def _write(self, jobs: Sequence[Submitted]) -> None:
        atomic_write_json(self.path, [asdict(job) for job in jobs])

    def active(self, queue: Mapping[str, InQueue]) -> list[Submitted]:
        """Return the jobs that are queued or running."""
        return [job for job in self.jobs if job.job in queue]

    def log(self, job: Submitted | str) -> Path:
        """Return the path of a job's stderr, which contains its errors."""
        name = job if isinstance(job, str) else job.job
        return self.folder / f"{name}_0_log.err"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from submitting or cancelling jobs of this sweep."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = take(self.folder / ".lock")
        assert handle is not None
        try:
            yield
        finally:
            os.close(handle)
