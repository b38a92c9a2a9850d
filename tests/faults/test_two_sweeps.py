"""Two commands that need the same run at once: one trains it, the other waits and reuses it."""

from __future__ import annotations

import os
import re
import shutil
import signal

import pytest
from forks import Forks

from reseed.store.runs import RunStore

SLOWLY = {"kind": "slow", "where": "reseed.train.run_state:RunState.train", "seconds": 0.15}
TRAINED = "training 1 SAE ("
FOLDER = "shared"


@pytest.fixture
def command(forks: Forks, tiny_overrides: list[str]) -> list[str]:
    """Return a command that trains one run of 16 steps, with a checkpoint after each."""
    shutil.rmtree(forks.folder / FOLDER, ignore_errors=True)
    return forks.prepare([
        *tiny_overrides, "sae=topk", "training.tokens=1024", "dataset.held_out_tokens=512",
        "runtime.checkpoint_every_s=1e-9", f"runtime.outputs={FOLDER}",
    ])  # fmt: skip


def waiting(said: str) -> re.Match[str] | None:
    return re.search(r"waiting for (\S+): held by process (\d+) on (\S+) since \S+", said)


@pytest.mark.slow
def test_one_trains_and_the_other_waits(forks: Forks, command: list[str]) -> None:
    owner = forks.start(command, SLOWLY)
    forks.said_when(owner, lambda said: "slow: " in said)
    other = forks.start(command)
    told = waiting(forks.said_when(other, lambda said: waiting(said) is not None))
    assert told is not None
    assert int(told[2]) == owner
    (found,) = RunStore(forks.folder / FOLDER).runs()
    assert told[1] == found.id
    assert found.status == "running"
    first, second = forks.end(owner), forks.end(other)
    assert (first.status, second.status) == (0, 0)
    assert TRAINED in first.said
    assert TRAINED not in second.said
    assert found.finished
    assert f"process {other}" in found.owner


@pytest.mark.slow
def test_a_waiting_command_resumes_the_run_of_a_killed_owner(
    forks: Forks, command: list[str]
) -> None:
    """The result equals that of a command without a kill."""
    alone = forks.run(command)
    assert alone.status == 0, alone.said
    (found,) = RunStore(forks.folder / FOLDER).runs()
    expected = (found.path / "sae.safetensors").read_bytes()
    shutil.rmtree(found.path)

    owner = forks.start(command, SLOWLY)
    forks.said_when(owner, lambda said: said.count("slow: ") > 4)
    other = forks.start(command)
    forks.said_when(other, lambda said: waiting(said) is not None)
    assert forks.end(owner, 0.0, signal.SIGKILL).killed
    ended = forks.end(other)
    assert ended.status == 0, ended.said
    assert TRAINED in ended.said
    assert re.search(r"resuming after [\d,]+ of 1,024 tokens", ended.said)
    assert found.finished
    assert (found.path / "sae.safetensors").read_bytes() == expected
    assert [name for name in os.listdir(found.path) if ".part-" in name] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_waiting_command_can_be_stopped(forks: Forks, command: list[str], number: int) -> None:
    owner = forks.start(command, SLOWLY)
    forks.said_when(owner, lambda said: "slow: " in said)
    other = forks.start(command)
    forks.said_when(other, lambda said: waiting(said) is not None)
    stopped = forks.end(other, 0.0, number)
    assert stopped.status == 128 + number
    assert stopped.seconds < 5
    assert "Traceback" not in stopped.said
    assert forks.end(owner).status == 0


@pytest.mark.slow
def test_overlapping_sweeps_train_each_run_once(forks: Forks, tiny_overrides: list[str]) -> None:
    """Any of them may reach a run first; none waits for ever."""
    folder = forks.folder / "overlap"
    shutil.rmtree(folder, ignore_errors=True)
    sweeps = [
        forks.prepare([
            *tiny_overrides, "training.tokens=1024", "dataset.held_out_tokens=512",
            f"runtime.outputs={folder}", "dataset.order_seed=0,1", f"seed={seeds}",
        ])
        for seeds in ("0,1", "1,2", "2,0")
    ]  # fmt: skip
    slowly = SLOWLY | {"seconds": 0.02}
    ended = [forks.end(pid) for pid in [forks.start(sweep, slowly) for sweep in sweeps]]
    assert [end.status for end in ended] == [0, 0, 0], [end.said for end in ended]
    begun = r"(?:training|group \d+ of \d+:) (\d+) SAE"
    counts = [int(n) for end in ended for n in re.findall(begun, end.said)]
    assert sum(counts) == 6
    assert all(run.finished for run in RunStore(folder).runs())
