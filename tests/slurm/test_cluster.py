"""Sweeps on a real SLURM: submitted, killed, stopped at the time limit, cancelled."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from one_node import HERE, Desk, local

from reseed.cli import run, status, train
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import RunStore

pytestmark = pytest.mark.slow


def assert_same_weights(one: str = "outputs", other: str = "local/outputs") -> None:
    """Assert that two folders hold the same runs with bit-identical weights."""
    found, alone = RunStore(one).runs(), RunStore(other).runs()
    assert [run.id for run in found] == [run.id for run in alone]
    for mine, its in zip(found, alone, strict=True):
        state = load_sae(its.path).state_dict()
        assert all(
            torch.equal(state[key], value)
            for key, value in load_sae(mine.path).state_dict().items()
        )


def test_a_comparison_is_submitted_once_and_equals_the_local_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*desk.line, "comparison=seeds", "sae=topk,relu", "seed=0,1"]
    assert run.main([*line, "wait=false"]) == 0
    said = capsys.readouterr().out
    assert "submitting 4 runs in 1 job" in said
    jobs = desk.jobs
    assert [job.kind for job in jobs] == ["train", "compare", "compare", "collect"]
    assert f"`reseed status {desk.sweep.path}` shows the progress" in said
    assert {state.state for state in desk.states} <= {"queued", "starting", "running"}

    assert run.main(line) == 0  # the same sweep again waits for the submitted jobs
    said = capsys.readouterr().out
    assert "waiting for 4 jobs" in said
    assert "submitting" not in said
    assert desk.jobs == jobs
    assert {state.state for state in desk.states} == {"done"}

    assert run.main(line) == 0  # again, with nothing left to do
    assert "waiting" not in capsys.readouterr().out
    assert desk.jobs == jobs
    assert local(line, monkeypatch, run) == 0
    assert_same_weights()
    (other,) = Path("local/sweeps").iterdir()
    for name in ("summary.md", "pairs.csv"):
        assert (desk.sweep.path / name).read_text() == (other / name).read_text()


def test_a_killed_job_counts_as_failed_and_ends_the_wait(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        desk.cluster.wait_for(lambda: list(Path("sweeps").glob("*/slurm/jobs.json")))
        desk.cluster.wait_for(desk.trains)
        owner = RunStore("outputs").runs()[0].owner
        os.kill(int(owner.split()[1]), signal.SIGKILL)

    line = ["-m", *desk.breaking("slow:0.3"), "seed=0,1", "runtime.checkpoint_every_s=0.3"]
    killer = threading.Thread(target=kill)
    killer.start()
    assert train.main(line) == 1
    killer.join()
    said = capsys.readouterr().out
    (job,) = desk.jobs
    assert said.count(f"its job {job.job} is gone (failed)") == 2
    assert "Killed" in said
    assert [state.state for state in desk.states] == ["failed", "failed"]
    assert status.main([desk.sweep.path.name]) == 0
    assert "2 failed" in capsys.readouterr().out

    assert train.main(["-m", *desk.line, "seed=0,1"]) == 0  # a new job, from the checkpoints
    assert len(desk.jobs) == 2
    assert "resuming after" in desk.printed(desk.jobs[1])
    assert local(["-m", *desk.line, "seed=0,1"], monkeypatch, train) == 0
    assert_same_weights()


def test_a_job_requeued_at_its_time_limit_ends_bit_identically(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is real: SLURM signals some 40 s before it, and would kill the job at it."""
    line = ["-m", *desk.breaking("slow:2"), "seed=0", "wait=false", "hydra.launcher.timeout_min=1"]
    assert (
        train.main([*line, "hydra.launcher.signal_delay_s=10", "hydra.launcher.requeue=true"]) == 0
    )
    (job,) = desk.jobs
    desk.cluster.wait_for(lambda: desk.states[0].note == "requeued", 90)
    (state,) = desk.states
    assert state.state == "queued"
    assert state.tokens
    assert state.tokens < state.of
    desk.cluster.start_now(job.job)
    desk.cluster.wait_for(lambda: desk.states[0].state == "done")
    assert desk.jobs == [job]
    assert "resuming after" in desk.printed(job)
    assert local(["-m", *desk.line, "seed=0"], monkeypatch, train) == 0
    assert_same_weights()


def test_a_job_requeued_by_slurm_continues_from_its_checkpoint(desk: Desk) -> None:
    """As in pre-emption with PreemptMode=REQUEUE, the job gets only SIGTERM."""
    line = ["-m", *desk.breaking("slow:0.5"), "seed=0", "wait=false"]
    assert train.main(line) == 0
    desk.cluster.wait_for(desk.trains)
    (job,) = desk.jobs
    subprocess.run(["scontrol", "requeue", job.job], check=True)
    desk.cluster.wait_for(lambda: desk.states[0].state == "queued")
    assert train.main(line) == 0  # the job is queued, so nothing is submitted
    desk.cluster.start_now(job.job)
    desk.cluster.wait_for(lambda: desk.states[0].state == "done")
    assert desk.jobs == [job]
    assert "resuming after" in desk.printed(job)


