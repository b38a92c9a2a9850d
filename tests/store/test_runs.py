from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from reseed.config import digest
from reseed.store.find import load_run
from reseed.store.runs import RESULTS, Run, RunError, RunStore
from reseed.system.files import atomic_write, atomic_write_json

IDENTITY = {"sae": {"k": 3}, "seed": 0}
SIGNATURE = digest(IDENTITY)
RECORD = {"identity": IDENTITY, "tokens": 10}


def begun(root: Path) -> Run:
    run = RunStore(root).run(SIGNATURE, "readable")
    run.begin(RECORD)
    return run


def test_a_run_is_missing_running_interrupted_then_finished(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run(SIGNATURE, "readable")
    assert run.status == "missing"
    with run.lock():
        run.begin(RECORD)
        assert run.status == "running"
    assert run.status == "interrupted"  # no process holds the lock
    (run.path / "checkpoint.pt").write_bytes(b"x")
    for name in RESULTS:
        (run.path / name).touch()
    run.finish({"fvu": 0.1, "bad": float("nan")}, timings={"s": 1})
    assert run.status == "finished"
    assert run.metrics == {"fvu": 0.1, "bad": None}
    assert not (run.path / "checkpoint.pt").exists()
    assert load_run(run.path).record["timings"] == {"s": 1}


def test_a_failure_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    run = begun(tmp_path)
    try:
        raise ValueError("too hot")
    except ValueError as error:
        run.fail(error, failed_at_step=7)
    assert run.status == "failed"
    record = run.record
    assert record["failed_at_step"] == 7
    assert record["error"]["message"] == "too hot"
    assert 'raise ValueError("too hot")' in record["error"]["traceback"]
    assert run.failure == record["error"] | {"ended": record["ended"]}
    run.begin(RECORD)
    assert run.record["error"] is None


def test_reseed_errors_without_a_cause_are_explained(tmp_path: Path) -> None:
    run, behind = begun(tmp_path), RunError("lost")
    behind.__cause__ = OSError("no such disk")
    for error, explained in ((RunError("lost"), True), (behind, False), (OSError("full"), False)):
        run.fail(error)
        assert run.failure is not None
        assert run.failure["explained"] is explained
    old = {k: v for k, v in run.record["error"].items() if k != "explained"}
    run.update(error=old)  # as in records from before `explained`
    assert run.failure == old | {"explained": False, "ended": run.record["ended"]}


def test_a_run_is_found_by_its_signature_under_any_name(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert RunStore(tmp_path).run(SIGNATURE, "another-name") == run
    assert RunStore(tmp_path).runs() == [run]
    assert RunStore(tmp_path / "nowhere").runs() == []


def test_a_record_that_was_changed_is_an_error(tmp_path: Path) -> None:
    run = begun(tmp_path)
    record = run.record
    record["identity"]["sae"]["k"] = 4
    atomic_write_json(run.path / "run.json", record)
    other = digest(record["identity"])
    with pytest.raises(RunError, match=f"signature {other}, but the folder has {SIGNATURE}"):
        load_run(run.path)


def test_a_folder_that_was_renamed_is_an_error(tmp_path: Path) -> None:
    run = begun(tmp_path)
    moved = tmp_path / "x-0123456789ab"
    shutil.move(run.path, moved)
    with pytest.raises(RunError, match="or the folder was renamed"):
        load_run(moved)


@pytest.mark.parametrize("content", ["", "{", '{"identity":'])
def test_a_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    run = begun(tmp_path)
    (run.path / "run.json").write_text(content)
    with pytest.raises(RunError, match="is damaged"):
        load_run(run.path)


def test_a_folder_without_record_or_signature_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no run .*: no such folder, and nothing of that"):
        load_run(tmp_path / f"x-{SIGNATURE}")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "run.json").write_text(json.dumps(RECORD | {"status": "x"}))
    with pytest.raises(RunError, match="its name does not end in a signature"):
        load_run(tmp_path / "plain")


def _hold(path: Path, held, release) -> None:
    with Run(path).lock():
        held.set()
        release.wait(30)


def test_a_run_has_one_owner_at_a_time(tmp_path: Path) -> None:
    run = begun(tmp_path)
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(run.path, held, release))
    process.start()
    assert held.wait(30)
    assert run.locked
    assert run.status == "running"
    told: list[str] = []

    def waiting(message: str) -> None:
        told.append(message)
        release.set()

    with run.lock(waiting):
        process.join(30)
    assert told == [f"waiting for {run.id}: held by {told[0].partition('held by ')[2]}"]
    assert f"process {process.pid} on " in told[0]
    assert not run.locked


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    run = begun(tmp_path)
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(run.path, held, release))
    process.start()
    assert held.wait(30)
    process.kill()
    process.join(30)
    told: list[str] = []
    with run.lock(told.append):
        assert told == []


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"old": 1})

    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, broken)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
