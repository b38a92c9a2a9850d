"""The processes that train: this one alone, processes that it starts, or the tasks of a SLURM job.

They start for the first group and train all groups. Workers receive their work by messages, never
by a command line (`reseed.distributed.worker`). After an error workers may be in the middle of a
group, so the next group gets new processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from reseed.distributed.process_group import PATIENCE, ProcessGroup, ProcessLostError
from reseed.errors import ConfigError
from reseed.system.console import say
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

ADDRESS = "RESEED_TEAM"
"""Environment variable of a worker: host:port:index:count:device."""
OUT_OF_MEMORY = 77
"""Exit status of a worker whose memory did not suffice."""
_GRACE_S = {"ddp": 0.0, "spread": 90.0}
"""Seconds that terminated workers have to save their runs; with ddp only the leader saves."""
_END_S = 30.0
"""Seconds that workers have to exit when no work is left."""


class Processes(ABC):
    """The processes that train. Use it as a context, which ends the workers on exit.

    Attributes:
        strategy: ``single``, ``ddp`` or ``spread``.
    """

    strategy: str = "single"

    @property
    @abstractmethod
    def ranks(self) -> ProcessGroup:
        """This process's rank. The first access starts or joins the workers."""

    def end(self, terminate: bool = False) -> None:  # noqa: B027 (a single process has no workers)
        """End the workers.

        Args:
            terminate: workers may be in the middle of a group and cannot receive a message, so
                they are terminated.
        """

    def discard(self) -> None:
        """Drop the workers after a failed group; the next group gets new processes."""
        self.end(terminate=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(terminate=error is not None)


class SingleProcess(Processes):
    """This process alone."""

    def __init__(self, device: torch.device) -> None:
        self._ranks = ProcessGroup(device=device)

    @property
    def ranks(self) -> ProcessGroup:
        return self._ranks


class LocalProcesses(Processes):
    """This process and workers that it starts on this machine.

    Args:
        strategy: ``ddp`` or ``spread``.
        count: number of processes, this one included.
        kind: ``cpu``, or ``cuda`` with one GPU per process.
    """

    def __init__(self, strategy: str, count: int, kind: str) -> None:
        self.strategy, self.count, self.kind = strategy, count, kind
        self._ranks: ProcessGroup | None = None
        self._workers: list[subprocess.Popen[bytes]] = []

    @property
    def ranks(self) -> ProcessGroup:
        if self._ranks is None:
            self._ranks = self._start()
        return self._ranks

    def _start(self) -> ProcessGroup:
        host = "127.0.0.1"
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        for index in range(1, self.count):
            address = f"{host}:{store.port}:{index}:{self.count}:{self.kind}"
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "reseed.distributed.worker"],
                    env=os.environ | {ADDRESS: address},
                    stdin=subprocess.DEVNULL,
                )
            )
        return join(store, 0, self.count, self.kind, check=self._check_workers)

    def _check_workers(self) -> None:
        for index, process in enumerate(self._workers, 1):
            status = process.poll()
            if status is not None:
                raise lost_process_error(index, status)

    def end(self, terminate: bool = False) -> None:
        if self._ranks is not None and not terminate:
            with suppress(ProcessLostError):
                self._ranks.broadcast_object(None)
        try:
            if terminate:
                for process in self._workers:
                    process.terminate()
            until = time.monotonic() + (_GRACE_S[self.strategy] if terminate else _END_S)
            for process in self._workers:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:  # a second Ctrl-C may end the waiting
            for process in self._workers:
                process.kill()
                process.wait()
            if self._ranks is not None:
                leave()
            self._workers, self._ranks = [], None


class SlurmProcesses(Processes):
    """The tasks of a SLURM job; this process is the first of them."""

    def __init__(self, strategy: str, kind: str) -> None:
        self.strategy, self.kind = strategy, kind
        self._ranks: ProcessGroup | None = None

    @property
    def ranks(self) -> ProcessGroup:
        if self._ranks is None:
            self._ranks = join_slurm(self.kind)
        return self._ranks

    def discard(self) -> None:
        if self._ranks is not None:
            say("the job ends because its processes lost their connection; run the same command "
                "again to submit the remaining runs")  # fmt: skip
            sys.stdout.flush()
            os._exit(1)  # SLURM ends the other tasks only when a task exits

    def end(self, terminate: bool = False) -> None:
        # Tasks that cannot receive a message end with the job.
        if self._ranks is not None and not terminate:
            self._ranks.broadcast_object(None)
            leave()
            self._ranks = None


