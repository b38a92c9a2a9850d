"""A folder of finished matchings, so that none is computed twice.

A matching depends only on the rows of both sides, so its file is named by their digest. It is
reused by a comparison with another threshold, by two comparisons that have a pair in common, and
after an interruption.
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

from reseed.compare.matching.exact import VERSION, Matching, match
from reseed.config import digest
from reseed.system.files import atomic_write

_BLOCK = 4096  # rows that are digested at a time


class MatchingCache:
    """Store of matchings in one folder, called like `match`.

    Each file, ``<digest>.safetensors``, is written atomically; one that cannot be read is computed
    again. Deleting files costs only time.

    Args:
        folder: created when the first matching is written.
        least: smaller matchings (product of the numbers of rows) are not stored, because computing
            them is faster than finding them.
        progress: passed to `match`.
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
        """Return the matching from the folder, or make it with `match`."""
        if len(a) * len(b) < self.least:
            return match(a, b, absolute=absolute, device=self.device, progress=self.progress)
        one, other = _fingerprint(a), _fingerprint(b)
        # (A, B) and (B, A) share one file.
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
    """Read the matching in a file; None if the file is missing or cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return Matching(**arrays, **json.loads(file.metadata()["matching"]))
    except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
        return None
