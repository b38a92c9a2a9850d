"""Damaged files are noticed by whoever uses them: refused, or made again with the same content."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import reseed
from reseed.cli import compare, evaluate, report, run, show, status, train
from reseed.cli.convert import push
from reseed.compare.matching import MatchingCache
from reseed.errors import ReseedError
from reseed.sae.checkpoint import CheckpointError
from reseed.store.runs import RESULTS, Run, RunError, RunStore
from reseed.system.integrity import read_record, sha256_of, write_record

Said = Callable[[], str]


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 5] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def line(tiny_overrides: list[str]) -> list[str]:
    short = [o for o in tiny_overrides if not o.startswith("training.tokens")]
    few = ["training.tokens=1024", "comparison.activation_tokens=0", "comparison.null_draws=1"]
    return [*short, *few, "comparison=seeds", "sae=topk", "seed=0,1", "runtime.cache=cache",
            "evaluation=reconstruction", "evaluation.tokens=500"]  # fmt: skip


@pytest.fixture(scope="module")
def original(line: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train, evaluate and compare two seeds."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("reseed.study.result.figure_drawings", lambda cells, runs: {})
        assert run.main(line) == 0
    return folder


@pytest.fixture
def project(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Enter a copy of the project."""
    from reseed.activations.tokens import _read_store

    folder = tmp_path / "project"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("reseed.study.result.figure_drawings", lambda cells, runs: {})
    _read_store.cache_clear()  # as in a new process
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: "".join(capsys.readouterr())


def the(pattern: str) -> Path:
    return min(Path().glob(pattern))


def contents() -> dict[str, str]:
    """Return path → SHA-256 of results that hold no times."""
    paths = [*Path().glob("outputs/*/*.safetensors"), *Path().glob("outputs/*/metrics.json")]
    return {str(path): sha256_of(path) for path in [*paths, *Path().glob("sweeps/*/*.csv")]}


@pytest.mark.parametrize("name", [*RESULTS, "activations.safetensors", "run.json"])
def test_a_damaged_run_is_refused_by_the_name_of_the_file(project: Path, name: str) -> None:
    path = the(f"outputs/*/{name}")
    flip(path)
    assert Run(path.parent).status == "damaged"
    assert not Run(path.parent).finished
    with pytest.raises(RunError, match=rf"{name} is damaged: "):
        reseed.load_run(path.parent)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: "):
        reseed.load_sae(path.parent)
    with pytest.raises(ReseedError, match=rf"{name} is damaged: "):
        reseed.load_sweep("seeds")


def test_every_command_refuses_a_damaged_run(project: Path, line: list[str], said: Said) -> None:
    path = the("outputs/*/metrics.json")
    flip(path)
    for command, words in (
        (compare.main, [o for o in line if not o.startswith("evaluation")]),
        (report.main, ["seeds"]),
        (show.main, [str(path.parent), "0"]),
        (push, [str(path.parent), "me/sae"]),
    ):
        assert command(words) == 1
        assert "metrics.json is damaged: its content has changed" in said()
    assert status.main([]) == 0
    assert f"{path} is damaged: " in said()


def test_a_damaged_run_is_trained_again_to_the_same_files(
    project: Path, line: list[str], said: Said
) -> None:
    before = contents()
    flip(the("outputs/*/sae.safetensors"))
    assert run.main(line) == 0
    assert "trained again: outputs/" in said()
    assert contents() == before
    assert status.main(["--verify"]) == 0
    assert "every file is as written" in said()


def test_a_flip_that_keeps_the_time_is_found_by_who_reads_the_file(
    project: Path, line: list[str], said: Said
) -> None:
    """A quick look cannot find it; `status --verify`, loading and training do."""
    path = the("outputs/*/latents.safetensors")
    time = path.stat().st_mtime_ns
    flip(path)
    os.utime(path, ns=(time, time))
    assert status.main([]) == 0
    assert "damaged" not in said()
    assert status.main(["--verify"]) == 1
    assert "latents.safetensors is damaged: its content has changed" in said()
    os.utime(path, ns=(time, time))
    assert run.main(line) == 0
    assert "trained again: outputs/" in said()


def test_a_damaged_evaluation_is_made_again(project: Path, line: list[str], said: Said) -> None:
    before = contents()
    flip(the("outputs/*/evaluations/*/result.json"))
    assert report.main(["seeds"]) == 1
    assert "result.json is damaged: its checksum does not fit its content: `res" in said()
    asked = ["seeds", "evaluation=reconstruction", "evaluation.tokens=500", "runtime.cache=cache"]
    assert evaluate.main(asked) == 0
    told = said()
    assert "evaluating 1 SAE" in told
    assert told.count("result.json is damaged") == 1
    assert report.main(["seeds"]) == 0
    assert contents() == before


def test_results_of_other_weights_are_not_shown(project: Path, line: list[str]) -> None:
    """A run that was trained again elsewhere may have other weights than those evaluated."""
    path = the("outputs/*/evaluations/*/result.json")
    write_record(path, read_record(path) | {"weights": "0" * 64})
    with pytest.raises(ReseedError, match=r"result\.json is of earlier weights of this SAE"):
        reseed.load_sweep("seeds")


@pytest.mark.parametrize("name", ["cell.json", slow("pairs.parquet"), slow("latents.parquet")])
def test_a_damaged_cell_is_compared_again(
    project: Path, line: list[str], said: Said, name: str
) -> None:
    before = contents()
    flip(the(f"sweeps/*/cells/*/{name}"))
    assert report.main(["seeds"]) == 1
    assert f"{name} is damaged: " in said()
    assert compare.main([o for o in line if not o.startswith("evaluation")]) == 0
    assert "compared again" in said()
    assert contents() == before


