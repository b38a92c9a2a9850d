"""The record of the machine; the limit of open files is raised, or named where it cannot be."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reseed.errors import ReseedError
from reseed.system.environment import allow_open_files, environment

LIMIT = """
import resource, sys
from pathlib import Path
from reseed.store.runs import Run, RunStore
store = RunStore(sys.argv[1])
runs = [Run(store.root / f"x-{i:012x}") for i in range(60)]
with store.locks(runs, None) as owned:
    print(len(owned), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize("hard", [256, 64])
def test_the_limit_of_open_files_is_raised_or_named(hard: int, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LIMIT, str(tmp_path / "outputs")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if hard == 256:
        assert found.stdout.split() == ["60", "256", "256"], found.stderr
        return
    assert "a group of 60 runs needs " in found.stderr
    assert "but the system allows this process 64: raise the limit with `ulimit -n " in found.stderr
    assert not (tmp_path / "outputs").exists(), "no lock is taken"


def test_a_sufficient_limit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files(1, "a group of 1 run")
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (20, 20))
    with pytest.raises(ReseedError, match=r"a group of 10 runs needs [\d,]+ open files"):
        allow_open_files(10, "a group of 10 runs")


def test_the_record_has_what_decides_how_sums_are_rounded() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = environment()
            assert found["threads"] == threads
    finally:
        torch.set_num_threads(before)
    assert found["vector_instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["cpu"]
    if (info := Path("/proc/cpuinfo")).exists() and "model name" in (text := info.read_text()):
        assert f"model name\t: {found['cpu']}\n" in text


def test_a_command_that_computes_nothing_does_not_load_torch_for_its_record() -> None:
    code = """
import sys
from reseed.system.environment import environment
assert environment()["threads"] is None
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
