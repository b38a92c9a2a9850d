"""Locks follow no links; temporary files are private, unpredictable and gone after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from reseed.activations.cache import ActivationCache
from reseed.cli.cluster.queue import Record
from reseed.evaluate.base import ModelCache
from reseed.store.runs import Run
from reseed.study import evaluate as study_evaluate
from reseed.system import files
from reseed.system.files import (
    atomic_folder,
    atomic_write_text,
    lock_file,
    lock_owner,
    remove_leftovers,
    temporary_folder,
    write_json_unsynced,
)

RUN = "x-0123456789ab"
REASON = "a lock must be a regular file: remove it"
SECRET = "the user's own file"


def of_run(folder: Path) -> Path:
    with Run(folder / RUN).lock():
        return folder / RUN / ".lock"


def of_evaluation(folder: Path) -> Path:
    run = _SavedRun(folder / "evaluations" / "contexts-0123")
    with study_evaluate._claimed([run], None):  # type: ignore[arg-type, list-item]
        return run.folder / ".lock"


class _SavedRun:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def result_folder(self, config: object) -> Path:
        return self.folder

    def has_result(self, config: object) -> bool:
        return False


def of_model_cache(folder: Path) -> Path:
    cache = ModelCache(folder)
    cache.get("x", {}, lambda: {"x": torch.zeros(1)})
    path = cache._path("x", {})
    path.unlink(missing_ok=True)  # so that the next call computes it again
    return path.with_suffix(".lock")


def of_jobs(folder: Path) -> Path:
    record = Record(folder)
    with record.lock():
        return record.folder / ".lock"


LOCKS = [of_run, of_evaluation, of_model_cache, of_jobs]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Return a file that nothing may change."""
    path = tmp_path / "thesis.txt"
    path.write_text(SECRET)
    yield path
    assert path.read_text() == SECRET


def plant_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def plant_dangling_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target.with_name("not there yet"))


