"""Command lines keep their plans: 109 of them give the jobs, sweeps and refusals of version 0.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import make_plan, plan_runs, take_evaluations
from reseed.errors import ReseedError
from test_signatures import RECORDS, with_records

RECORDED = json.loads((RECORDS / "command_lines.json").read_text())


def plan_of(words: list[str]) -> dict[str, Any]:
    """Return the launcher, the sweep, and each job's axes and signature; or the kind of refusal."""
    command, *rest = words
    try:
        line = CommandLine(command, rest)
        found: dict[str, Any] = {"launcher": line.launcher[0]}
        if command == "train":
            plan = plan_runs(line)
            found["sweep"] = plan.sweep.path.name if line.multirun else None
            own = [" ".join(o for o in job.overrides if o not in rest) for job in plan.jobs]
            signatures = [job.resolved.signature for job in plan.jobs]
            return found | {"jobs": [list(pair) for pair in zip(own, signatures, strict=True)]}
        asked = take_evaluations(line)
        plan = make_plan(line)
    except ReseedError as error:
        return {"refused": type(error).__name__}
    except SystemExit:
        return {"refused": "SystemExit"}
    jobs = [
        [" ".join(f"{axis}={value}" for axis, value in job.axes.items()), job.resolved.signature]
        for job in plan.jobs
    ]
    evaluations = [config.signed() for config in asked]
    return found | {"evaluations": evaluations, "sweep": plan.sweep.path.name, "jobs": jobs}


@pytest.mark.slow
def test_command_lines_keep_their_plans(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_records(tmp_path, tiny_text)
    monkeypatch.chdir(tmp_path)
    assert len(RECORDED) > 100
    for entry in RECORDED:
        expected = {key: value for key, value in entry.items() if key != "line"}
        found = plan_of(entry["line"])
        assert json.loads(json.dumps(found)) == expected, " ".join(entry["line"])
