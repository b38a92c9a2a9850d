"""Several processes that train one group: runtime=ddp and runtime=spread."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from commands import (
    SLOW,
    at_work,
    begin,
    command,
    curve,
    differences,
    followers,
    trained,
    wait_for,
)

from reseed.distributed.launcher import (
    OUT_OF_MEMORY,
    LocalProcesses,
    SingleProcess,
    lost_process_error,
    open_processes,
)
from reseed.distributed.process_group import ProcessLostError
from reseed.errors import ConfigError
from reseed.store.runs import Run, RunStore
from reseed.train.config import RuntimeConfig

MIXED = ["sae=topk,relu", "seed=0", "training.tokens=4096"]


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
            assert run.record["data"] == one[signature].record["data"]
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
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.audit)])
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.audit), "spread"])
def test_after_workers_killed_at_any_moment_the_same_command_ends_bit_identically(
    strategy: str,
    kills: int,
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A killed worker fails its group, which keeps its checkpoints."""
    temporary, outputs = tmp_path / "temporary", tmp_path / "outputs"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    line = [*tiny_overrides, *SLOW, f"runtime={strategy}", "runtime.ranks=2"]
    leader, _ = with_workers(line, tmp_path / "undisturbed" / "outputs")
    started = time.monotonic()
    said, _ = leader.communicate(timeout=300)
    assert leader.returncode == 0, said
    longest = time.monotonic() - started
    seed = time.time_ns()
    print(f"seed of the moments: {seed}")  # pytest prints it if the test fails
    moments = random.Random(seed)
    for _ in range(kills):
        leader, workers = with_workers(line, outputs)
        with suppress(subprocess.TimeoutExpired):
            leader.wait(moments.uniform(0, longest))
        saved = list(outputs.glob("*/checkpoint.pt"))
        for worker in workers:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(worker, signal.SIGKILL)
        said, _ = leader.communicate(timeout=100)
        assert leader.returncode == 0 or "rank 1 ended by SIGKILL" in said, said
        assert {run.status for run in RunStore(outputs).runs()} <= {"failed", "finished"}
        assert all(path.exists() or Run(path.parent).finished for path in saved)
    found = trained(line, outputs)
    expected = {run.signature: run for run in RunStore(tmp_path / "undisturbed/outputs").runs()}
    assert set(differences(found, expected).values()) == {0.0}
    assert [curve(run) for run in found.values()] == [curve(expected[s]) for s in found]
    assert [run.metrics for run in found.values()] == [expected[s].metrics for s in found]
    assert list(temporary.glob("reseed-*")) == []


def with_workers(line: Sequence[str], outputs: Path) -> tuple[subprocess.Popen[str], Sequence[int]]:
    """Start a command; once it has workers or has ended, return it and their process ids."""
    leader = begin(line, outputs)
    wait_for(lambda: followers(leader.pid) or leader.poll() is not None)
    return leader, followers(leader.pid)


@pytest.mark.slow
def test_workers_end_when_their_leader_is_killed(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's locks are free then, so its workers must not write into the folders."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    outputs = tmp_path / "outputs"
    line = [*tiny_overrides, *SLOW, "runtime=spread", "runtime.ranks=3"]
    leader, theirs = at_work(line, outputs)
    assert len(theirs) == 2
    assert list(temporary.glob("reseed-*"))
    leader.kill()
    leader.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in theirs), 10)
    assert list(temporary.glob("reseed-*")) == []


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
