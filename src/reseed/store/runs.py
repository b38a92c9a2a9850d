"""The run store: one folder per trained SAE, named by its signature.

    outputs/<readable>-<signature>/
        run.json          the record: experiment, status, environment, timings, tokens, error
        sae.safetensors   weights, for raw activations        sae.json   their configuration
        latents.safetensors   per latent: held-out firing counts and sums of activations, tokens
                          since it last fired
        activations.safetensors   mean and covariance of the held-out activations
        metrics.json      held-out metrics                    training.csv   the training curve
        checkpoint.pt, progress.json   only while the run trains; both are updated periodically
        initial.safetensors   the initial weights, if the seed alone does not determine them

Only the store writes these folders. The process that holds a folder's lock is its only writer; the
operating system releases the lock of a process that died.
"""

from __future__ import annotations

import json
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reseed.config import SIGNATURE_LENGTH, digest
from reseed.errors import ReseedError
from reseed.system.environment import environment
from reseed.system.files import atomic_write_json, lock_file, remove_leftovers, room_for, shorten

FORMAT = 1
RESULTS = ("sae.safetensors", "sae.json", "latents.safetensors", "metrics.json", "training.csv")
"""The files of a finished run, besides its record. ``activations.safetensors`` is not required,
because older finished runs lack it."""
INITIAL_FILE = "initial.safetensors"
PROGRESS_FILE = "progress.json"
_FOLDER = re.compile(rf"-([0-9a-f]{{{SIGNATURE_LENGTH}}})$")


Waiting = Callable[[str], None]


class RunError(ReseedError):
    """Error for a run folder that is missing, damaged or inconsistent with its record."""


