"""SLURM of one node on loopback, run by this user, with its own ports and folders."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from reseed.cli.cluster.queue import InQueue, Record, Submitted, queue
from reseed.cli.cluster.states import QueueSnapshot, RunState, states
from reseed.store.sweeps import Sweep

HERE = Path(__file__).parent
os.environ["PATH"] += ":/usr/sbin:/sbin"
NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
PACKAGES = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client"
CONF = """\
ClusterName=reseed
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
ReturnToService=2
MinJobAge=86400
KillWait=15
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=localhost NodeAddr=127.0.0.1 CPUs=16 RealMemory=20000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """The running SLURM."""

    folder: Path

    def wait_for(self, what: Callable[[], object], seconds: float = 60) -> None:
        """Return once ``what()`` is true; fail after some seconds."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"not in {seconds} s: {queue()}"
            time.sleep(0.1)

    def start_now(self, job: str) -> None:
        """Start a requeued job at once; SLURM would wait for minutes."""
        name = f"jobid={job}"
        subprocess.run(["scontrol", "update", name, "starttime=now"], check=True)


def free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, timeout=30)


def stop(path: Path) -> None:
    """End the process that a file names, and wait until it is gone."""
    if not path.exists():
        return
    pid = int(path.read_text())
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


@dataclass(frozen=True)
class Desk:
    """A working folder with a command line whose runs train in a second."""

    cluster: Cluster
    line: list[str]

    def breaking(self, how: str) -> list[str]:
        """Return the line with jobs that slow down or fail as in breaking/sitecustomize.py."""
        lines = [
            f"export RESEED_TEST_BREAK={how}",
            f"export PYTHONPATH={HERE / 'breaking'}:$PYTHONPATH",
        ]
        listed = ",".join(f"'{line}'" for line in lines)
        return [*self.line, f"hydra.launcher.setup=[{listed}]"]

    @property
    def sweep(self) -> Sweep:
        (manifest,) = Path("sweeps").glob("*/manifest.jsonl")
        return Sweep(manifest.parent)

    @property
    def jobs(self) -> list[Submitted]:
        return Record(self.sweep.path).jobs

    @property
    def states(self) -> list[RunState]:
        return states(self.sweep, QueueSnapshot.now(self.sweep))

    def queue(self) -> dict[str, InQueue]:
        ours = {job.job for job in self.jobs}
        return {job: found for job, found in queue().items() if job in ours}

    def printed(self, job: Submitted) -> str:
        """Return a job's output, including that before it was requeued."""
        return (self.sweep.path / f"slurm/{job.job}_0_log.out").read_text()

    def trains(self) -> bool:
        """Return True if every run has written its progress."""
        return all(state.tokens for state in self.states)


def local(line: list[str], monkeypatch: pytest.MonkeyPatch, command: ModuleType) -> int:
    """Run the same command in this process, with separate folders."""
    own = [word for word in line if "hydra" not in word]
    return command.main([*own, "runtime.outputs=local/outputs", "runtime.sweeps=local/sweeps"])