def plant_pipe(path: Path, target: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("plant", [plant_link, plant_dangling_link, plant_pipe])
@pytest.mark.parametrize("lock", LOCKS)
def test_no_lock_follows_a_planted_link(
    lock: Callable[[Path], Path], plant: Callable[[Path, Path], None], tmp_path: Path, target: Path
) -> None:
    path = lock(tmp_path / "work")
    plant(path, target)
    with pytest.raises(OSError, match=REASON) as found:
        lock(tmp_path / "work")
    assert str(found.value.filename) == str(path)
    assert not target.with_name("not there yet").exists()


def test_the_owner_is_not_written_through_a_hard_link(tmp_path: Path, target: Path) -> None:
    path = of_run(tmp_path)
    path.unlink()
    os.link(target, path)
    with Run(tmp_path / RUN).lock() as owned:
        assert owned


def test_the_owner_of_a_lock_is_not_read_through_a_link(tmp_path: Path, target: Path) -> None:
    path = of_run(tmp_path)
    assert lock_owner(path).startswith(f"process {os.getpid()} on {socket.gethostname()}")
    plant_link(path, target)
    assert lock_owner(path) == ""


def test_a_running_run_with_a_planted_lock_is_damaged(tmp_path: Path, target: Path) -> None:
    from reseed.config import digest

    run = Run(tmp_path / f"x-{digest({})}")
    with run.lock():
        run.begin({"identity": {}})
        assert run.status == "running"
    plant_link(run.path / ".lock", target)
    assert run.status == "damaged"


@pytest.mark.parametrize("name", [".lock", "ENTRY/.use", "ENTRY/.writer"])
def test_a_planted_lock_of_the_activation_cache_is_reported_and_training_goes_on(
    name: str, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ActivationCache(tmp_path / "cache", 10**6)
    entry = cache.entry({"a": 1}, "readable")
    assert entry is not None
    assert entry.write(entry.file(0, "0" * 64), 10, lambda path: path.write_bytes(b"x"))
    path = tmp_path / "cache" / name.replace("ENTRY", entry.path.name)
    del entry  # its locks
    plant_link(path, target)
    again = ActivationCache(tmp_path / "cache", 10**6).entry({"a": 1}, "readable")
    if name == "ENTRY/.writer":
        assert again is not None
        assert not again.write(again.file(1, "0" * 64), 10, lambda path: path.write_bytes(b"x"))
    else:
        assert again is None
    said = capsys.readouterr().out
    assert f"{path}: " in said
    assert REASON in said
    assert said.count("\n") == 1


def test_temporary_files_are_private_and_have_new_names_each_time(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        assert path.parent.stat().st_mode & 0o077 == 0
        assert not path.exists()
        seen.append(path.parent)
        path.write_text("{}")

    for _ in range(3):
        files.atomic_write(tmp_path / "a.json", write)
        files._write(tmp_path / "a.json", write, sync=False)  # as `write_json_unsynced`
        atomic_folder(tmp_path / "report", lambda folder: seen.append(folder.parent))
    assert len(set(seen)) == 9
    assert sorted(os.listdir(tmp_path)) == ["a.json", "report"]


def test_a_planted_link_at_a_result_is_replaced(tmp_path: Path, target: Path) -> None:
    for name, write in (
        ("a.txt", lambda path: atomic_write_text(path, "new")),
        ("b.json", lambda path: write_json_unsynced(path, {})),
        ("report", lambda path: atomic_folder(path, lambda folder: None)),
    ):
        path = tmp_path / name
        path.symlink_to(target)
        write(path)
        assert not path.is_symlink()


KILLED = """
import os, signal, sys
from pathlib import Path
from reseed.system import files
from reseed.system.files import *
path = Path(sys.argv[1])
def stop(folder):
    if sys.argv[2:] == ["lives"]:
        print("writes", flush=True)
        sys.stdin.read()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
def write(part):
    part.write_text("half")
    part.with_name(".tmp-of-a-library").write_text("half")
    stop(part)
"""


@contextmanager
def child(code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code; the child ends with the context."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED + code, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process


def killed(code: str, path: Path) -> None:
    with child(code, str(path)) as process:
        assert process.wait(30) == -signal.SIGKILL


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".part-" in path.name]


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be one that has not written into any folder yet."""
    monkeypatch.setattr(files, "_cleaned", set())


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """A writer that still lives keeps its file, and finishes it."""
    killed("atomic_write(path, write)", tmp_path / "figure.svg")
    assert [name.partition(".part-")[0] for name in hidden(tmp_path)] == [".figure"]
    killed("atomic_folder(path, lambda folder: write(folder / 'x'))", tmp_path / "report")
    assert [name.partition(".part-")[0] for name in hidden(tmp_path)] == [".report"]
    with child("atomic_write(path, write)", str(tmp_path / "other.csv"), "lives") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writes\n"
        atomic_write_text(tmp_path / "table.csv", "x")
        assert [name.partition(".part-")[0] for name in hidden(tmp_path)] == [".other"]
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait(30) == 0
    assert sorted(os.listdir(tmp_path)) == ["other.csv", "table.csv"]


def test_the_earlier_report_is_back_if_its_replacement_was_killed(tmp_path: Path) -> None:
    """The kill comes between the two renames."""
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("earlier")
    between = """
rename = os.replace
def replace(one, other):
    if Path(other) == path:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(one, other)
os.replace = replace
atomic_folder(path, lambda folder: (folder / "index.html").write_text("new"))
"""
    killed(between, report)
    assert not report.exists()
    atomic_write_text(tmp_path / "summary.md", "x")
    assert (report / "index.html").read_text() == "earlier"
    assert sorted(os.listdir(tmp_path)) == ["report", "summary.md"]


def test_what_another_machine_left_is_removed_after_a_day(tmp_path: Path) -> None:
    """Its locks may be invisible here. The only writer of a folder need not wait."""
    other = tmp_path / ".a.part-0000ff-abc"
    other.mkdir()
    remove_leftovers(tmp_path)
    assert hidden(tmp_path) == [other.name]
    old = time.time() - 2 * 86_400
    os.utime(other, (old, old))
    remove_leftovers(tmp_path)
    assert hidden(tmp_path) == []
    other.mkdir()
    remove_leftovers(tmp_path, sole_writer=True)
    assert hidden(tmp_path) == []


def test_leftovers_are_removed_without_following_links(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text(SECRET)
    work = tmp_path / "work"
    (work / f".a.part-{files._HOST}-x").mkdir(parents=True)
    (work / f".a.part-{files._HOST}-x" / "inner").symlink_to(kept)
    (work / f".b.part-{files._HOST}-x").symlink_to(kept)
    remove_leftovers(work)
    assert list(work.iterdir()) == []
    assert (kept / "thesis.txt").read_text() == SECRET


def test_a_folder_that_was_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove it before its lock is held, or while its lock is waited for."""
    calls: list[Path] = []

    def lock(path: Path) -> int | None:
        calls.append(path)
        if len(calls) == 1:
            shutil.rmtree(path.parent)
        handle = lock_file(path)
        if len(calls) == 2:
            shutil.rmtree(path.parent)
        return handle

    monkeypatch.setattr(files, "lock_file", lock)
    with temporary_folder(tmp_path / "a.txt") as folder:
        (folder / "a.txt").write_text("x")
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []
