"""A full disk gives a clear message, fails no run, loses nothing and leaves no temporary files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks

from reseed.cli import run, train
from reseed.store.runs import RunStore
from reseed.system.files import DiskFullError, atomic_write, atomic_write_bytes, atomic_write_json

INTACT = "Results and checkpoints that were written earlier are intact. Free some space"


@pytest.fixture
def line(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*tiny_overrides, "training.tokens=512", "runtime.checkpoint_every_s=1e-9"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the system refuse files of this process beyond 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def full_from(content: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full from the n-th synced file in runs' folders on."""
    original, count = os.fsync, [0]

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isfile(path) and "/outputs/" in path:  # not in the cache of tokens
            count[0] += 1
            if count[0] >= content:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def leftovers(folder: Path) -> list[str]:
    hidden = (p for p in folder.rglob(".*") if p.name != ".lock")
    return [str(p) for p in hidden if p.is_file() or ".part-" in p.name]


def of_torch(path: Path) -> None:
    torch.save({"weights": torch.zeros(200_000)}, path)


def of_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(200_000)}, path)


def of_arrow(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": torch.rand(200_000).numpy()}), path)


def of_python(path: Path) -> None:
    path.write_bytes(b"\0" * 200_000)


@pytest.mark.parametrize("write", [of_torch, of_safetensors, of_arrow, of_python])
def test_every_writer_reports_a_full_disk(tmp_path: Path, small_files: None, write) -> None:
    """Each library raises its own error, and not all of them are an OSError."""
    path = tmp_path / "run" / "file.bin"
    atomic_write_bytes(path, b"before")
    with pytest.raises(DiskFullError, match=r"no room for file\.bin in .*run \(") as found:
        atomic_write(path, write)
    assert INTACT in str(found.value)
    assert path.read_bytes() == b"before"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise ValueError("no number")

    with pytest.raises(ValueError, match="no number"):
        atomic_write(tmp_path / "x.json", broken)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        atomic_write_json(tmp_path / "file" / "x.json", {})
    assert leftovers(tmp_path) == []


def test_a_sweep_stops_at_a_full_disk_and_keeps_its_checkpoints(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The previous checkpoint stays valid, and no other group starts."""
    line = ["-m", *line, "dataset.order_seed=0,1"]
    with monkeypatch.context() as patch:
        full_from(4, patch)  # record, checksum and checkpoint, the second checksum
        assert train.main(line) == 1
    said = capsys.readouterr()
    (first, *others) = RunStore("outputs").runs()
    assert others == []
    assert first.status == "interrupted"
    assert f" in {first.path} (No space left on device). {INTACT}" in said.err
    assert "0 of 2 runs finished, 1 interrupted, 1 not started" in said.out
    assert "Traceback" not in said.err
    assert (first.path / "checkpoint.pt").exists()
    assert leftovers(Path()) == []
    assert train.main(line) == 0
    assert "resuming after " in capsys.readouterr().out


def test_a_single_run_stops_at_a_full_disk(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        full_from(1, patch)
        assert train.main(line) == 1
    said = capsys.readouterr()
    assert "no room for run.json in outputs/" in said.err
    assert "failed" not in said.out
    assert leftovers(Path()) == []
    assert train.main(line) == 0


@pytest.fixture
def other_text(tiny_text: Path, tmp_path: Path) -> Path:
    """Return a text of 30,000 tokens that are not cached yet."""
    path = tmp_path / "other.txt"
    path.write_text("and then " + tiny_text.read_text())
    return path


def test_a_full_disk_while_caching_tokens_is_reported(
    line: list[str], other_text: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*line, f"dataset.path={other_text}", "runtime.cache=cache"]) == 1
    said = capsys.readouterr().err
    assert "no room for train.int32 in cache/tokens/" in said
    assert INTACT in said
    assert leftovers(Path("cache")) == []


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 1000], ids=["for a moment", "for good"])
def test_a_full_disk_at_any_write_loses_nothing(
    forks: Forks, tiny_overrides: list[str], times: int
) -> None:
    """Each time there is one clear message, and the same command resumes."""
    command = forks.prepare([
        *tiny_overrides, "training.tokens=64,128", "sae=topk", "dataset.held_out_tokens=512",
        "dataset.chunk_tokens=512", "runtime.checkpoint_every_s=1e-9", "runtime.outputs=full",
    ])  # fmt: skip
    outputs = forks.folder / "full"
    shutil.rmtree(outputs, ignore_errors=True)
    at, finished = 1, 0
    while True:
        ended = forks.run(command, {"kind": "full", "at": at, "times": times})
        runs = RunStore(outputs).runs()
        assert leftovers(outputs) == [], at
        if ended.status == 0:
            break
        assert ended.status == 1, (at, ended.said)
        assert INTACT in ended.said, (at, ended.said)
        assert "Traceback" not in ended.said
        assert {run.status for run in runs} <= {"missing", "interrupted", "finished"}, at
        now = sum(run.finished for run in runs)
        assert now >= finished, "finished runs stay finished"
        at, finished = at + 1, now
        assert at < 200, "no progress"
    assert at > 10
    assert all(run.finished for run in RunStore(outputs).runs())


@pytest.mark.slow
def test_a_full_file_system_loses_nothing(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The file system is real; the test is skipped if this user may not mount one."""
    monkeypatch.chdir(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        line = [
            *tiny_overrides, "comparison=seeds", "sae=topk", "seed=0,1", "training.tokens=512",
            f"runtime.outputs={disk}/outputs",
        ]  # fmt: skip
        (disk / "ballast").write_bytes(b"\0" * (2**20 - 40_000))
        assert run.main(line) == 1
        said = capsys.readouterr()
        assert f"in {disk}/outputs" in said.err
        assert INTACT in said.err
        assert {r.status for r in RunStore(disk / "outputs").runs()} <= {"interrupted", "missing"}
        assert leftovers(disk) == []
        (disk / "ballast").unlink()
        assert run.main(line) == 0
        assert all(r.finished for r in RunStore(disk / "outputs").runs())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
