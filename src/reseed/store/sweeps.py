"""The folder of a sweep: its runs, settings and results.

sweeps/<name>-<digest>/
    manifest.jsonl    a line per run: its values of the axes, signature and folder
    comparison.json   the settings of the comparison, with the requested grid
    evaluations.json  the evaluations of the runs that the tables show
    cells/            the results of compare jobs, from which tables and figures are made
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reseed.config import Config, digest
from reseed.errors import ReseedError
from reseed.store.runs import Run, RunStore
from reseed.system.files import atomic_write_json, atomic_write_text, shorten


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
    def manifest(self) -> list[dict[str, Any]]:
        """Rows of manifest.jsonl.

        Raises:
            ReseedError: the file does not exist.
        """
        try:
            lines = (self.path / "manifest.jsonl").read_text().splitlines()
        except FileNotFoundError:
            raise ReseedError(f"{self.path} is not a sweep: there is no manifest.jsonl") from None
        return [json.loads(line) for line in lines]

    def write_manifest(self, jobs: Sequence[Any], store: RunStore) -> None:
        """Write a line per job: its values of the axes, overrides, signature and folder.

        If the comparison has arms, the arm is an axis called ``arm``.
        """
        rows = []
        for job in jobs:
            run = job.resolved.run(store)
            row = {
                "axes": dict(job.axes),
                "overrides": list(job.overrides),
                "signature": run.signature,
                "run": os.path.relpath(run.path, self.path),
            }
            rows.append(json.dumps(row))
        atomic_write_text(self.path / "manifest.jsonl", "\n".join(rows) + "\n")

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings that the comparison's jobs read: comparison.json."""
        atomic_write_json(self.path / "comparison.json", settings)

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.path / "comparison.json").read_text())

    def add_evaluations(self, evaluations: Mapping[str, Config]) -> None:
        """Add evaluations to those that the tables show; one of the same name is replaced."""
        own = {
            name: {"settings": config.to_dict(), "signed": config.signed()}
            for name, config in evaluations.items()
        }
        atomic_write_json(self.path / "evaluations.json", self.evaluations | own)

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """``settings`` and ``signed`` settings of each requested evaluation, by name."""
        path = self.path / "evaluations.json"
        return json.loads(path.read_text()) if path.is_file() else {}

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
