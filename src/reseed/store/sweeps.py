"""The folder of a sweep: its runs, settings and results.

sweeps/<name>-<digest>/
    manifest.jsonl    a line per run: its values of the axes, signature and folder
    comparison.json   the settings of the comparison, with the requested grid
    evaluations.json  the evaluations of the runs that the tables show
    outputs.json      the SHA-256 of the tables and figures
    cells/            the results of compare jobs, from which tables and figures are made
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reseed.config import Config, digest
from reseed.errors import ReseedError
from reseed.store.runs import Run, RunStore
from reseed.system.console import say
from reseed.system.environment import mask_words
from reseed.system.files import atomic_write_text, hold_lock, shorten
from reseed.system.integrity import (
    DamagedFileError,
    check_files,
    describe_files,
    is_there,
    read_bytes,
    read_record,
    recorded_files,
    seal,
    unseal,
    write_record,
)

_OUTPUTS = "outputs.json"


@dataclass(frozen=True)
class Sweep:
    """One folder under ``sweeps/``."""

    path: Path

    @classmethod
    def of(
        cls, root: Path | str, name: str, signatures: Sequence[str], settings: Any = None
    ) -> Sweep:
        """Return the sweep of the runs with ``signatures`` (in any order) and ``settings``."""
        return cls(Path(root) / f"{shorten(name)}-{digest([sorted(set(signatures)), settings])}")

    @property
    def exists(self) -> bool:
        """True if the folder is a sweep, damaged or not."""
        return is_there(self.path / "manifest.jsonl")

    @property
    def manifest(self) -> list[dict[str, Any]]:
        """Rows of manifest.jsonl.

        Raises:
            ReseedError: the file does not exist, or is damaged.
        """
        path = self.path / "manifest.jsonl"
        try:
            rows = [unseal(line, path) for line in read_bytes(path).splitlines()]
        except FileNotFoundError:
            raise ReseedError(f"{self.path} is not a sweep: there is no manifest.jsonl") from None
        except DamagedFileError as error:
            raise sweep_error(error) from None
        expected = {row.pop("rows", len(rows)) for row in rows}
        if not rows or expected != {len(rows)} or not all("axes" in row for row in rows):
            raise sweep_error(DamagedFileError(path, "rows are missing"))
        return rows

    def write_manifest(self, jobs: Sequence[Any], store: RunStore) -> None:
        """Write a line per job: its values of the axes, overrides without secrets, signature and
        folder.

        If the comparison has arms, the arm is an axis called ``arm``.
        """
        rows = []
        for job in jobs:
            run = job.resolved.run(store)
            row = {
                "axes": dict(job.axes),
                "overrides": mask_words(job.overrides),
                "signature": run.signature,
                "run": os.path.relpath(run.path, self.path),
            }
            rows.append(row)
        lines = [seal(json.dumps({**row, "rows": len(rows)})) for row in rows]
        atomic_write_text(self.path / "manifest.jsonl", "\n".join(lines) + "\n")

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings that the comparison's jobs read: comparison.json."""
        write_record(self.path / "comparison.json", settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the comparison.

        Raises:
            ReseedError: the file is damaged, or does not exist.
        """
        try:
            return read_record(self.path / "comparison.json")
        except FileNotFoundError:
            raise ReseedError(
                f"{self.path} has no comparison: there is no comparison.json"
            ) from None
        except DamagedFileError as error:
            raise sweep_error(error) from None

    def add_evaluations(self, evaluations: Mapping[str, Config]) -> None:
        """Add evaluations to those that the tables show; one of the same name is replaced."""
        if not evaluations:
            return
        own = {
            name: {"settings": config.to_dict(), "signed": config.signed()}
            for name, config in evaluations.items()
        }
        with hold_lock(self.path / ".lock"):
            try:
                earlier = self.evaluations
            except ReseedError as error:
                say(f"{error}: it is written again, with {', '.join(own)}")
                earlier = {}
            write_record(self.path / "evaluations.json", earlier | own)

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """``settings`` and ``signed`` settings of each requested evaluation, by name.

        Raises:
            ReseedError: the file is damaged.
        """
        try:
            return read_record(self.path / "evaluations.json")
        except FileNotFoundError:
            return {}
        except DamagedFileError as error:
            raise ReseedError(
                f"{error}: `reseed evaluate {self.path} evaluation=NAME,...` writes it again"
            ) from None

    def record_outputs(self, names: Iterable[str]) -> None:
        """Record the SHA-256 of tables and figures that were just written into the folder."""
        with hold_lock(self.path / ".lock"):
            try:
                earlier = recorded_files(self.path / _OUTPUTS)
            except (FileNotFoundError, DamagedFileError):
                earlier = {}
            there = {name: of for name, of in earlier.items() if (self.path / name).exists()}
            files = there | describe_files(self.path, names)
            write_record(self.path / _OUTPUTS, {"files": dict(sorted(files.items()))})

    def damaged_output(self, *names: str) -> DamagedFileError | None:
        """Return the error for a table or figure that is not as it was written, or None.

        Args:
            names: the files to verify; by default all.
        """
        try:
            files = recorded_files(self.path / _OUTPUTS)
            check_files(self.path, {n: files[n] for n in names if n in files} if names else files)
        except FileNotFoundError:  # of version 0.1, without hashes
            return None
        except DamagedFileError as error:
            return error
        return None

    def stale_cell(self, run: Run) -> Path | None:
        """Return a cell that was compared before a run was trained again with another outcome, or
        None. A cell of version 0.1 records no files: it was compared from runs without hashes."""
        hashes = run.hashes()
        for path in sorted(self.path.glob("cells/*/cell.json")):
            cell = read_record(path)
            holds = any(row["run"] == run.id for row in cell["runs"])
            if holds and (cell.get("inputs") or {}).get(run.id, {}) != hashes:
                return path.parent
        return None

    @property
    def compared(self) -> bool:
        """True if any cell has been compared."""
        return any((self.path / "cells").glob("*/cell.json"))

    def runs(self, **axes: str) -> list[Run]:
        """Return the runs, or those with the given values of axes, in the manifest's order."""
        # Paths are relative to the sweep, so that both folders can be moved together.
        return [Run(Path(os.path.normpath(self.path / row["run"]))) for row in self.rows(axes)]

    def rows(self, axes: dict[str, str]) -> list[dict[str, Any]]:
        """Return the manifest rows with the given values of axes."""
        return [
            row
            for row in self.manifest
            if all(row["axes"].get(axis) == value for axis, value in axes.items())
        ]

    def cell_folder(self, axes: dict[str, str]) -> Path:
        """Return the folder for the results of the cell with these values of axes."""
        readable = ",".join(f"{axis}={value}" for axis, value in axes.items()) or "all"
        if len(readable.encode()) > 180 or len(readable) > 80 or re.search(r"[^\w=,.+-]", readable):
            plain = re.sub(r"[^\w=,.+-]+", "_", readable)
            readable = f"{shorten(plain[:60])}-{digest(axes)}"
        return self.path / "cells" / readable


def sweep_error(error: DamagedFileError) -> ReseedError:
    """Return the error for a damaged file of a sweep, with the remedy."""
    return ReseedError(f"{error}. `reseed run` with the arguments of the sweep writes it again")
