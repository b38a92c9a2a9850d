"""The curve of a run: means over the steps since its last row; ``training.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from reseed.atomic import atomic_write_text


@dataclass
class Curve:
    """Rows that are closed, and the sums of the next one.

    Attributes:
        rows: a number by name for each column; a row may have columns that others lack.
        steps: how many are in the sums.
        sums: since the last row; tensors, so that a GPU is not waited for.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def count(self, *, squared_error: Tensor, variance: Tensor, **values: Tensor) -> None:
        """A step.

        Args:
            squared_error, variance: of its batch; of their sums the row's FVU is the fraction.
            values: of which the row has the means.
        """
        self.steps += 1
        for name, value in {**values, "squared_error": squared_error, "variance": variance}.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def close(self, step: int, tokens: int, **known: float) -> dict[str, float]:
        """A row of the steps since the last one, of which there is at least one.

        Args:
            step, tokens, known: columns that are not sums.
        """
        sums = {name: float(value) for name, value in self.sums.items()}
        fvu = sums.pop("squared_error") / max(sums.pop("variance"), 1e-30)
        means = {name: value / self.steps for name, value in sums.items()}
        row = {"step": step, "tokens": tokens, "fvu": fvu, **known, **means}
        self.rows.append(row)
        self.steps, self.sums = 0, {}
        return row

    def write(self, folder: Path) -> None:
        """All rows, if there are any."""
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
        """What a checkpoint has of it."""
        return {"curve": self.rows, "tally": {"steps": self.steps, "sums": self.sums}}

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Self:
        """The inverse of `state`."""
        return cls(checkpoint["curve"], **checkpoint["tally"])