def open_processes(runtime: RuntimeConfig) -> Processes:
    """Return the processes that the runtime options ask for; none starts yet.

    Raises:
        ConfigError: there are fewer devices than processes, or the number of processes is not
            given.
    """
    if runtime.strategy == "single":
        return SingleProcess(pick_device(runtime.device))
    kind = pick_device(runtime.device).type
    if slurm_tasks() > 1:
        return SlurmProcesses(runtime.strategy, kind)
    count = local_count(runtime, kind)
    if count == 1:
        return SingleProcess(pick_device(runtime.device))
    return LocalProcesses(runtime.strategy, count, kind)


def process_count(runtime: RuntimeConfig) -> int:
    """Return the number of processes that train together, on all nodes.

    Raises:
        ConfigError: see `open_processes`.
    """
    if runtime.strategy == "single":
        return 1
    tasks = slurm_tasks()
    return tasks if tasks > 1 else local_count(runtime, pick_device(runtime.device).type)


def local_count(runtime: RuntimeConfig, kind: str) -> int:
    """Return the number of processes that train on this machine.

    Raises:
        ConfigError: see `open_processes`.
    """
    key = "runtime.ranks"
    if runtime.ranks is not None and runtime.tflops is not None:  # planning for another machine
        return runtime.ranks
    there = torch.cuda.device_count() if kind == "cuda" else None
    if runtime.ranks is None:
        if there is None:
            raise ConfigError(
                f"{{key}} is required with runtime={runtime.strategy} on the CPU: set it to the "
                "number of processes that train together",
                key,
            )
        if runtime.strategy == "ddp" and there & (there - 1):
            raise ConfigError(
                f"{{key}} must be 1, 2, 4 or 8 with runtime=ddp; it is null, and this machine has "
                f"{there} GPUs: set it to the number to use",
                key,
            )
        return min(there, 8) if runtime.strategy == "ddp" else there
    if there is not None and runtime.ranks > there:
        raise ConfigError(
            f"{{key}} (={runtime.ranks}) must not exceed the GPUs of this machine: {there}", key
        )
    return runtime.ranks


def slurm_tasks() -> int:
    """Return the number of tasks of this process's SLURM step; 1 outside of SLURM."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def join_slurm(kind: str) -> ProcessGroup:
    """Connect to the other tasks of this job's step, which Lightning finds."""
    place = SLURMEnvironment(auto_requeue=False)  # our launcher requeues
    index, count = place.global_rank(), place.world_size()
    store = TCPStore(
        place.main_address,
        place.main_port,
        is_master=index == 0,
        wait_for_workers=False,
    )
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return join(store, index, count, kind, place.local_rank(), count // nodes)


def join(
    store: Any,
    index: int,
    count: int,
    kind: str,
    local_index: int | None = None,
    local_count: int | None = None,
    check: Any = lambda: None,
) -> ProcessGroup:
    """Connect to the other ranks.

    Args:
        store: the key-value store through which the ranks find each other.
        local_index, local_count: index and number of the ranks on this node; by default all ranks
            are on one node.
        check: raises `ProcessLostError` if a rank has ended.
    """
    local_index = index if local_index is None else local_index
    local_count = local_count or count
    if kind == "cuda":
        device = torch.device("cuda", local_index % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # Wait here until all are ready: `init_process_group` would wait without calling `check`.
    store.set(f"ready-{index}", "")
    while not store.check([f"ready-{other}" for other in range(count)]):
        check()
        time.sleep(0.02)
    with _loopback(local_count == count):
        dist.init_process_group(
            "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=index,
            world_size=count,
            timeout=PATIENCE,
        )
    return ProcessGroup(index, count, device, local_index, local_count, check)


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _loopback:
    """A context in which gloo uses the loopback device if all processes are on one machine, whose
    host name may not resolve to its own address."""

    _KEY = "GLOO_SOCKET_IFNAME"

    def __init__(self, one_machine: bool) -> None:
        names = [name for _, name in socket.if_nameindex()]
        self.sets = one_machine and "lo" in names and self._KEY not in os.environ

    def __enter__(self) -> None:
        if self.sets:
            os.environ[self._KEY] = "lo"

    def __exit__(self, *_: object) -> None:
        if self.sets:
            del os.environ[self._KEY]


def lost_process_error(index: int, status: int) -> ProcessLostError:
    """Return the error for a worker that ended unexpectedly.

    Args:
        status: its exit status, negative for a signal.
    """
    if status == OUT_OF_MEMORY:
        return ProcessLostError(f"rank {index} ran out of memory", out_of_memory=True)
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    return ProcessLostError(f"rank {index} ended {how}; see its output above")
