"""Results about a language model, computed once for all SAEs: probes, activations of words.

<cache>/evaluations/<what>-<digest of key>.safetensors
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reseed.atomic import atomic_write, room_for
from reseed.config import digest

_DIGITS = 24


@dataclass(frozen=True)
class SharedResults:
    """A folder of tensors, each file keyed by what determines its content.

    Attributes:
        cache: the folder of derived data; results are in its subfolder ``evaluations``.
    """

    cache: Path

    def get(
        self, what: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of ``key`` on the CPU; compute and store them if they are missing. If
        two processes need the same tensors, one computes and the other waits.

        Args:
            what: short name for the file.
            key: everything that determines the tensors, in plain values: fingerprints of model and
                tokenizer, dtype and attention, hookpoint, settings, seeds, a version.
            compute: computes the tensors.
        """
        path = self._path(what, key)
        found = _read(path)
        if found is None:
            with _locked(path.with_suffix(".lock")):
                found = _read(path)  # another process may have made it meanwhile
                if found is None:
                    found = _write(path, key, compute())
        return found

    def lacks(self, what: str, key: Mapping[str, Any]) -> bool:
        """Return whether no tensors are stored under ``key``."""
        return not self._path(what, key).is_file()

    def keep(self, what: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors that another computation produced, equal to those of `get`.

        This takes no lock: its holder may be waiting for ours, and would write the same tensors.
        """
        _write(self._path(what, key), key, tensors)

    def _path(self, what: str, key: Mapping[str, Any]) -> Path:
        return self.cache / "evaluations" / f"{what}-{digest(dict(key), _DIGITS)}.safetensors"


def _write(path: Path, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {"key": json.dumps(dict(key), sort_keys=True)}
    atomic_write(path, lambda part: save_file(found, part, about))
    return found


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the stored tensors; None if the file is missing or unreadable: it is recomputed."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock out other processes. The system frees the lock of a process that dies."""
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
