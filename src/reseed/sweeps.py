"""The folder of a sweep: which runs belong to it, and what was made of them.

sweeps/<name>-<digest>/
    manifest.jsonl    a line per run: its place in the grid, signature and folder
    comparison.json   the settings of the comparison, its grid as it was asked for
    evaluations.json  which evaluations of its runs its tables show
    multirun.yaml     how Hydra was asked
    cells/            what compare jobs wrote; then tables and figures
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reseed.atomic import atomic_write_json, atomic_write_text
from reseed.config import Config, ReseedError, digest
from reseed.runs import Run, RunStore


@dataclass(frozen=True)
class Sweep:
    """One folder under ``sweeps/``."""

    path: Path

    @classmethod
    def of(
        cls, root: Path | str, name: str, signatures: Sequence[str], settings: Any = None
    ) -> Sweep:
        """The sweep of certain runs under certain settings, whatever their order."""
        return cls(Path(root) / f"{name}-{digest([sorted(set(signatures)), settings])}")

    @property
    def manifest(self) -> list[dict[str, Any]]:
        """Rows of manifest.jsonl.

        Raises:
            ReseedError: there is none.
        """
        try:
            lines = (self.path / "manifest.jsonl").read_text().splitlines()
        except FileNotFoundError:
            raise ReseedError(f"{self.path} is no sweep: there is no manifest.jsonl") from None
        return [json.loads(line) for line in lines]

    def write_manifest(
        self, jobs: Sequence[Any], store: RunStore, places: Sequence[dict[str, str]] | None = None
    ) -> None:
        """A line per job: its place in the grid (axis → value), overrides, signature, folder.

        The arm of a comparison that has arms is an axis too, called ``arm``.
        """
        rows = []
        for job, place in zip(jobs, places or [{}] * len(jobs), strict=True):
            run = job.resolved.run(store)
            row = {
                "axes": place,
                "overrides": list(job.overrides),
                "signature": run.signature,
                "run": os.path.relpath(run.path, self.path),
            }
            rows.append(json.dumps(row))
        atomic_write_text(self.path / "manifest.jsonl", "\n".join(rows) + "\n")

    def write_settings(self, settings: dict[str, Any]) -> None:
        """What the comparison's jobs need to know: comparison.json."""
        atomic_write_json(self.path / "comparison.json", settings)

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.path / "comparison.json").read_text())

    def ask_for(self, evaluations: Mapping[str, Config]) -> None:
        """The tables shall show these evaluations of its runs, by name, beside those that were
        asked for before; of one name the last."""
        own = {
            name: {"settings": config.to_dict(), "signed": config.signed()}
            for name, config in evaluations.items()
        }
        atomic_write_json(self.path / "evaluations.json", self.evaluations | own)

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Of each evaluation that was asked for its ``settings`` and what of them is ``signed``."""
        path = self.path / "evaluations.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def compared(self) -> bool:
        """Whether any cell of it has been compared."""
        return any((self.path / "cells").glob("*/cell.json"))

    def runs(self, **axes: str) -> list[Run]:
        """Its runs, or those at certain values of some axes, in the order of the manifest."""
        # Relative to the sweep, so that both folders can be moved together and read from anywhere.
        return [Run(Path(os.path.normpath(self.path / row["run"]))) for row in self.rows(axes)]

    def rows(self, axes: dict[str, str]) -> list[dict[str, Any]]:
        """Manifest rows at certain values of some axes."""
        return [
            row
            for row in self.manifest
            if all(row["axes"].get(axis) == value for axis, value in axes.items())
        ]

    def cell_folder(self, axes: dict[str, str]) -> Path:
        """Where the cell with these values keeps its results."""
        readable = ",".join(f"{axis}={value}" for axis, value in axes.items()) or "all"
        if len(readable) > 80 or re.search(r"[^\w=,.+-]", readable):
            plain = re.sub(r"[^\w=,.+-]+", "_", readable)
            readable = f"{plain[:60]}-{digest(axes)}"
        return self.path / "cells" / readable
