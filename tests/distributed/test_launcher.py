"""Several processes that train one group: runtime=ddp and runtime=spread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from reseed.distributed.launcher import (
    OUT_OF_MEMORY,
    LocalProcesses,
    SingleProcess,
    lost_process_error,
    open_processes,
)
from reseed.distributed.process_group import ProcessLostError
from reseed.errors import ConfigError
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore
from reseed.train.config import RuntimeConfig

SMALL = ["runtime.device=cpu", "runtime.threads=1"]
MIXED = ["sae=topk,relu", "seed=0", "training.tokens=4096"]


def command(line: Sequence[str], outputs: Path) -> list[str]:
    own = [f"runtime.outputs={outputs}", f"runtime.sweeps={outputs.parent}/sweeps"]
    return [sys.executable, "-m", "reseed", "train", "-m", *SMALL, *line, *own]


def begin(line: Sequence[str], outputs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(line, outputs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def trained(line: Sequence[str], outputs: Path) -> dict[str, Run]:
    done = subprocess.run(command(line, outputs), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {run.signature: run for run in RunStore(outputs).runs()}


def differences(found: dict[str, Run], expected: dict[str, Run]) -> dict[str, float]:
    """Return each run's largest difference of weights, relative to the largest weight."""
    assert found.keys() == expected.keys()
    off = {}
    for signature, run in found.items():
        mine, its = load_sae(run.path).state_dict(), load_sae(expected[signature].path).state_dict()
        scale = {name: float(its[name].abs().max()) + 1e-6 for name in its}
        off[run.id] = max(float((mine[n] - its[n]).abs().max()) / scale[n] for n in its)
    return off


def curve(run: Run) -> list[str]:
    rows = (run.path / "training.csv").read_text().splitlines()
    place = rows[0].split(",").index("seconds")
    return [",".join(r.split(",")[:place] + r.split(",")[place + 1 :]) for r in rows]


@pytest.mark.slow
def test_spread_runs_equal_those_of_one_process(tiny_overrides: list[str], tmp_path: Path) -> None:
    """They are bit-identical. With 3 processes one has no SAE and only helps to make chunks."""
    line = [*tiny_overrides, *MIXED]
    one = trained(line, tmp_path / "one" / "outputs")
    cached = f"runtime.activation_cache={tmp_path}/cache"
    several = ["runtime=spread", "runtime.ranks=3"]
    spread = trained([*line, *several, cached], tmp_path / "spread" / "outputs")
    again = trained([*line, *several, cached], tmp_path / "again" / "outputs")  # from the cache
    for found in (spread, again):
        assert set(differences(found, one).values()) == {0.0}
        for signature, run in found.items():
            assert run.metrics == one[signature].metrics
            assert curve(run) == curve(one[signature])


@pytest.mark.slow
def test_ddp_runs_equal_those_of_one_process_up_to_rounding(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Sums have another order. With more steps the rounding error would grow."""
    line = [*tiny_overrides, "sae=topk,batch_topk,relu,gated,jumprelu,matryoshka", "seed=0"]
    line += ["runtime.log_every_steps=2", "sae.aux_alpha=0.03"]
    short = ["training.tokens=512"]  # 8 steps
    cached = f"runtime.activation_cache={tmp_path}/cache"
    one = trained([*line, *short, cached], tmp_path / "one" / "outputs")  # fills the cache
    several = [*line, *short, "runtime=ddp", "runtime.ranks=2"]
    for more, name in (([], "ddp"), ([cached], "cached")):
        ddp = trained([*several, *more], tmp_path / name / "outputs")
        assert max(differences(ddp, one).values()) < 2e-5
        for signature, run in ddp.items():
            metrics, expected = run.metrics, one[signature].metrics
            assert metrics["fvu"] == pytest.approx(expected["fvu"], rel=1e-4)
            assert metrics["l0"] == pytest.approx(expected["l0"], rel=1e-3)
            mine, its = curve(run), curve(one[signature])
            assert mine[0] == its[0]
            for row, other in zip(mine[1:], its[1:], strict=True):
                numbers, others = ([float(v) for v in r.split(",") if v] for r in (row, other))
                assert numbers == pytest.approx(others, rel=1e-3, abs=1e-6)


def wait_for(true: Callable[[], object], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def followers(leader: int) -> list[int]:
    told = subprocess.run(["pgrep", "-P", str(leader)], capture_output=True, text=True)
    return [int(pid) for pid in told.stdout.split()]


def at_work(line: Sequence[str], outputs: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a command; once a checkpoint exists, return it and the ids of its workers."""
    leader = begin(line, outputs)
    wait_for(lambda: begun(outputs))
    return leader, followers(leader.pid)


def begun(outputs: Path) -> bool:
    return any(outputs.glob("*/checkpoint.pt"))


SLOW = ["sae=topk,batch_topk", "seed=0", "training.tokens=8192", "runtime.checkpoint_every_s=0.1"]


@pytest.fixture(scope="module")
def whole(
    tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Run]]:
    """Return a function that gives the runs of an undisturbed team, by strategy."""
    made: dict[str, dict[str, Run]] = {}

    def of(strategy: str) -> dict[str, Run]:
        if strategy not in made:
            line = [*tiny_overrides, *SLOW, f"runtime={strategy}", "runtime.ranks=2"]
            made[strategy] = trained(line, tmp_path_factory.mktemp(strategy) / "outputs")
        return made[strategy]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "number"),
    [
        ("ddp", signal.SIGTERM),
        pytest.param("spread", signal.SIGINT, marks=pytest.mark.audit),
    ],
)
def test_a_stopped_team_resumes_bit_identically(
    strategy: str,
    number: int,
    whole: Callable[[str], dict[str, Run]],
    tiny_overrides: list[str],
    tmp_path: Path,
) -> None:
    line = [*tiny_overrides, *SLOW, f"runtime={strategy}", "runtime.ranks=2"]
    outputs = tmp_path / "outputs"
    leader, theirs = at_work(line, outputs)
    assert len(theirs) == 1
    os.kill(leader.pid, number)
    said, _ = leader.communicate(timeout=100)
    assert leader.returncode == 128 + number, said
    assert f"stopped by {signal.Signals(number).name}; saved." in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in theirs)
    assert "finished" not in {run.status for run in RunStore(outputs).runs()}
    found = trained(line, outputs)
    expected = whole(strategy)
    assert set(differences(found, expected).values()) == {0.0}
    assert [curve(run) for run in found.values()] == [curve(expected[s]) for s in found]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["spread"])
