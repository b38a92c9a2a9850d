"""A command killed at any moment and repeated ends with the same files, bit for bit.

Training is killed at random times over its whole duration, and once before every single write; a
comparison is killed before its writes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from forks import Ended, Forks

from reseed.store.runs import RESULTS, Run, RunStore
from reseed.train.config import RuntimeConfig

KILLS = [4, pytest.param(14, marks=pytest.mark.audit)]
"""Kills at random times in each case: 20 in a run of the slow tests, 70 in an audit."""
EVERY = [5, pytest.param(1, marks=pytest.mark.audit)]
"""A kill at every write of an audit; at each fifth, from a random one, in the slow tests."""
SEED = int(os.environ.get("RESEED_KILL_SEED", time.time_ns()))
"""Seed of these times and writes. The message of a failing test names it."""

SMALL = [
    "training.tokens=4096", "dataset.chunk_tokens=512", "dataset.held_out_tokens=512",
    "sae.num_latents=32", "runtime.threads=1", "runtime.device=cpu", "runtime.log_every_steps=7",
]  # fmt: skip
OFTEN = "runtime.checkpoint_every_s=0.01"
CASES = {
    "single": ["sae=topk"],
    "fused": ["sae=topk,batch_topk,matryoshka,jumprelu,gated,relu"],
    "budgets": ["sae=topk,batch_topk", "training.tokens=1024,2048", "layer=0,2"],
    "calibrated": ["sae=relu", "sae.target_l0=6", "seed=0,1", "training.tokens=2048"],
    "optimizers": ["sae=topk", "training.optimizer=muon,sign_sgd", "training.decay_fraction=0"],
    "archetypal": ["sae=topk,relu", "training.decoder=archetypal"],
    "cached": ["sae=topk,batch_topk", "seed=0,1"],
    "stored": ["sae=topk,batch_topk", "dataset.repeat=true"],
}
# Two runs, of one and of two steps, with a checkpoint after each step.
SHORT = [*SMALL, "runtime.checkpoint_every_s=1e-9", "training.tokens=64,128", "sae=topk"]
CACHE = "activation_cache"
CAN_CACHE = CACHE in {field.name for field in fields(RuntimeConfig)}


def contents(run: Run) -> dict[str, object]:
    """Return the result files of a run as bytes, its curve without seconds."""
    found: dict[str, object] = {
        path.name: path.read_bytes()
        for path in run.path.iterdir()
        # The next command deletes a finished run's checkpoint.
        if path.name not in (".lock", "run.json", "training.csv")
        and not path.name.startswith("checkpoint.pt")
    }
    assert set(RESULTS) <= {*found, "training.csv"}
    rows = list(csv.DictReader(io.StringIO((run.path / "training.csv").read_text())))
    found["curve"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    record = run.record
    told = ("identity", "penalty_weight", "calibration", "init_seed", "tokens", "status")
    found["record"] = json.dumps({key: record.get(key) for key in told})
    return found


def everything(outputs: Path) -> dict[str, dict[str, object]]:
    """Return the contents of every run, by id; all must be finished."""
    runs = RunStore(outputs).runs()
    assert {run.status for run in runs} == {"finished"}
    return {run.id: contents(run) for run in runs}


def differences(found: dict[str, dict[str, object]], expected: dict[str, dict[str, object]]):
    """Return run and file of every difference, for the message of a failing test."""
    return [
        (run, name)
        for run in {*found, *expected}
        for name in {*found.get(run, {}), *expected.get(run, {})}
        if found.get(run, {}).get(name) != expected.get(run, {}).get(name)
    ]


def stored(folder: Path) -> list[str]:
    """Write shards of activations; return overrides that train on them, for about two epochs."""
    (folder / "acts").mkdir(exist_ok=True)
    x = np.random.default_rng(0).standard_normal((3_000, 16), dtype=np.float32)
    for i, shard in enumerate(np.split(x, 3)):
        np.save(folder / "acts" / f"{i}.npy", shard)
    return ["model=activations", f"model.path={folder / 'acts'}", "training.batch_size=64",
            "dataset.held_out_fraction=0.3", "runtime.progress=false"]  # fmt: skip


class Case:
    """A sweep, with its results when nothing kills it."""

    def __init__(self, forks: Forks, overrides: Sequence[str]) -> None:
        self.forks = forks
        self.command = forks.prepare([*overrides, "runtime.outputs=killed"])
        self.outputs = forks.folder / "killed"
        self.clean()
        ended = self.run()
        self.seconds, self.expected = ended.seconds, everything(self.outputs)
        self.clean()

    def run(self) -> Ended:
        ended = self.forks.run(self.command)
        assert ended.status == 0, ended.said
        return ended

    def clean(self) -> None:
        for folder in (self.outputs, self.forks.folder / "activations"):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("most", KILLS)
@pytest.mark.parametrize("name", CASES)
def test_a_sweep_killed_at_random_times_resumes_bit_identically(
    name: str, most: int, forks: Forks, tiny_overrides: list[str]
) -> None:
    """Times between a chunk and a step, while a checkpoint is written and while a run finishes are
    among them."""
    if name == "cached" and not CAN_CACHE:
        pytest.skip("activations are not cached on disk yet")
    cache = [f"runtime.{CACHE}=activations"] if name == "cached" else []
    source = stored(forks.folder) if name == "stored" else tiny_overrides
    case = Case(forks, [*source, *SMALL, OFTEN, *CASES[name], *cache])
    chosen = random.Random(f"{SEED} {name}")
    kills = completed = 0
    while kills < most or not completed:
        last = kills >= most
        ended = forks.run(case.command, after=None if last else chosen.uniform(0, case.seconds))
        if ended.killed:
            kills += 1
            states = {run.status for run in RunStore(case.outputs).runs()}
            assert states <= {"missing", "interrupted", "finished"}, f"seed {SEED}"
            continue
        assert ended.status == 0, f"seed {SEED}: {ended.said}"
        assert differences(everything(case.outputs), case.expected) == [], f"seed {SEED}"
        completed += 1
        case.clean()


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY)
def test_a_sweep_killed_before_any_write_resumes_bit_identically(
    every: int, forks: Forks, tiny_overrides: list[str]
) -> None:
    """The file that is being written is also truncated."""
    case = Case(forks, [*tiny_overrides, *SHORT])
    counted = forks.folder / "count"
    ended = forks.run(case.command, {"kind": "count", "into": str(counted)})
    assert ended.status == 0, ended.said
    writes = int(counted.read_text())
    assert writes > 40
    for at in range(random.Random(SEED).randint(1, every), writes + 1, every):
        case.clean()
        assert forks.run(case.command, {"kind": "kill", "at": at}).killed, at
        case.run()
        assert differences(everything(case.outputs), case.expected) == [], at


@pytest.mark.slow
@pytest.mark.parametrize("files", [2, pytest.param(1, marks=pytest.mark.audit)])
def test_a_comparison_killed_at_its_writes_resumes_bit_identically(
    files: int, forks: Forks, tiny_overrides: list[str]
) -> None:
    """Each attempt writes ``files`` more files, until the cell has all its measures."""
    line = [*tiny_overrides, *SMALL, "training.tokens=512", "comparison=seeds", "sae=topk"]
    line += ["seed=0,1", "runtime.outputs=compared", "runtime.sweeps=tables"]
    folder = forks.folder / "tables"
    ended = forks.run(["run", *line])
    assert ended.status == 0, ended.said
    expected = tables(folder)
    assert {"summary.csv", "pairs.csv", "latents.parquet", "cell.json"} <= {
        Path(name).name for name in expected
    }
    shutil.rmtree(folder)
    for at in range(1, 28, 2 * files):  # a file takes two writes: sync its contents, then rename it
        assert forks.run(["compare", *line], {"kind": "kill", "at": at}).killed, at
    ended = forks.run(["compare", *line])
    assert ended.status == 0, ended.said
    found = tables(folder)
    assert [name for name in {*found, *expected} if found.get(name) != expected.get(name)] == []


def tables(folder: Path) -> dict[str, object]:
    """Return the files of a comparison, without those of Hydra; killed writers left none."""
    assert [path for path in folder.rglob("*") if ".part-" in path.name] == []
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {
        str(path.relative_to(folder)): repr(pq.read_table(path).to_pydict())
        if path.suffix == ".parquet"
        else path.read_bytes()
        for path in paths
    }
