"""The training curve of a run (``training.csv``): means over the steps since the last row."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from reseed.system.files import atomic_write_text


@dataclass
class Curve:
    """Closed rows, and the sums of the next one.

    Attributes:
        rows: dicts of column name to number; a row may have columns that others lack.
        steps: number of steps in the sums.
        sums: sums since the last row, kept as tensors to avoid waiting for the GPU.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def count(self, *, squared_error: Tensor, variance: Tensor, **values: Tensor) -> None:
        """Add a step to the sums.

        Args:
            squared_error, variance: those of the step's batch; the row's FVU is the ratio of their
                sums, NaN if no batch had a variance.
            values: quantities whose means the row holds.
        """
        self.steps += 1
        for name, value in {**values, "squared_error": squared_error, "variance": variance}.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def close(self, step: int, tokens: int, **known: float) -> dict[str, float]:
        """Close and return a row for the steps since the last row; there must be at least one step.

        Args:
            step, tokens, known: columns that are not sums.
        """
        sums = {name: float(value) for name, value in self.sums.items()}
        error, variance = sums.pop("squared_error"), sums.pop("variance")
        fvu = error / variance if variance > 0 else float("nan")
        means = {name: value / self.steps for name, value in sums.items()}
        row = {"step": step, "tokens": tokens, "fvu": fvu, **known, **means}
        self.rows.append(row)
        self.steps, self.sums = 0, {}
        return row

    def write(self, folder: Path) -> None:
        """Write all rows to training.csv, if there are any."""
        if not self.rows:
            return
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()}
            for row in self.rows
        )
        atomic_write_text(folder / "training.csv", text.getvalue())

    def state(self) -> dict[str, Any]:
        """Return the entries for a checkpoint."""
        return {"curve": self.rows, "tally": {"steps": self.steps, "sums": self.sums}}

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Self:
        """Rebuild a curve from a checkpoint (the inverse of `state`)."""
        return cls(checkpoint["curve"], **checkpoint["tally"])
