"""Measurements in separate processes: the clock of a process, and its start."""

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
    """Failure of a measurement's process."""


class Clock:
    """Clock that splits the time of a process into start-up, training and the time after.

    Args:
        spawned: `time.time()` when the process was started.
    """

    def __init__(self, spawned: float) -> None:
        self._spawned = spawned
        self._begun: tuple[float, float] | None = None
        self._ended: tuple[float, float] | None = None

    def begin(self) -> None:
        """Mark the beginning of training, after imports and loading. The first call counts."""
        self._begun = self._begun or _now()

    def end(self) -> None:
        """Mark the end of training. The last call counts."""
        self._ended = _now()

    def phases(self) -> dict[str, Any]:
        """Return wall and CPU seconds of each phase, and the peak of resident bytes."""
        if self._begun is None or self._ended is None:
            raise RuntimeError("training did not begin and end in this process")
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
    """Run ``python program --task …`` and return its result.

    Raises:
        FailedError: the process failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        task = {**task, "result": str(result), "spawned": time.time()}
        environment = {
            **os.environ,
            **OFFLINE,
            "OMP_NUM_THREADS": str(threads),
            # reseed limits the spinning of waiting threads for itself; here all contenders get it.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
            "SPARSIFY_DISABLE_TRITON": "1",
        }
        command = [sys.executable, program, "--task", json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0 or not result.is_file():
            said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise FailedError(f"{task['what']} failed (status {done.returncode}):\n{said}")
        return json.loads(result.read_text())
