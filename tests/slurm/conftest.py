"""Fixtures: a SLURM started for the tests, and a command line that submits to it."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_node import CONF, NEEDED, PACKAGES, Cluster, Desk, free_ports, quietly, said, stop


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"needs SLURM ({lacking[0]} is not here): {PACKAGES}")
    pytest.importorskip("submitit", reason="needs submitit: pip install 'reseed[slurm]'")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    controller, node = free_ports()
    conf.write_text(
        CONF.format(controller=controller, node=node, user=getpass.getuser(), folder=folder)
    )
    kept = {name: os.environ.get(name) for name in ("SLURM_CONF", "OMP_NUM_THREADS")}
    os.environ |= {"SLURM_CONF": str(conf), "OMP_NUM_THREADS": "1"}
    try:
        for command in (["slurmctld", "-c"], ["slurmd", "-N", "localhost"]):
            subprocess.run(command, check=True, timeout=30)
        found = Cluster(folder)
        found.wait_for(lambda: "idle" in said("sinfo", "-h", "-o", "%T"), 30)
        yield found
    finally:
        if (folder / "slurmd.pid").exists():
            quietly("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
        for name in ("slurmd", "slurmctld"):
            stop(folder / f"{name}.pid")
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@pytest.fixture
def desk(
    cluster: Cluster, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    # Jobs must import the same packages as this process.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    desk = Desk(
        cluster,
        [
            *tiny_overrides,
            "training.tokens=4096",
            "runtime.threads=1",
            "runtime.heartbeat_every_s=0.1",
            "hydra/launcher=slurm",
            "hydra.launcher.poll_s=0.3",
            "hydra.launcher.cpus_per_task=1",
            "hydra.launcher.timeout_min=5",
        ],
    )
    yield desk
    if list(Path("sweeps").glob("*/slurm/jobs.json")):
        quietly("scancel", "--signal=KILL", "--full", *{job.job for job in desk.jobs})