def test_a_job_out_of_retries_fails_its_runs(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["-m", *desk.breaking("slow:0.5"), "seed=0,1", "wait=false"]
    assert train.main([*line, "hydra.launcher.max_num_timeout=0"]) == 0
    desk.cluster.wait_for(desk.trains)
    (job,) = desk.jobs
    subprocess.run(["scancel", "--signal=USR2", job.job], check=True)
    desk.cluster.wait_for(lambda: not desk.queue())
    assert all(state.note.startswith("out of retries: ") for state in desk.states)
    assert status.main([desk.sweep.path.name]) == 0
    assert "2 failed" in capsys.readouterr().out
    assert train.main(["-m", *desk.line, "seed=0,1"]) == 0  # submits a new job
    assert "resuming after" in desk.printed(desk.jobs[1])


def test_cancel_stops_all_jobs_after_a_checkpoint(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*desk.breaking("slow:0.5"), "comparison=seeds", "seed=0,1", "wait=false"]
    assert run.main(line) == 0
    desk.cluster.wait_for(desk.trains)
    assert status.main([desk.sweep.path.name]) == 0
    said = capsys.readouterr().out
    assert re.search(r"running +[\d,]+ +4,096 +\d+% +\d+", said)
    assert "comparisons: 1 queued" in said
    assert status.cancel(["seeds"]) == 0
    assert f"cancelled 3 jobs of {desk.sweep.path}" in capsys.readouterr().out
    desk.cluster.wait_for(lambda: not desk.queue())
    assert {state.state for state in desk.states} == {"cancelled"}
    runs = RunStore("outputs").runs()
    assert [run.record["status"] for run in runs] == ["interrupted"] * 2
    # Cancelling left time to save: no checkpoint was due within the first half minute.
    assert all((run.path / "checkpoint.pt").is_file() for run in runs)
    assert status.cancel(["seeds"]) == 0
    assert "no job is queued or running" in capsys.readouterr().out


def test_ctrl_c_while_waiting_cancels_the_jobs(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        desk.cluster.wait_for(lambda: list(Path("sweeps").glob("*/slurm/jobs.json")))
        desk.cluster.wait_for(desk.trains)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert train.main(["-m", *desk.breaking("slow:0.5"), "seed=0,1"]) == 130
    thread.join()
    assert "interrupted; cancelled 1 job." in capsys.readouterr().err
    desk.cluster.wait_for(lambda: not desk.queue())


def test_a_failing_run_is_reported_with_its_traceback(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["-m", *desk.breaking("fail:seed1"), "seed=0,1,2"]) == 1
    said = capsys.readouterr().out
    assert "failed: tiny-llama" in said
    assert status.main([desk.sweep.path.name]) == 0
    said = capsys.readouterr().out
    assert "1 failed" in said
    assert "2 done" in said
    assert "RuntimeError: in two lines" in said
    assert "Traceback (most recent call last):" in said
    assert 'raise RuntimeError("made to fail\\nin two lines")' in said


TOGETHER = ["hydra.launcher.tasks_per_node=2", "runtime.device=cpu"]


@pytest.mark.parametrize("strategy", ["spread"])
def test_tasks_of_a_job_train_as_local_processes_do(
    strategy: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes started by SLURM and by a command give bit-identical weights."""
    line = ["-m", *desk.line, "sae=topk,batch_topk", "seed=0", f"runtime={strategy}"]
    assert train.main([*line, *TOGETHER]) == 0
    (job,) = desk.jobs
    assert "2 of 2 runs finished" in desk.printed(job)
    assert not list(Path("sweeps").glob("*/slurm/.ranks-*"))
    assert local([*line, "runtime.device=cpu", "runtime.ranks=2"], monkeypatch, train) == 0
    assert_same_weights()


@pytest.mark.audit
def test_tasks_of_a_requeued_job_continue_together(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["-m", *desk.breaking("slow:0.3"), "seed=0", "runtime=ddp", *TOGETHER, "wait=false"]
    assert train.main(line) == 0
    desk.cluster.wait_for(desk.trains)
    (job,) = desk.jobs
    subprocess.run(["scancel", "--signal=USR2", job.job], check=True)
    desk.cluster.wait_for(lambda: desk.states[0].note == "requeued", 90)
    desk.cluster.start_now(job.job)
    desk.cluster.wait_for(lambda: desk.states[0].state == "done")
    assert "resuming after" in desk.printed(job)
    desk.cluster.wait_for(lambda: not list(Path("sweeps").glob("*/slurm/.ranks-*")))
    own = ["runtime=ddp", "runtime.ranks=2", "runtime.device=cpu"]
    assert local(["-m", *desk.line, "seed=0", *own], monkeypatch, train) == 0
    assert_same_weights()


def test_several_nodes_need_a_distributed_strategy(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["-m", *desk.line, "seed=0", "hydra.launcher.nodes=2"]) == 1
    assert (
        "`hydra.launcher.nodes` (=2) needs runtime=ddp or runtime=spread: with "
        "runtime.strategy=single one process trains" in capsys.readouterr().err
    )


def test_a_refused_submission_is_reported(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["-m", *desk.line, "seed=0", "hydra.launcher.partition=nowhere"]) == 1
    said = capsys.readouterr().err
    # sbatch's own message comes before.
    assert said.splitlines()[-1].startswith("error: SLURM refuses the job: sbatch: error: ")
    assert "invalid partition" in said
    assert not (desk.sweep.path / "slurm/jobs.json").exists()


def test_hydras_own_slurm_launcher_runs_one_job_per_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", f"{HERE / 'standin'}:{os.environ['PATH']}")
    own = [word for word in desk.line if "hydra" not in word]
    more = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=5"]
    more += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]
    assert train.main(["-m", *own, *more, "seed=0,1"]) == 0
    assert [len(run.record["group"]) for run in RunStore("outputs").runs()] == [1, 1]
