"""A failed run is reported and recorded with its traceback, and does not stop others."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from reseed.cli import run, train
from reseed.cli.hydra_app import CommandLine
from reseed.store.runs import Run, RunStore
from reseed.train.run_state import RunState


@pytest.fixture
def line(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*tiny_overrides, "training.tokens=1024"]


def by_seed() -> dict[int, object]:
    return {r.record["experiment"]["seed"]: r for r in RunStore("outputs").runs()}


def test_only_the_run_that_diverges_fails(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["-m", *line, "training.lr=1e38,1e-3"]) == 1
    said = capsys.readouterr().out
    states = {r.record["experiment"]["training"]["lr"]: r for r in RunStore("outputs").runs()}
    assert {lr: r.status for lr, r in states.items()} == {1e38: "failed", 1e-3: "finished"}
    bad = states[1e38]
    assert "Traceback" not in said, "the message suffices"
    assert f"failed: {bad.id}: the loss is not finite at step " in said
    assert "NotFiniteError" in bad.record["error"]["traceback"]


@pytest.mark.parametrize("where", ["start", "train", "load"])
def test_an_error_in_one_run_does_not_stop_the_others(
    line: list[str], where: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its folder has the whole traceback, the summary the place of the error. Without the error the
    same command finishes the run."""
    line = ["-m", *line, "seed=0,1,2"]
    original = getattr(RunState, where)

    def broken(self: RunState, *arguments: object) -> object:
        if "seed1" in self.id and self.step == (where == "train") * 7:
            raise ZeroDivisionError("by nothing at all")
        return original(self, *arguments)

    if where == "load":
        assert train.main([*line, "runtime.checkpoint_every_s=1e-9"]) == 0
        for found in RunStore("outputs").runs():
            (found.path / "metrics.json").unlink()
            state = {"step": 1}  # an incomplete checkpoint
            torch.save(state, found.path / "checkpoint.pt") if "seed1" in found.id else None
        capsys.readouterr()
    else:
        monkeypatch.setattr(RunState, where, broken)
    assert train.main(line) == 1
    said = capsys.readouterr().out
    runs = by_seed()
    assert [runs[seed].status for seed in range(3)] == ["finished", "failed", "finished"]
    error = runs[1].record["error"]
    assert error["traceback"].startswith("Traceback (most recent call last)")
    summary = said[said.rindex("failed: ") :]
    assert summary.startswith(f"failed: {runs[1].id}: {error['message']}")
    assert f"the full traceback is in {runs[1].path / 'run.json'}" in summary
    assert 'File "' in summary
    if where == "train":
        assert runs[1].record["failed_at_step"] == 7
        assert 'raise ZeroDivisionError("by nothing at all")' in summary
    monkeypatch.setattr(RunState, where, original)
    (runs[1].path / "checkpoint.pt").unlink(missing_ok=True)
    assert train.main(line) == 0


def test_a_state_that_is_not_finite_is_not_checkpointed(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a failure the run resumes from finite weights."""
    line = [*line, "runtime.checkpoint_every_s=1e-9"]
    original = RunState.train

    def poisoned(self: RunState, x: torch.Tensor, optimizer: object) -> None:
        original(self, x * float("nan") if self.step == 5 else x, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "train", poisoned)
        assert train.main(line) == 1
    (found,) = RunStore("outputs").runs()
    assert found.record["failed_at_step"] == 5
    state = torch.load(found.path / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] <= 5
    assert all(torch.isfinite(tensor).all() for tensor in state["sae"].values())
    capsys.readouterr()
    assert train.main(line) == 0
    done = state["step"] * 64
    assert f"resuming after {done} of 1,024 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_a_comparison_names_its_incomplete_cells(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the error of the failed cell and the table of the other."""
    original = RunState.train

    def broken(self: RunState, *arguments: object) -> None:
        if "relu" in self.id and self.step == 3:
            raise RuntimeError("no such thing")
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunState, "train", broken)
    line = ["comparison=seeds", *line, "seed=0,1", "sae=topk,relu"]
    assert run.main(line) == 1
    said = capsys.readouterr().out
    assert "failed: " in said
    assert "(2 seeds): no such thing" in said
    assert said.splitlines()[-1] == "incomplete: sae=relu: 0 of 2 runs (no such thing)"
    (sweep,) = Path("sweeps").iterdir()
    assert "incomplete: sae=relu: 0 of 2 runs" in (sweep / "summary.md").read_text()
    rows = [json.loads(row) for row in (sweep / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 4


def test_a_finished_run_keeps_no_checkpoint(line: list[str]) -> None:
    """The next command deletes one that a killed process left behind."""
    assert train.main(line) == 0
    (found,) = RunStore("outputs").runs()
    (found.path / "checkpoint.pt").write_bytes(b"old")
    assert train.main(line) == 0
    assert not (found.path / "checkpoint.pt").exists()


@pytest.mark.parametrize("key", ["runtime.outputs", "runtime.sweeps"])
def test_a_folder_that_cannot_be_written_is_named_before_training(
    line: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("")
    for value, reason in (("taken", "it is a file"), ("taken/below", "Not a directory")):
        assert train.main(["-m", *line, "seed=0,1", f"{key}={value}"]) == 1
        said = capsys.readouterr()
        told = f"error: `{key}` must be a folder that can be written; got {value} ({reason})"
        assert told in said.err
        assert "training" not in said.out


def test_a_finished_sweep_needs_no_writable_folder(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive of runs may be read-only."""
    assert train.main(line) == 0

    def refused(**given: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert train.main(line) == 0
    assert "nothing to train: 1 run already finished" in capsys.readouterr().out
    assert train.main([*line, "seed=1"]) == 1
    assert "`runtime.outputs` must be a folder that can be written" in capsys.readouterr().err


def test_an_error_that_no_record_holds_is_told(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = Run.begin

    def refused(self: Run, record: dict[str, object]) -> None:
        if "seed1" in self.id:
            raise PermissionError(13, "Permission denied", str(self.path / "run.json"))
        begin(self, record)

    monkeypatch.setattr(Run, "begin", refused)
    assert train.main(["-m", *line, "seed=0,1"]) == 1
    said = capsys.readouterr().out
    assert "seed1" in said
    assert "PermissionError: [Errno 13] Permission denied: " in said
    assert "not trained" not in said


def test_an_error_of_a_launcher_is_told(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: CommandLine, *given: object) -> None:
        raise RuntimeError("the queue is closed")

    monkeypatch.setattr(CommandLine, "launch", fails)
    assert train.main(["-m", *line, "seed=0,1", "hydra/launcher=basic"]) == 1
    assert "(2 seeds): RuntimeError: the queue is closed" in capsys.readouterr().out
