"""Training commands with several processes, started as a user starts them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore

SMALL = ["runtime.device=cpu", "runtime.threads=1"]
SLOW = ["sae=topk,batch_topk", "seed=0", "training.tokens=8192", "runtime.checkpoint_every_s=0.1"]


def command(line: Sequence[str], outputs: Path) -> list[str]:
    own = [f"runtime.outputs={outputs}", f"runtime.sweeps={outputs.parent}/sweeps"]
    return [sys.executable, "-m", "reseed", "train", "-m", *SMALL, *line, *own]


def begin(line: Sequence[str], outputs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(line, outputs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def trained(line: Sequence[str], outputs: Path) -> dict[str, Run]:
    done = subprocess.run(command(line, outputs), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {run.signature: run for run in RunStore(outputs).runs()}


def differences(found: dict[str, Run], expected: dict[str, Run]) -> dict[str, float]:
    """Return each run's largest difference of weights, relative to the largest weight."""
    assert found.keys() == expected.keys()
    off = {}
    for signature, run in found.items():
        mine, its = load_sae(run.path).state_dict(), load_sae(expected[signature].path).state_dict()
        scale = {name: float(its[name].abs().max()) + 1e-6 for name in its}
        off[run.id] = max(float((mine[n] - its[n]).abs().max()) / scale[n] for n in its)
    return off


def curve(run: Run) -> list[str]:
    rows = (run.path / "training.csv").read_text().splitlines()
    place = rows[0].split(",").index("seconds")
    return [",".join(r.split(",")[:place] + r.split(",")[place + 1 :]) for r in rows]


def wait_for(true: Callable[[], object], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def followers(leader: int) -> list[int]:
    told = subprocess.run(["pgrep", "-P", str(leader)], capture_output=True, text=True)
    return [int(pid) for pid in told.stdout.split()]


def at_work(line: Sequence[str], outputs: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a command; once a checkpoint exists, return it and the ids of its workers."""
    leader = begin(line, outputs)
    wait_for(lambda: begun(outputs))
    return leader, followers(leader.pid)


def begun(outputs: Path) -> bool:
    return any(outputs.glob("*/checkpoint.pt"))