@pytest.mark.parametrize("known", [True, False])
def test_a_cell_of_other_files_is_refused_and_compared_again(
    project: Path, line: list[str], said: Said, known: bool
) -> None:
    """The run was trained again; a cell without hashes is one of version 0.1."""
    path = the("sweeps/*/cells/*/cell.json")
    record = read_record(path)
    assert {*record["inputs"]} == {one.id for one in RunStore("outputs").runs()}
    next(iter(record["inputs"].values()))["sae.safetensors"] = "0" * 64
    write_record(path, record if known else record | {"inputs": None})
    assert report.main(["seeds"]) == 1
    assert "was trained again: `reseed compare` with the arguments of the sweep" in said()
    assert compare.main([o for o in line if not o.startswith("evaluation")]) == 0
    assert "comparing all runs: 2 runs, 1 pair" in said()


@pytest.mark.parametrize(
    "name",
    ["manifest.jsonl", slow("comparison.json"), slow("evaluations.json"), slow("summary.csv")],
)
def test_damaged_files_of_a_sweep_are_written_again(
    project: Path, line: list[str], said: Said, name: str
) -> None:
    before = contents()
    path = the(f"sweeps/*/{name}")
    flip(path)
    assert status.main([]) == 0, "the others are listed all the same"
    assert report.main([str(path.parent)]) == int(name != "summary.csv")
    assert f"{name} is damaged: " in said()
    assert run.main(line) == 0
    said()
    assert report.main([str(path.parent)]) == 0
    assert "damaged" not in said()
    assert contents() == before


@pytest.mark.parametrize("name", ["train.int32", slow("store.json"), slow("held_out.int32")])
def test_damaged_tokens_are_made_again(
    project: Path, line: list[str], said: Said, name: str
) -> None:
    before = contents()
    flip(the(f"cache/tokens/*/{name}"))
    shutil.rmtree(the("outputs/*-seed0-*"))
    assert run.main(line) == 0
    told = said()
    assert f"{name} is damaged: " in told
    assert "tokenising" in told
    assert contents() == before


def test_a_damaged_matching_is_computed_again(tmp_path: Path) -> None:
    import numpy as np

    store = MatchingCache(tmp_path, least=1)
    a, b = np.random.default_rng(0).normal(size=(2, 8, 4))
    made = store(a, b)
    (path,) = tmp_path.glob("*.safetensors")
    flip(path)
    assert np.array_equal(store(a, b).assignment, made.assignment)
    assert np.array_equal(store(a, b).cosines, made.cosines)


def test_training_from_a_damaged_checkpoint_begins_at_the_first_step(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    from reseed.train.run_state import RunState

    monkeypatch.chdir(tmp_path)
    single = [o for o in line if not o.startswith(("seed", "comparison", "evaluation"))]
    single += ["seed=3", "runtime.checkpoint_every_s=0.001"]
    assert train.main([*single, "runtime.outputs=undisturbed"]) == 0
    step = RunState.train

    def interrupted(self: RunState, *given: object) -> None:
        if self.step == 10:
            raise KeyboardInterrupt
        step(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "train", interrupted)
        assert train.main(single) == 130
    flip(the("outputs/*/checkpoint.pt"))
    said()
    assert train.main(single) == 0
    told = said()
    assert "checkpoint.pt is damaged: training begins at the first step" in told
    assert "resuming" not in told
    for name in ("sae.safetensors", "latents.safetensors", "metrics.json"):
        assert the(f"outputs/*/{name}").read_bytes() == the(f"undisturbed/*/{name}").read_bytes()
    assert list(Path().glob("outputs/*/*.sha256")) == []


def test_files_are_hashed_before_they_are_compared(
    project: Path, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is trained again during a long comparison makes the cell stale."""
    from reseed.study import compare as module

    load = module.load_dictionaries

    def slowly(run: Run, *given: Any) -> Any:
        found = load(run, *given)
        record = read_record(run.path / "run.json")
        record["files"]["sae.json"]["sha256"] = "1" * 64
        write_record(run.path / "run.json", record)
        return found

    flip(the("sweeps/*/cells/*/cell.json"))
    monkeypatch.setattr(module, "load_dictionaries", slowly)
    assert compare.main([o for o in line if not o.startswith("evaluation")]) == 1
    inputs = read_record(the("sweeps/*/cells/*/cell.json"))["inputs"]
    assert all(of["sae.json"] != "1" * 64 for of in inputs.values())


@pytest.mark.parametrize("content", ["{}", '{"fvu": "x", "l0": 1, "dead_fraction": 0}', "["])
def test_status_lists_everything_beside_a_damaged_run_of_version_0_1(
    project: Path, said: Said, content: str
) -> None:
    path = the("outputs/*/metrics.json")
    record = read_record(path.parent / "run.json")
    del record["files"]
    write_record(path.parent / "run.json", record)
    path.write_text(content)
    assert status.main([]) == 0
    told = said()
    assert f"{path} is damaged: it " in told
    assert all(run.id in told for run in RunStore("outputs").runs())
    assert "sweeps/" in told


@pytest.mark.slow
def test_no_damage_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the matrix that `make audit` prints."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "audit")
    damage = __import__("damage")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        rows = damage.audit(damage.make_project(Path(folder)), sample=47)
    letters = [letter for row in rows for letter in row[2:] if letter]
    assert len(letters) > 40
    assert "S" not in letters
    assert sys.modules.pop("damage")
