"""Tests of calibrations stored as runs: made once for all seeds, and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs
from reseed.errors import ConfigError, Interrupted
from reseed.experiment.resolve import Resolved
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore
from reseed.study.calibrate import ACCEPTED, CalibrationError
from reseed.study.train import train_missing
from reseed.train.config import RuntimeConfig
from reseed.train.run_state import RunState

Jobs = Callable[..., tuple[list[Resolved], RuntimeConfig]]
TARGET = ["sae=relu", "sae.target_l0=6"]


@pytest.fixture
def jobs(tiny_overrides: list[str], tmp_path: Path) -> Jobs:
    def made(*overrides: str, outputs: str = "outputs") -> tuple[list[Resolved], RuntimeConfig]:
        where = f"runtime.outputs={tmp_path / outputs}"
        line = CommandLine("train", [])
        found, runtime = check_jobs(line, [*tiny_overrides, where, *overrides], multirun=True)
        return [job.resolved for job in found], runtime

    return made


def folders(runtime: RuntimeConfig) -> set[str]:
    return {path.name for path in Path(runtime.outputs).iterdir() if path.is_dir()}


def run_of(resolved: Resolved, runtime: RuntimeConfig) -> Run:
    return resolved.run(RunStore(runtime.outputs))


def test_one_weight_is_found_once_for_all_seeds(
    jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    first, runtime = jobs(*TARGET, "seed=0,1")
    assert train_missing(first, runtime) == {}
    runs = [run_of(r, runtime) for r in first]
    (weight,) = {run.record["penalty_weight"] for run in runs}
    calibration = runs[0].record["calibration"]
    assert calibration == runs[1].record["calibration"]
    assert (weight, weight) == (calibration["weight"], load_sae(runs[0].path).config.l1_coefficient)  # type: ignore[attr-defined]
    accepted = Run(Path(runtime.outputs) / calibration["run"])
    assert accepted.metrics["l0"] == pytest.approx(6, rel=ACCEPTED)
    assert accepted.metrics["penalty_weight"] == weight
    made = {name for name in folders(runtime) if "seed" not in name}
    assert len(made) == 1 + len(calibration["rounds"])
    said = capsys.readouterr().out
    assert "finding the penalty weight of 1 SAE by calibration runs" in said
    assert len(re.findall(r": weight \S+ gives L0 ", said)) == len(calibration["rounds"])
    assert "already calibrated" not in said
    # For other seeds and data orders, the weight is reused.
    more, runtime = jobs(*TARGET, "seed=2", "dataset.order_seed=0,5")
    assert train_missing(more, runtime) == {}
    assert {name for name in folders(runtime) if "seed" not in name} == made
    assert {run_of(r, runtime).record["penalty_weight"] for r in more} == {weight}
    said = capsys.readouterr().out
    l0 = calibration["l0"]
    told = f"already calibrated: relu at 8,192 tokens, target 6: weight {weight:.4g} (L0 {l0:.2f})"
    assert said.count(told) == 1
    assert "finding the" not in said
    assert "gives L0" not in said
    assert "steered to" not in said


def test_compared_runs_and_calibrations_have_different_initial_weights(jobs: Jobs) -> None:
    (resolved,), runtime = jobs(*TARGET, "seed=0")
    train_missing([resolved], runtime)
    starts = {
        json.loads((Path(runtime.outputs) / name / "run.json").read_text())["init_seed"]
        for name in folders(runtime)
    }
    assert len(starts) == 3, "the compared run, the steered one, and one for all rounds"


@pytest.mark.slow
def test_a_killed_calibration_resumes_with_the_same_weight(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the calibration in the steered run and in its first round."""
    (whole,), runtime = jobs(*TARGET, outputs="whole")
    train_missing([whole], runtime)
    expected = run_of(whole, runtime).record["calibration"]
    (again,), other = jobs(*TARGET, outputs="killed")
    often = RuntimeConfig.from_dict(other.to_dict() | {"checkpoint_every_s": 1e-9})
    original, count = RunState.train, [0]

    def killed(self: RunState, *arguments: object) -> None:
        count[0] += 1
        if count[0] in (70, 200):
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunState, "train", killed)
    for _ in range(2):
        with pytest.raises(Interrupted):
            train_missing([again], often)
    assert train_missing([again], often) == {}
    found = run_of(again, other).record["calibration"]
    assert found == expected


@pytest.mark.slow
def test_an_unreachable_l0_fails_the_run_with_the_reason(jobs: Jobs) -> None:
    """No penalty is small enough for 63.9 active latents of 64."""
    (resolved,), runtime = jobs("sae=relu", "sae.target_l0=63.9")
    failures = train_missing([resolved], runtime)
    run = run_of(resolved, runtime)
    assert isinstance(failures[run.id], CalibrationError)
    assert run.status == "failed"
    assert "no penalty weight gave a held-out L0 within 5% of the target in 8 rounds" in str(
        run.failure
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sae=relu", "sae.target_l0=65"],
            r"`sae.target_l0` \(=65\) must not exceed `num_latents`",
        ),
        (
            ["sae=topk", "sae.target_l0=65"],
            r"`sae.target_l0` \(=65\) must not exceed `num_latents`",
        ),
        (
            ["sae=gated", "sae.target_l0=4", "sae.l1_coefficient=0"],
            "`sae.l1_coefficient` must be above 0 with `target_l0`",
        ),
    ],
)
def test_impossible_targets_are_refused(jobs: Jobs, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jobs(*overrides)
