"""Hydra's own launchers, with one run per job; and hydra/launcher=slurm with fake commands."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from reseed.cli import evaluate, status, train
from reseed.cli.cluster import states as states_module
from reseed.cli.cluster.queue import (
    InQueue,
    QueueError,
    Record,
    SlurmSettings,
    Submitted,
    last_states,
    queue,
)
from reseed.cli.cluster.states import QueueSnapshot, RunState, cancel_sweep, counts, states
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError, ReseedError
from reseed.store.find import find_sweep
from reseed.store.runs import PROGRESS_FILE, Run, RunStore
from reseed.store.sweeps import Sweep


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_launcher(name: str) -> list[str]:
    """Return the overrides that choose a launcher; skip the test if it is not installed."""
    plugin = {"joblib": "hydra_joblib_launcher", "submitit_local": "hydra_submitit_launcher"}
    if name in plugin and importlib.util.find_spec(f"hydra_plugins.{plugin[name]}") is None:
        pytest.skip(f"needs {plugin[name]}")
    more = {
        "joblib": ["hydra.launcher.n_jobs=2"],
        "submitit_local": ["hydra.launcher.timeout_min=5"],
    }
    return [f"hydra/launcher={name}", *more.get(name, [])]


LAUNCHERS = [
    "basic",
    pytest.param("joblib", marks=pytest.mark.slow),
    pytest.param("submitit_local", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_other_launchers_train_one_run_in_each_job(
    name: str, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
    line = ["-m", *tiny_overrides, "runtime.threads=1", "training.tokens=2048", "seed=0,1"]
    line += with_launcher(name)
    assert train.main(line) == 0
    assert "2 runs in outputs/" in capsys.readouterr().out
    runs = RunStore("outputs").runs()
    assert [r.status for r in runs] == ["finished"] * 2
    assert [len(r.record["group"]) for r in runs] == [1, 1]
    # A failure is reported, even if the worker's traceback is lost.
    assert train.main([*line, "training.lr=1e30"]) == 1
    said = capsys.readouterr().out
    assert "failed: " in said
    assert "not finite" in said or "NaN" in said or "infin" in said


@pytest.mark.parametrize(
    "name",
    [*LAUNCHERS[:2], pytest.param("submitit_local", marks=(pytest.mark.slow, pytest.mark.audit))],
)
def test_other_launchers_run_one_evaluation_in_each_job(
    name: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
    assert train.main([*tiny_overrides, "runtime.threads=1", "training.tokens=2048"]) == 0
    (own,) = RunStore("outputs").runs()
    asked = ["evaluation=reconstruction,faithfulness", "evaluation.tokens=500"]
    assert evaluate.main([own.id, "runtime.threads=1", *asked, *with_launcher(name)]) == 0
    found = [path.parent.name for path in own.path.glob("evaluations/*/result.json")]
    assert sorted(each.partition("-")[0] for each in found) == ["faithfulness", "reconstruction"]


def test_a_misspelt_setting_is_refused(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["-m", *tiny_overrides, "seed=0", "hydra/launcher=slurm"]
    assert train.main([*line, "hydra.launcher.partion=gpu"]) == 1
    assert "hydra.launcher.partion" in capsys.readouterr().err
    assert train.main([*line, "hydra.launcher.timeout_min=soon"]) == 1
    said = capsys.readouterr().err
    assert "`hydra.launcher.timeout_min` must be an integer, at least 1; got 'soon'" in said
    assert not Path("outputs").exists()


def test_not_waiting_needs_slurm(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_overrides, "wait=false"]) == 1
    assert "`wait`=false needs hydra/launcher=slurm" in capsys.readouterr().err


def test_missing_slurm_commands_are_reported(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    assert train.main([*tiny_overrides, "hydra/launcher=slurm"]) == 1
    assert "there is no `sbatch` here" in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_settings_get_the_names_of_submitit_and_slurm() -> None:
    line = CommandLine("train", ["hydra/launcher=slurm", "hydra.launcher.partition=gpu",
                                 "hydra.launcher.gpus_per_node=1", "hydra.launcher.mem_gb=32",
                                 "hydra.launcher.setup=['module load cuda']",
                                 "+hydra.launcher.additional_parameters.nice=100"])  # fmt: skip
    name, node = line.launcher
    assert name == "slurm"
    assert SlurmSettings.of(node).submitit("a", "afterany:3") == {
        "name": "a", "slurm_partition": "gpu", "nodes": 1, "tasks_per_node": 1,
        "gpus_per_node": 1, "mem_gb": 32.0,
        "cpus_per_task": 4, "timeout_min": 240, "slurm_array_parallelism": 64,
        "slurm_signal_delay_s": 120, "slurm_setup": ["module load cuda"],
        "slurm_dependency": "afterany:3",
        "slurm_srun_args": ["--open-mode=append", "--kill-on-bad-exit=1"],
        "slurm_additional_parameters": {"requeue": True, "nice": 100},
    }  # fmt: skip


def test_a_signal_delay_longer_than_the_time_limit_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        SlurmSettings(timeout_min=2, signal_delay_s=120)
    assert str(error.value) == (
        "`signal_delay_s` (=120) must be shorter than the time limit (hydra.launcher.timeout_min=2)"
    )


def commands(monkeypatch: pytest.MonkeyPatch, **what: str) -> None:
    """Replace SLURM's commands by shell scripts."""
    folder = Path("bin")
    folder.mkdir(exist_ok=True)
    for name, script in what.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder.resolve()}:/usr/bin:/bin")


