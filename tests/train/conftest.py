from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs
from reseed.experiment.resolve import Resolved
from reseed.train.config import RuntimeConfig


@pytest.fixture
def jobs(
    tiny_overrides: list[str], tmp_path: Path
) -> Callable[..., tuple[list[Resolved], RuntimeConfig]]:
    """Return a function that composes and checks the jobs of a sweep; outputs go below tmp_path."""

    def made(*overrides: str, outputs: str = "outputs") -> tuple[list[Resolved], RuntimeConfig]:
        line = CommandLine("train", [])
        where = f"runtime.outputs={tmp_path / outputs}"
        found, runtime = check_jobs(line, [*tiny_overrides, where, *overrides], multirun=True)
        return [job.resolved for job in found], runtime

    return made
