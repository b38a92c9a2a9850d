"""What was submitted for a sweep, written down in its folder.

sweeps/<sweep>/slurm/
    jobs.json     a job per entry: its id, what it does, its runs
    .lock         held by who submits or cancels
    <id>_0_log.out, <id>_0_log.err      what jobs print
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
    """One job.

    Attributes:
        job: SLURM's id; ``12_3`` for a task of an array.
        kind: train, evaluate, compare or collect.
        runs: signatures of the runs that it trains or evaluates.
        cell: what it compares, in words; or the evaluation, by name and digest.
        at: when, ISO 8601.
        cancelled: whether it was cancelled by reseed.
    """

    job: str
    kind: str
    at: str
    runs: tuple[str, ...] = ()
    cell: str = ""
    cancelled: bool = False

    @property
    def parts(self) -> list[tuple[str, str, str]]:
        """What it does, piece by piece; two jobs with the same piece do the same."""
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
        """Every job that was ever submitted, in that order."""
        try:
            listed = json.loads(self.path.read_text())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ReseedError(f"{self.path} is damaged: {error}") from None
        return [Submitted(**{**entry, "runs": tuple(entry["runs"])}) for entry in listed]

    def add(self, jobs: Sequence[Submitted]) -> None:
        """Write down new jobs. The caller holds the lock."""
        self._write([*self.jobs, *jobs])

    def mark_cancelled(self, ids: Sequence[str]) -> None:
        """Write down that jobs were cancelled. The caller holds the lock."""
        self._write([replace(j, cancelled=j.cancelled or j.job in ids) for j in self.jobs])

    def _write(self, jobs: Sequence[Submitted]) -> None:
        atomic_write_json(self.path, [asdict(job) for job in jobs])

    def active(self, queue: Mapping[str, InQueue]) -> list[Submitted]:
        """Those that wait or run."""
        return [job for job in self.jobs if job.job in queue]

    def log(self, job: Submitted | str) -> Path:
        """What a job writes to stderr, where errors are."""
        name = job if isinstance(job, str) else job.job
        return self.folder / f"{name}_0_log.err"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Within it no other process submits or cancels jobs of this sweep."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = take(self.folder / ".lock")
        assert handle is not None
        try:
            yield
        finally:
            os.close(handle)