def test_the_queue_and_final_states_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    commands(
        monkeypatch,
        squeue="echo '12_0|RUNNING|None'; echo '12_1|PENDING|Priority'; "
        "echo '13|PENDING|DependencyNeverSatisfied'",
        sacct="echo '12_2|CANCELLED by 0'; echo '14|OUT_OF_MEMORY'",
        scontrol='[ "$4" = 15 ] && echo "JobId=15 JobName=a JobState=FAILED Reason=None"; '
        '[ "$4" = 15 ]',
    )
    assert queue() == {"12_0": InQueue("RUNNING"), "12_1": InQueue("PENDING", "Priority")}
    assert last_states(["12_2", "14", "15", "16"]) == {
        "12_2": "CANCELLED", "14": "OUT_OF_MEMORY", "15": "FAILED",
    }  # fmt: skip
    commands(monkeypatch, squeue="echo 'no controller' >&2; exit 1")
    with pytest.raises(QueueError, match="SLURM does not answer: `squeue` said: no controller"):
        queue()


def test_the_plan_is_made_for_the_resources_of_a_node(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The node may have a device that this machine lacks; its memory is that requested."""
    line = ["-m", *tiny_overrides, "seed=0,1", "hydra/launcher=slurm", "plan_only=true"]
    assert train.main([*line, "runtime.device=cuda:7", "hydra.launcher.gpus_per_node=8"]) == 0
    assert "plan: 2 runs in 1 job; set runtime.tflops" in capsys.readouterr().out
    assert train.main([*line, "hydra.launcher.mem_gb=0.0001"]) == 0
    assert "plan: 2 runs in 2 jobs; set runtime.tflops" in capsys.readouterr().out
    assert train.main([*line, "runtime.tflops=400"]) == 0
    assert "plan: 2 runs in 1 group, on cpu about 1 s" in capsys.readouterr().out


def test_queued_runs_are_not_submitted_again(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    sbatch = 'cat "$1" >> asked; echo "Submitted batch job $(grep -c partition asked)"'
    commands(monkeypatch, sbatch=sbatch, srun="exit 1", scancel="exit 1", sacct="exit 1",
             squeue="echo '1|PENDING|Priority'", scontrol="exit 1")  # fmt: skip
    line = [*tiny_overrides, "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "wait=false"]
    assert train.main(["-m", *line, "layer=1", "seed=0,1"]) == 0
    assert train.main(["-m", *line, "layer=1", "seed=1,0"]) == 0  # the same sweep
    assert Path("asked").read_text().count("#SBATCH --partition=gpu") == 1
    assert "submitting 2 runs in 1 job" in capsys.readouterr().out
    # The first job has left the queue without a result, so the runs are submitted once again.
    commands(monkeypatch, squeue="echo '2|PENDING|Priority'")
    assert train.main(["-m", *line, "layer=1", "seed=0,1"]) == 0
    assert train.main(["-m", *line, "layer=1", "seed=0,1"]) == 0
    assert Path("asked").read_text().count("#SBATCH --partition=gpu") == 2
    assert not Path("outputs").exists()


@pytest.fixture
def sweep(tiny_overrides: list[str]) -> Sweep:
    """Create a sweep of a finished run and a run that was not started."""
    assert train.main([*tiny_overrides, "training.tokens=1024", "seed=0"]) == 0
    (done,) = RunStore("outputs").runs()
    missing = done.path.with_name(done.id.replace("seed0", "seed1")[:-12] + "0123456789ab")
    found = Sweep(Path("sweeps/train-aaaaaaaaaaaa"))
    found.path.mkdir(parents=True)
    rows = [
        {
            "axes": {},
            "overrides": [],
            "signature": Run(p).signature,
            "run": f"../../outputs/{p.name}",
        }
        for p in (done.path, missing)
    ]
    (found.path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def seen_as(
    sweep: Sweep, queue: dict[str, InQueue] | None, **ended: str
) -> tuple[RunState, RunState]:
    names = {name.removeprefix("job"): state for name, state in ended.items()}
    first, second = states(sweep, QueueSnapshot(Record(sweep.path), queue, names))
    return first, second


def test_states_follow_files_queue_and_logs(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, other = seen_as(sweep, {})
    assert (done.state, other.state) == ("done", "not started")
    signature = sweep.runs()[1].signature
    record = Record(sweep.path)
    with record.lock():
        record.add([Submitted("7", "train", "2026-01-01T00:00:00+00:00", (signature,))])

    assert seen_as(sweep, {"7": InQueue("PENDING", "BeginTime")})[1].note == "requeued"
    assert seen_as(sweep, {"7": InQueue("RUNNING")})[1].state == "starting"
    assert seen_as(sweep, None)[1].state == "submitted"
    assert seen_as(sweep, {}, job7="COMPLETED")[1].state == "not started"
    record.log("7").write_text(
        "Traceback\nstep 3\nsrun: error: n: task 0: Killed\nsrun: Force Terminated StepId=7.0\n"
    )
    killed = seen_as(sweep, {}, job7="OUT_OF_MEMORY")[1]
    assert killed.state == "failed"
    assert killed.note == (
        f"its job 7 is gone (out of memory); {record.log('7')} ends: srun: error: n: task 0: Killed"
    )
    commands(monkeypatch, squeue="true", sacct="echo '7|FAILED'", scontrol="exit 1")
    assert status.main(["train-a"]) == 0
    said = capsys.readouterr().out
    assert "1 done, 1 failed" in said
    assert "task 0: Killed" in said
    with record.lock():
        record.add([Submitted("8", "compare", "", cell="sae=topk"), Submitted("9", "collect", "")])
    commands(monkeypatch, squeue="echo '9|PENDING|Dependency'", sacct="echo '8|FAILED'")
    record.log("8").write_text("ReseedError: no weights\nsrun: Exited with exit code 1\n")
    assert status.main(["train-a"]) == 0
    said = capsys.readouterr().out
    assert "tables: 1 queued" in said
    assert "not compared: sae=topk: its job 8 is gone (failed)" in said
    assert "ends: ReseedError: no weights" in said
    with record.lock():
        record.mark_cancelled(["7"])
    assert seen_as(sweep, {}, job7="CANCELLED")[1].state == "cancelled"


def test_a_running_run_shows_its_progress(sweep: Sweep) -> None:
    """A run that failed and was submitted again counts as queued."""
    done, missing = sweep.runs()
    record = done.record
    identity = record["identity"] | {"seed": 1}
    from reseed.config import digest

    other = missing.path.with_name(f"a-{digest(identity)}")
    manifest = (sweep.path / "manifest.jsonl").read_text()
    (sweep.path / "manifest.jsonl").write_text(manifest.replace(missing.id, other.name))
    run = Run(other)
    with run.lock() as owned:
        assert owned
        run.begin(record | {"identity": identity})
        (run.path / PROGRESS_FILE).write_text('{"tokens": 256, "tokens_per_s": 50.0}')
        state = seen_as(sweep, {})[1]
        assert state == RunState(run.id, "running", "", 256, 1024, 50.0)
        assert counts([state]) == "1 running, 25% of the tokens"
        run.fail(RuntimeError("first\nlast"))
        failed = seen_as(sweep, {})[1]
        assert (failed.state, failed.note) == ("failed", "RuntimeError: last")
        assert failed.traceback.startswith("RuntimeError: first")
    later = [Submitted("8", "train", "2999-01-01T00:00:00+00:00", (run.signature,))]
    with Record(sweep.path).lock():
        Record(sweep.path).add(later)
    assert seen_as(sweep, {"8": InQueue("PENDING")})[1].state == "queued"


def test_cancel_stops_dependent_jobs_first(sweep: Sweep, monkeypatch: pytest.MonkeyPatch,
                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert cancel_sweep(sweep) == []
    record = Record(sweep.path)
    with record.lock():
        record.add([Submitted(job, "train", "") for job in ("7_0", "7_1", "8")])
    waiting = "echo '7_1|RUNNING|None'; echo '8|PENDING|None'; echo '9|PENDING|'"
    asked = 'echo "$@" > asked'
    commands(monkeypatch, squeue=waiting, sacct="exit 1", scontrol="exit 1", scancel=asked)
    assert status.cancel([str(sweep.path)]) == 0
    assert f"cancelled 2 jobs of {sweep.path}: 7_1, 8" in capsys.readouterr().out
    assert Path("asked").read_text() == "--quiet 8 7_1\n"
    assert [job.cancelled for job in record.jobs] == [False, True, True]
    assert status.cancel([]) == 1
    assert "reseed cancel takes one sweep" in capsys.readouterr().err


def test_watching_ends_when_nothing_is_queued_or_running(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look finds a queued job, the second finds that it has ended."""
    with Record(sweep.path).lock():
        Record(sweep.path).add([Submitted("7", "train", "", (sweep.runs()[1].signature,))])
    once = "[ -f seen ] || echo '7|PENDING|Priority'; touch seen"
    commands(monkeypatch, squeue=once, sacct="echo '7|TIMEOUT'")
    monkeypatch.setattr(states_module.time, "sleep", lambda seconds: None)
    assert status.main([sweep.path.name, "--watch"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"{sweep.path}/: ") == 2
    assert "queued (Priority)" in said
    assert "its job 7 is gone (timeout)" in said
    assert status.main(["--watch"]) == 1
    assert "reseed status --watch takes one sweep; got none" in capsys.readouterr().err


def test_sweeps_are_found_by_name_and_start_of_name() -> None:
    for name in ("seeds-aaa", "seeds-bbb", "train-ccc"):
        folder = Path("sweeps") / name
        folder.mkdir(parents=True)
        (folder / "manifest.jsonl").touch()
    root = Path("sweeps")
    assert (
        find_sweep("train", root)
        == find_sweep("sweeps/train-ccc", root)
        == Sweep(root / "train-ccc")
    )
    with pytest.raises(ReseedError, match=r"give more of the name\n  seeds-aaa\n  seeds-bbb$"):
        find_sweep("seeds", root)
    with pytest.raises(ReseedError, match=r"there is no sweep trian.*Did you mean `train`"):
        find_sweep("trian", root)


def test_progress_is_written_while_training_and_removed_at_the_end(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict] = []
    from reseed.train import callbacks

    def write(path: Path, value: dict) -> None:
        assert path.name == PROGRESS_FILE
        told.append(value)
        path.write_text(json.dumps(value))

    monkeypatch.setattr(callbacks, "write_json_unsynced", write)
    line = [*tiny_overrides, "runtime.heartbeat_every_s=1e-9", "training.tokens=2048"]
    assert train.main([*line, "dataset.chunk_tokens=512"]) == 0
    tokens = [value["tokens"] for value in told]
    assert tokens
    assert tokens == sorted(set(tokens))
    assert all(0 < n < 2048 and n % 64 == 0 for n in tokens)  # whole batches
    assert all(value["tokens_per_s"] > 0 for value in told)
    (found,) = RunStore("outputs").runs()
    assert not (found.path / PROGRESS_FILE).exists()
