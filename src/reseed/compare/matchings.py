"""A folder of finished matchings: what took minutes is not computed a second time.

A matching depends on the rows of both sides and on nothing else, so the name of its file is a
digest of these. A comparison with another threshold, a pair that two comparisons have in common
and a comparison that was interrupted all find what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reseed.atomic import atomic_write
from reseed.compare.matching import VERSION, Matching, match
from reseed.config import digest

_BLOCK = 4096  # rows that are digested at a time


class MatchingStore:
    """Matchings by their rows, under one folder. It is `match` for whoever compares.

    Each file, ``<digest>.safetensors``, is whole or not there; one that cannot be read is made
    again. Deleting files loses nothing but time.

    Args:
        folder: made when the first matching is written.
        least: smaller matchings (product of the numbers of rows) are not kept: they are computed
            sooner than found.
        progress: is told what a matching is doing.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        least: int = 1 << 22,
        device: str = "cpu",
        progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.folder = Path(folder)
        self.least, self.device, self.progress = least, device, progress

    def __call__(
        self,
        a: Float[np.ndarray, "n d_in"],
        b: Float[np.ndarray, "m d_in"],
        *,
        absolute: bool = False,
    ) -> Matching:
        """`reseed.compare.matching.match`, from the folder where it is there."""
        if len(a) * len(b) < self.least:
            return match(a, b, absolute=absolute, device=self.device, progress=self.progress)
        one, other = _fingerprint(a), _fingerprint(b)
        # (A, B) and (B, A) are one matching, seen from two sides.
        turned = one > other
        name = digest([*sorted((one, other)), absolute, VERSION], length=32)
        path = self.folder / f"{name}.safetensors"
        found = _read(path)
        if found is not None:
            return found.inverse() if turned else found
        made = match(a, b, absolute=absolute, device=self.device, progress=self.progress)
        atomic_write(path, lambda file: _write(made.inverse() if turned else made, file))
        return made


def _fingerprint(rows: Float[np.ndarray, "n d_in"]) -> str:
    found = hashlib.sha256(f"{rows.dtype} {rows.shape}".encode())
    for start in range(0, len(rows), _BLOCK):
        found.update(np.ascontiguousarray(rows[start : start + _BLOCK]).data)
    return found.hexdigest()


def _write(matching: Matching, path: Path) -> None:
    arrays = {
        "assignment": matching.assignment,
        "cosines": matching.cosines,
        "row_prices": matching.row_prices,
        "column_prices": matching.column_prices,
    }
    numbers = {"gap": matching.gap, "ambiguous": matching.ambiguous}
    save_file(arrays, path, metadata={"matching": json.dumps(numbers)})


def _read(path: Path) -> Matching | None:
    """The matching in a file, or None where there is none that can be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return Matching(**arrays, **json.loads(file.metadata()["matching"]))
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None
