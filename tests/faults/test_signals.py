"""Ctrl-C and SIGTERM end a command within seconds, save everything and say how to resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import Ended, Forks

from reseed.activations.language_model import LanguageModel
from reseed.cli import run, train
from reseed.compare.pair import Pair
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import RunStore
from reseed.train.callbacks import CheckpointCallback
from reseed.train.run_state import RunState

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)


@pytest.fixture
def line(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*tiny_overrides, "dataset.chunk_tokens=512", "training.tokens=2048"]


def sent_at(
    call: int, number: int, owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """Send this process a signal in the given call of a method; return the list of its times."""
    original, calls, times = getattr(owner, name), [0], []

    def sending(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            times.append(time.perf_counter())
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, sending)
    return times


def weights() -> dict[str, dict[str, torch.Tensor]]:
    return {r.id: load_sae(r.path).state_dict() for r in RunStore("outputs").runs() if r.finished}


def assert_goes_on(command: Callable[[], int]) -> None:
    """Assert that repeating the command gives the same weights as running it without a stop."""
    assert command() == 0
    found = weights()
    Path("outputs").rename("stopped")
    assert command() == 0
    alone = weights()
    assert found.keys() == alone.keys()
    for name, state in alone.items():
        assert all(torch.equal(state[key], found[name][key]) for key in state)


@BOTH
def test_a_group_stopped_between_steps_resumes_bit_identically(
    line: list[str], number: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The signal comes within a block, when the first run is ahead of the second."""
    line = ["-m", *line, "seed=0,1", "layer=0,1"]
    with monkeypatch.context() as patch:
        sent_at(40, number, RunState, "train", patch)
        assert train.main(line) == 128 + number
    said = capsys.readouterr()
    name = signal.Signals(number).name
    assert f"stopped by {name}; saved. The same command continues from here." in said.err
    assert "0 of 4 runs finished, 4 interrupted" in said.out
    assert [r.status for r in RunStore("outputs").runs()] == ["interrupted"] * 4
    assert "Traceback" not in said.err
    assert_goes_on(lambda: train.main(line))


@BOTH
def test_a_signal_interrupts_a_pass_of_the_language_model(
    line: list[str], number: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A pass may take minutes, so it ends at once; the last step is saved."""
    saved: list[int] = []
    with monkeypatch.context() as patch:
        sent_at(3, number, LanguageModel, "activations", patch)
        patch.setattr(
            CheckpointCallback, "_save",
            lambda self, run, then=CheckpointCallback._save: (
                saved.append(run.step), then(self, run),
            ),
        )  # fmt: skip
        assert train.main(line) == 128 + number
    # Chunks have 8 steps. The third pass starts when training takes the second chunk, or the first
    # one if a thread prefetches.
    assert len(saved) == 1
    assert 0 < saved[0] <= 16
    assert "saved. The same command continues from here." in capsys.readouterr().err
    assert_goes_on(lambda: train.main(line))


def test_a_signal_in_the_last_step_starts_neither_measuring_nor_the_next_group(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["-m", *line, "dataset.order_seed=0,1"]
    with monkeypatch.context() as patch:
        sent_at(32, signal.SIGINT, RunState, "train", patch)
        assert train.main(line) == 130
    assert "0 of 2 runs finished, 1 interrupted, 1 not started" in capsys.readouterr().out
    trained: list[int] = []
    original = RunState.train
    monkeypatch.setattr(RunState, "train", lambda *a: (trained.append(1), original(*a)))
    assert train.main(line) == 0
    assert len(trained) == 32, "only the second run's steps"


@BOTH
def test_a_run_stopped_while_it_is_measured_is_not_trained_again(
    line: list[str], number: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        # Four chunks of training, then the held-out ones.
        sent_at(5, number, LanguageModel, "activations", patch)
        assert train.main(line) == 128 + number
    assert "The same command continues from here" in capsys.readouterr().err
    (found,) = RunStore("outputs").runs()
    assert found.status == "interrupted"
    monkeypatch.setattr(RunState, "train", lambda *_: pytest.fail("a step is made twice"))
    assert train.main(line) == 0


def test_a_second_ctrl_c_ends_it_without_another_checkpoint(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        sent_at(5, signal.SIGINT, RunState, "train", patch)
        sent_at(1, signal.SIGINT, CheckpointCallback, "_save", patch)
        assert train.main(line) == 130
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "the same command continues from here" in said.err.lower()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train.main(line) == 0


def test_a_stopped_comparison_starts_no_further_cell(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["comparison=seeds", *line, "seed=0,1", "training.tokens=64", "sae=topk,relu"]

    sent_at(1, signal.SIGTERM, Pair, "row", monkeypatch)
    assert run.main(line) == 143
    said = capsys.readouterr()
    assert (
        "stopped by SIGTERM; saved results are kept. The same command continues from here."
        in said.err
    )
    assert said.out.count("  comparing ") == 1, "the next cell does not start"


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.3, 1.0])
def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path: Path, after: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "reseed", "train", "model=nothing"],
        cwd=tmp_path, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    # The command imports its module after hydra.
    while (told := process.stderr.readline()) and "hydra" not in told:
        pass
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) in (130, 1), "stopped, or refused already: there is no such model"
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "waited"),
    [
        ("reseed.activations.language_model:LanguageModel.activations", 4),
        ("reseed.train.run_state:RunState.train", 9),
        ("reseed.train.run_state:RunState.save", 0),
    ],
)
@BOTH
def test_a_calibration_ends_within_seconds(
    forks: Forks, tiny_overrides: list[str], where: str, waited: int, number: int
) -> None:
    """It does so at every stage, in a separate process, and the same command resumes it."""
    outputs = f"stopped-{where.rpartition('.')[2]}-{number}"
    command = forks.prepare([
        *tiny_overrides, "sae=relu", "sae.target_l0=6", "seed=0,1", "training.tokens=1024",
        "runtime.checkpoint_every_s=0.01", "dataset.chunk_tokens=512",
        f"runtime.outputs={outputs}",
    ])  # fmt: skip
    pid = forks.start(command, {"kind": "slow", "where": where, "seconds": 2.0, "after": waited})
    forks.said_when(pid, lambda said: "slow: " in said)
    started = time.monotonic()
    ended: Ended = forks.end(pid, 0.1, number)
    assert time.monotonic() - started < 10
    assert ended.status == 128 + number
    assert "the same command continues from here" in ended.said.lower()
    assert "Traceback" not in ended.said
    assert forks.run(command).status == 0
