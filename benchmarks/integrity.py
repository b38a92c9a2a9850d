"""The cost of checksums: `reseed status` of many runs, and the verification of an SAE's file.

    python benchmarks/integrity.py
    python benchmarks/integrity.py --runs 2000 --mib 256

1. `reseed status` of many finished runs, beside a Python program that only parses the same records,
   and beside the start of the command (`reseed --help`). CPU seconds of whole processes, by turns.
2. The SHA-256 of an SAE's file, beside reading the file and beside loading the SAE with it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import reseed
from reseed.config import digest
from reseed.sae.checkpoint import save_sae
from reseed.sae.topk import TopKConfig
from reseed.store.runs import RESULTS, RunStore
from reseed.system import integrity

PARSE = """
import json, pathlib
for path in pathlib.Path("outputs").glob("*/run.json"):
    json.loads(path.read_text(encoding="utf-8"))
    json.loads((path.parent / "metrics.json").read_text(encoding="utf-8"))
"""


def make_runs(folder: Path, number: int) -> None:
    """Write finished runs with small files; their records have the size of real ones."""
    os.fsync = lambda handle: None  # the disk is not measured
    records = sorted(Path(__file__).parents[1].glob("tests/records/outputs/*/run.json"))
    template = json.loads(records[0].read_text(encoding="utf-8"))
    for i in range(number):
        identity = {**template["identity"], "number": i}
        run = RunStore(folder / "outputs").run(digest(identity), f"embedded-topk-seed{i}")
        run.path.mkdir(parents=True)
        run.begin({**template, "identity": identity})
        for name in RESULTS:
            (run.path / name).write_bytes(bytes(200))
        run.finish({"fvu": 0.1, "l0": 32.0, "dead_fraction": 0.0})


def spent(command: list[str], folder: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


def compare_status(number: int, rounds: int) -> None:
    commands = {
        "reseed status": [sys.executable, "-m", "reseed", "status"],
        "parse only": [sys.executable, "-c", PARSE],
        "reseed --help": [sys.executable, "-m", "reseed", "--help"],
    }
    with tempfile.TemporaryDirectory() as name:
        make_runs(Path(name), number)
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in commands}
        for _ in range(rounds):
            for kind, command in commands.items():
                times[kind].append(spent(command, Path(name)))
    middle = {kind: [statistics.median(values) for values in zip(*found, strict=True)]
              for kind, found in times.items()}  # fmt: skip
    for kind, (wall, cpu) in middle.items():
        print(f"{kind:<16} {wall:6.2f} s wall  {cpu:6.2f} s CPU")
    ratio = middle["reseed status"][1] / middle["parse only"][1]
    print(f"status of {number:,} runs takes {ratio:.1f} times the CPU time of parsing the records")


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        integrity._known.clear()  # hashes of files that this process has read
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def compare_loading(mib: int, rounds: int) -> None:
    d_in = 1024
    num_latents = mib * 2**20 // (2 * d_in * 4)
    sae = TopKConfig(num_latents=num_latents, k=32).build(d_in, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        save_sae(sae, name)
        path = Path(name) / "sae.safetensors"
        hashing = median_seconds(lambda: integrity.sha256_of(path), rounds)
        reading = median_seconds(path.read_bytes, rounds)
        loading = median_seconds(lambda: reseed.load_sae(name), rounds)
    gib = mib / 1024
    print(f"SHA-256: {gib / hashing:.2f} GiB per CPU second, {hashing / reading:.1f} times reading")
    print(
        f"load_sae of {mib} MiB: {loading:.2f} s CPU, of which {hashing / loading:.0%} is hashing"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of checksums.")
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    compare_status(given.runs, given.rounds)
    compare_loading(given.mib, given.rounds)


if __name__ == "__main__":
    main()
