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

The record has a checksum, and the SHA-256 of every other file of a finished run; readers verify the
files that they use (`reseed.system.integrity`).

Only the store writes these folders. The process that holds a folder's lock is its only writer; the
operating system releases the lock of a process that died.
"""

from __future__ import annotations

import os
import re
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reseed.config import SIGNATURE_LENGTH, digest
from reseed.errors import ReseedError
from reseed.system.environment import allow_open_files, environment
from reseed.system.files import (
    atomic_write_json,
    lock_file,
    lock_owner,
    remove_leftovers,
    room_for,
    shorten,
    sign_lock,
)
from reseed.system.integrity import (
    DamagedFileError,
    check_file,
    check_files,
    checksum_file,
    describe_files,
    is_there,
    read_record,
    read_tensors,
    recorded_files,
    remove_checked,
    write_record,
)

FORMAT = 1
RESULTS = ("sae.safetensors", "sae.json", "latents.safetensors", "metrics.json", "training.csv")
"""The files of a finished run, besides its record. ``activations.safetensors`` is not required,
because older finished runs lack it."""
INITIAL_FILE = "initial.safetensors"
_OPTIONAL = ("activations.safetensors", INITIAL_FILE)
CHECKPOINT_FILE = "checkpoint.pt"
PROGRESS_FILE = "progress.json"
_FOLDER = re.compile(rf"-([0-9a-f]{{{SIGNATURE_LENGTH}}})$")

REMEDY = "`reseed train` with the arguments of the run makes it again"

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
            record = read_record(self.path / "run.json")
        except FileNotFoundError:
            raise RunError(f"{self.path} holds no run: there is no run.json") from None
        except DamagedFileError as error:
            raise RunError(str(error)) from None
        if "identity" not in record or "status" not in record:
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
        return is_there(self.path / "run.json")

    @property
    def status(self) -> str:
        """Status: missing, running, interrupted, failed, finished, unverified (finished by version
        0.1, which wrote no checksums) or damaged."""
        return self.state()[0]

    def state(self, *, thorough: bool = False) -> tuple[str, dict[str, Any] | None, str]:
        """Return the status, the record, and what is damaged.

        Args:
            thorough: read every file of a finished run; otherwise only those whose size or time of
                change is not the recorded one.

        Returns:
            the status; the record, or None if there is none or it is damaged; for a damaged run
            the message that names the file, else "".
        """
        if not self.exists:
            return "missing", None, ""
        try:
            record = self.record
        except RunError as error:
            return "damaged", None, str(error)
        status = record["status"]
        try:
            if status == "running" and not self.locked:
                return "interrupted", record, ""  # its process died without recording it
        except OSError as error:  # its lock cannot be opened, e.g. because it is a symbolic link
            return "damaged", record, f"{self.path / '.lock'} is damaged: {error.strerror}"
        if status != "finished":
            return status, record, ""
        files = record.get("files")
        try:
            if files is not None:
                check_files(self.path, files, quick=not thorough)
            elif lacking := [name for name in RESULTS if not (self.path / name).is_file()]:
                raise DamagedFileError(self.path / lacking[0], "it is missing")
        except DamagedFileError as error:
            return "damaged", record, str(error)
        return "unverified" if files is None else "finished", record, ""

    def verify(self) -> None:
        """Read every file of a finished run, and compare it with the record.

        Raises:
            RunError: the record or a file is damaged; the message names the file.
        """
        _, _, damage = self.state(thorough=True)
        if damage:
            raise RunError(f"{damage}. {REMEDY}")

    def hashes(self) -> dict[str, str]:
        """Return name → SHA-256 of the files that decide what is measured; {} without a record."""
        try:
            files = recorded_files(self.path / "run.json")
        except FileNotFoundError:
            return {}
        return {name: about["sha256"] for name, about in files.items() if name != "training.csv"}

    @property
    def failure(self) -> dict[str, Any] | None:
        """Error and end time of a failed run; ``explained``: the message suffices."""
        if self.status != "failed":
            return None
        record = self.record
        # Older records lack `explained`; show their traceback.
        return {"explained": False, **record["error"], "ended": record["ended"]}

    @property
    def damage(self) -> str:
        """The message that names what is damaged, or ""."""
        return self.state()[2]

    @property
    def finished(self) -> bool:
        return self.status in ("finished", "unverified")

    def file(self, name: str) -> Path:
        """Return the path of a file of the run after verifying its content.

        Raises:
            RunError: the file is damaged.
        """
        files: Mapping[str, Any] = self.record.get("files") or {}
        try:
            if name in files:
                check_file(self.path / name, files[name])
        except DamagedFileError as error:
            raise RunError(f"{error}. {REMEDY}") from None
        return self.path / name

    @property
    def metrics(self) -> dict[str, Any]:
        """Held-out metrics.

        Raises:
            RunError: their file is damaged.
        """
        try:
            return read_record(self.file("metrics.json"))
        except (DamagedFileError, FileNotFoundError) as error:
            raise RunError(str(error)) from None

    def latents(self) -> dict[str, Any]:
        """Load per-latent arrays [num_latents]: ``firing``, ``tokens_since_fired``.

        Newer runs also have ``activation_sum`` and ``activation_square_sum`` over the held-out
        tokens, float64.
        """
        from safetensors.numpy import load_file

        return read_tensors(self.file("latents.safetensors"), load_file)

    def activations(self) -> dict[str, Any] | None:
        """Load the moments of the held-out activations.

        Returns:
            float32 arrays ``mean`` [d_in] and ``covariance`` [d_in, d_in]; None for an older run,
            which did not store them.
        """
        from safetensors.numpy import load_file

        path = self.file("activations.safetensors")
        return read_tensors(path, load_file) if path.is_file() else None

    def update(self, **changes: Any) -> None:
        """Write the record with some entries changed."""
        write_record(self.path / "run.json", {**self.record, **changes})

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write the record of a run before it trains. The caller must hold the run's lock."""
        now = _now()
        status, earlier, _ = self.state()
        started = earlier["started"] if earlier and status != "damaged" else now
        own = {
            "format": FORMAT,
            "signature": self.signature,
            "status": "running",
            "started": started,
            "resumed": now if started != now else None,
            "environment": environment(),
            "error": None,
        }
        write_record(self.path / "run.json", {**record, **own})

    def finish(self, metrics: Mapping[str, Any], **entries: Any) -> None:
        """Mark the run as finished. The caller must have written all other results."""
        atomic_write_json(self.path / "metrics.json", dict(metrics))
        files = describe_files(self.path, (*RESULTS, *_OPTIONAL), times=True)
        self.update(status="finished", ended=_now(), files=files, **entries)
        self.drop_checkpoint()

    def drop_checkpoint(self) -> None:
        """Delete the checkpoint and the progress file of a finished run."""
        remove_checked(self.path / CHECKPOINT_FILE)
        checksum_file(self.path / INITIAL_FILE).unlink(missing_ok=True)  # the record has it now
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
        """True if a live process holds the run's lock.

        Raises:
            OSError: the lock cannot be opened.
        """
        path = self.path / ".lock"
        if not os.path.lexists(path):
            return False
        handle = lock_file(path, shared=True, wait_s=0)
        if handle is not None:
            os.close(handle)
        return handle is None

    @property
    def owner(self) -> str:
        """Description of the process that holds, or last held, the lock."""
        return lock_owner(self.path / ".lock") or "another process"

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
            own = f"process {os.getpid()} on {socket.gethostname()} since {_now()}"
            sign_lock(handle, own)
            remove_leftovers(self.path, sole_writer=True)
            yield True
        finally:
            os.close(handle)


def refuse_damaged(runs: Iterable[Run]) -> None:
    """Check the runs as `Run.status` does.

    Raises:
        RunError: some are damaged; the message names the files.
    """
    found = dict.fromkeys(damage for run in runs if (damage := run.damage))
    if found:
        raise RunError("\n".join([*found, REMEDY]))


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

        Raises:
            ReseedError: the system allows too few open files.
        """
        allow_open_files(len(runs), f"a group of {len(runs):,} runs")
        with ExitStack() as stack:
            ordered = sorted(runs, key=lambda r: r.signature)
            yield {run for run in ordered if stack.enter_context(run.lock(waiting))}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