def test_a_killed_worker_fails_the_group_but_keeps_its_checkpoints(
    strategy: str,
    whole: Callable[[str], dict[str, Run]],
    tiny_overrides: list[str],
    tmp_path: Path,
) -> None:
    line = [*tiny_overrides, *SLOW, f"runtime={strategy}", "runtime.ranks=2"]
    outputs = tmp_path / "outputs"
    leader, (follower,) = at_work(line, outputs)
    os.kill(follower, signal.SIGKILL)
    said, _ = leader.communicate(timeout=100)
    assert leader.returncode == 1, said
    assert "rank 1 ended by SIGKILL" in said, said[-1500:]
    assert all(run.status == "failed" for run in RunStore(outputs).runs())
    assert begun(outputs)
    assert set(differences(trained(line, outputs), whole(strategy)).values()) == {0.0}


@pytest.mark.slow
def test_workers_end_when_their_leader_is_killed(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The leader's locks are free then, so its workers must not write into the folders."""
    outputs = tmp_path / "outputs"
    line = [*tiny_overrides, *SLOW, "runtime=spread", "runtime.ranks=3"]
    leader, theirs = at_work(line, outputs)
    assert len(theirs) == 2
    leader.kill()
    leader.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in theirs), 10)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp"])
def test_only_the_diverging_runs_of_a_team_fail(
    strategy: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    line = [*tiny_overrides, "sae=topk", "seed=0,1", "training.lr=1e-3,1e30",
            f"runtime={strategy}", "runtime.ranks=2"]  # fmt: skip
    done = subprocess.run(command(line, outputs), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    failed = [run for run in RunStore(outputs).runs() if run.status == "failed"]
    assert len(failed) == 2
    assert all("not finite at step" in run.record["error"]["message"] for run in failed)
    assert sum(run.finished for run in RunStore(outputs).runs()) == 2
    assert "2 of 4 runs finished" in done.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 2}, "`ranks` (=2) needs runtime=ddp or runtime=spread: with "
                       "runtime.strategy=single only one process trains"),
        ({"strategy": "ddp", "ranks": 3}, "`ranks` must divide 8 with runtime=ddp: each chunk is "
         "divided into 8 stripes, and every process reads whole stripes; got 3"),
        ({"strategy": "spread", "device": "cuda:1"}, "`device` must be auto, cpu or cuda with "
         "runtime=spread, where each process has its own device; got cuda:1"),
        ({"strategy": "dpp"}, "`strategy` must be one of single, ddp, spread; got 'dpp'. Did you "
         "mean `ddp`?"),
    ],
)  # fmt: skip
def test_a_wrong_runtime_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RuntimeConfig(**settings)  # pyright: ignore
    assert str(refused.value) == message


def test_on_the_cpu_the_number_of_processes_is_required() -> None:
    with pytest.raises(ConfigError, match=r"`runtime\.ranks` is required with runtime=spread on"):
        open_processes(RuntimeConfig(strategy="spread", device="cpu"))


def test_a_team_starts_no_process_before_it_is_needed() -> None:
    team = open_processes(RuntimeConfig(strategy="ddp", ranks=2, device="cpu"))
    assert isinstance(team, LocalProcesses)
    team.end()
    assert isinstance(
        open_processes(RuntimeConfig(strategy="ddp", ranks=1, device="cpu")), SingleProcess
    )
    assert open_processes(RuntimeConfig(device="cpu")).ranks.device == torch.device("cpu")


def test_the_error_of_a_lost_rank_says_how_it_ended() -> None:
    from reseed.system.devices import is_out_of_memory

    assert str(lost_process_error(2, -9)) == "rank 2 ended by SIGKILL; see its output above"
    assert str(lost_process_error(1, 1)).startswith("rank 1 ended with status 1")
    assert is_out_of_memory(lost_process_error(1, OUT_OF_MEMORY))
    assert not is_out_of_memory(ProcessLostError("another process of the group has ended"))
