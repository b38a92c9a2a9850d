"""Runs and sweeps of version 0.1 are read by the commands and functions of today."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import reseed
from reseed.cli.main import main
from test_signatures import with_records

SWEEP = "seeds-64f0584a1943"
RUN = "embedded-resid_post.1-words-topk-32-k8-seed0-509fd704fc5e"


@pytest.fixture
def records(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with_records(tmp_path, tiny_text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reseed_exits_with(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert isinstance(end.value.code, int)
    return end.value.code


def test_status_lists_old_runs_and_sweeps(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reseed_exits_with("status") == 0
    printed = capsys.readouterr().out
    for word in ("509fd704fc5e", "b1a9c7cbeb4a", "febc25c9bda3", "unverified", SWEEP):
        assert word in printed
    assert "damaged" not in printed


def test_old_runs_load(records: Path) -> None:
    run = reseed.load_run(records / "outputs" / RUN)
    sae = reseed.load_sae(records / "outputs" / RUN)
    assert run.record["experiment"]["sae"]["type"] == "topk"
    assert sae.W_dec.shape == (32, 128)
    assert run.metrics["fvu"] == pytest.approx(0.119, abs=5e-4)


def test_old_runs_are_not_trained_again(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = pd.read_json(records / "sweeps" / SWEEP / "manifest.jsonl", lines=True)
    assert reseed_exits_with("train", *manifest.overrides[0][1:]) == 0
    assert "nothing to train: 1 run already finished" in capsys.readouterr().out


def test_an_old_sweep_is_compared_and_reported(
    records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = records / "sweeps" / SWEEP
    before = pd.read_csv(folder / "summary.csv")
    manifest = pd.read_json(folder / "manifest.jsonl", lines=True)
    declared = [o for o in manifest.overrides[0] if not o.startswith("seed=")]
    assert reseed_exits_with("compare", *declared, "seed=0,1") == 0
    after = pd.read_csv(folder / "summary.csv")
    pd.testing.assert_frame_equal(after[before.columns], before, rtol=1e-5)
    assert reseed_exits_with("report", SWEEP, "--format", "md") == 0
    assert (folder / "report-md" / "report.md").is_file()
    assert "Traceback" not in capsys.readouterr().err
