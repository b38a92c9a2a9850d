"""A measurement in a process of its own: its clock, and how it is started."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}


class FailedError(RuntimeError):
    """A measurement whose process did not end well."""


class Clock:
    """Splits a process's life into start-up, training and what comes after.

    Args:
        spawned: `time.time()` at which the process was asked for.
    """

    def __init__(self, spawned: float) -> None:
        self._spawned = spawned
        self._begun: tuple[float, float] | None = None
        self._ended: tuple[float, float] | None = None

    def begin(self) -> None:
        """Training begins: all is imported, loaded and tokenised. The first call counts."""
        self._begun = self._begun or _now()

    def end(self) -> None:
        """Training has ended. The last call counts."""
        self._ended = _now()

    def phases(self) -> dict[str, Any]:
        """Seconds of wall and of CPU of each phase, and the peak of resident bytes."""
        if self._begun is None or self._ended is None:
            raise RuntimeError("no training was seen in this process")
        marks = [(self._spawned, 0.0), self._begun, self._ended, _now()]
        found: dict[str, Any] = {
            name: {"wall": after[0] - before[0], "cpu": after[1] - before[1]}
            for name, before, after in zip(
                ("start", "training", "after"), marks, marks[1:], strict=False
            )
        }
        unit = 1 if sys.platform == "darwin" else 1024
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return found


def _now() -> tuple[float, float]:
    used = os.times()
    return time.time(), used.user + used.system + used.children_user + used.children_system


def in_process(program: str, task: dict[str, Any], threads: int) -> Any:
    """Run ``python program --task …`` and return what it left.

    Raises:
        FailedError: with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        task = {**task, "result": str(result), "spawned": time.time()}
        environment = {
            **os.environ,
            **OFFLINE,
            "OMP_NUM_THREADS": str(threads),
            # What `reseed` sets for itself; here for everyone (README: threads that wait).
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
            "SPARSIFY_DISABLE_TRITON": "1",
        }
        command = [sys.executable, program, "--task", json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0 or not result.is_file():
            said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise FailedError(f"{task['what']} failed (status {done.returncode}):\n{said}")
        return json.loads(result.read_text())