@dataclass(frozen=True)
class Run:
    """One folder of the store."""

    path: Path

    @property
    def signature(self) -> str:
        found = _FOLDER.search(self.path.name)
        if found is None:
            raise RunError(f"{self.path} is not a run folder: its name does not end in a signature")
        return found[1]

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def record(self) -> dict[str, Any]:
        """The contents of run.json.

        Raises:
            RunError: the file is missing or unreadable, or disagrees with the folder's name.
        """
        try:
            record = json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path} holds no run: there is no run.json") from None
        except ValueError as error:
            raise RunError(f"{self.path / 'run.json'} is damaged: {error}") from None
        if not isinstance(record, dict) or "identity" not in record or "status" not in record:
            raise RunError(f"{self.path / 'run.json'} is damaged: it lacks `identity` or `status`")
        signature = digest(record["identity"])
        if signature != self.signature:
            raise RunError(
                f"{self.path}: the record's content has signature {signature}, but the folder has "
                f"{self.signature}. The record was changed, or the folder was renamed."
            )
        return record

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").is_file()

    @property
    def status(self) -> str:
        """Status: missing, running, interrupted, failed, damaged or finished."""
        if not self.exists:
            return "missing"
        try:
            status = self.record["status"]
        except RunError:
            return "damaged"
        if status == "running" and not self.locked:
            return "interrupted"  # its process died without recording it
        if status == "finished" and not all((self.path / name).is_file() for name in RESULTS):
            return "damaged"
        return status

    @property
    def failure(self) -> dict[str, Any] | None:
        """Error and end time of a failed run; ``explained`` is True if the error message suffices
        without a traceback."""
        if self.status != "failed":
            return None
        record = self.record
        # Older records lack `explained`; show their traceback.
        return {"explained": False, **record["error"], "ended": record["ended"]}

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def metrics(self) -> dict[str, Any]:
        """Held-out metrics."""
        return json.loads((self.path / "metrics.json").read_text())

    def latents(self) -> dict[str, Any]:
        """Load per-latent arrays [num_latents]: ``firing``, ``tokens_since_fired``.

        Newer runs also have ``activation_sum`` and ``activation_square_sum`` over the held-out
        tokens, float64.
        """
        from safetensors.numpy import load_file

        return read_tensors(self.path / "latents.safetensors", load_file)

    def activations(self) -> dict[str, Any] | None:
        """Load the moments of the held-out activations.

        Returns:
            float32 arrays ``mean`` [d_in] and ``covariance`` [d_in, d_in]; None for an older run,
            which did not store them.
        """
        from safetensors.numpy import load_file

        path = self.path / "activations.safetensors"
        return read_tensors(path, load_file) if path.is_file() else None

    def update(self, **changes: Any) -> None:
        """Write the record with some entries changed."""
        atomic_write_json(self.path / "run.json", {**self.record, **changes})

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write the record of a run before it trains. The caller must hold the run's lock."""
        now = _now()
        started = self.record["started"] if self.status not in ("missing", "damaged") else now
        own = {
            "format": FORMAT,
            "signature": self.signature,
            "status": "running",
            "started": started,
            "resumed": now if started != now else None,
            "environment": environment(),
            "error": None,
        }
        atomic_write_json(self.path / "run.json", {**record, **own})

    def finish(self, metrics: Mapping[str, Any], **entries: Any) -> None:
        """Mark the run as finished. The caller must have written all other results."""
        atomic_write_json(self.path / "metrics.json", dict(metrics))
        self.update(status="finished", ended=_now(), **entries)
        self.drop_checkpoint()

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint and the progress file of a finished run."""
        (self.path / "checkpoint.pt").unlink(missing_ok=True)
        if (self.path / PROGRESS_FILE).exists():
            (self.path / PROGRESS_FILE).unlink(missing_ok=True)

    def fail(self, error: BaseException, **entries: Any) -> None:
        """Mark the run as failed, with the error in its record."""
        described = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            # Our own errors explain themselves, unless they wrap another error.
            "explained": isinstance(error, ReseedError) and error.__cause__ is None,
        }
        self.update(status="failed", ended=_now(), error=described, **entries)

    @property
    def locked(self) -> bool:
        """True if a live process holds the run's lock."""
        path = self.path / ".lock"
        if not path.exists():
            return False
        handle = lock_file(path, shared=True, wait_s=0)
        if handle is not None:
            os.close(handle)
        return handle is None

    @property
    def owner(self) -> str:
        """Description of the process that holds, or last held, the lock."""
        try:
            return (self.path / ".lock").read_text().strip() or "another process"
        except OSError:
            return "another process"

    @contextmanager
    def lock(self, waiting: Waiting | None = lambda message: None) -> Iterator[bool]:
        """Hold the run's lock.

        Args:
            waiting: function that is called, before waiting, with a message that names the lock's
                owner; None: do not wait.

        Yields:
            True if the lock is held.
        """
        path = self.path / ".lock"
        with room_for(path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = lock_file(path, wait_s=0.05)  # `locked` holds it only for a moment
        if handle is None and waiting is None:
            yield False
            return
        if handle is None:
            assert waiting is not None
            waiting(f"waiting for {self.id}: held by {self.owner}")
            handle = lock_file(path)
            assert handle is not None
        try:
            with suppress(OSError):  # the owner's name is only informative; the disk may be full
                os.truncate(handle, 0)
                own = f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n"
                os.write(handle, own.encode())
            remove_leftovers(self.path)
            yield True
        finally:
            os.close(handle)


class RunStore:
    """All runs under one folder (``outputs/``)."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def run(self, signature: str, readable: str) -> Run:
        """Return the run with ``signature``; an existing folder may have another readable part."""
        found = sorted(self.root.glob(f"*-{signature}")) if self.root.is_dir() else []
        return Run(found[0] if found else self.root / f"{shorten(readable)}-{signature}")

    def runs(self) -> list[Run]:
        """Return all runs, sorted by name."""
        if not self.root.is_dir():
            return []
        return [Run(path) for path in sorted(self.root.iterdir()) if _FOLDER.search(path.name)]

    @contextmanager
    def locks(self, runs: Sequence[Run], waiting: Waiting | None) -> Iterator[set[Run]]:
        """Hold the locks of several runs, taken in the order of signatures to avoid deadlock.

        Args:
            waiting: as for `Run.lock`.

        Yields:
            the runs whose lock is held; without ``waiting`` some may be missing.
        """
        with ExitStack() as stack:
            ordered = sorted(runs, key=lambda r: r.signature)
            yield {run for run in ordered if stack.enter_context(run.lock(waiting))}


def read_tensors(path: Path, load_file: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Read the arrays of a safetensors file, which cannot contain executable code.

    Raises:
        RunError: the file cannot be read.
    """
    from safetensors import SafetensorError

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read (truncated?): {error}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
