"""The processes that train: this one alone, processes that it starts, or the tasks of a SLURM job.

They start for the first group and train all groups. Workers receive their work by messages, never
by a command line (`reseed.distributed.worker`). After an error workers may be in the middle of a
group, so the next group gets new processes.

The processes find each other through a file (torch's `FileStore`) in a folder that only the user
can enter, in which they also find the key that authenticates their messages.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from reseed.distributed.process_group import PATIENCE, ProcessGroup, ProcessLostError
from reseed.errors import ConfigError, ReseedError
from reseed.system.console import say
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

ADDRESS = "RESEED_TEAM"
"""Environment variable of a worker: leader's process id:index:count:device:rendezvous folder."""
OUT_OF_MEMORY = 77
"""Exit status of a worker whose memory did not suffice."""
_GRACE_S = {"ddp": 0.0, "spread": 90.0}
"""Seconds that terminated workers have to save their runs; with ddp only the leader saves."""
_END_S = 30.0
"""Seconds that workers have to exit when no work is left."""
_MEETING_S = 300.0
"""Seconds that the tasks of a SLURM job wait for the folder that the first one makes."""


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
        self._folder: Path | None = None
        self._workers: list[subprocess.Popen[bytes]] = []

    @property
    def ranks(self) -> ProcessGroup:
        if self._ranks is None:
            self._ranks = self._start()
        return self._ranks

    def _start(self) -> ProcessGroup:
        self._folder = Path(tempfile.mkdtemp(prefix="reseed-"))  # with mode 0700
        for index in range(1, self.count):
            address = f"{os.getpid()}:{index}:{self.count}:{self.kind}:{self._folder}"
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "reseed.distributed.worker"],
                    env=os.environ | {ADDRESS: address},
                    stdin=subprocess.DEVNULL,
                )
            )
        store = open_store(self._folder)
        return join(store, 0, self.count, self.kind, check=self._check_workers)

    def _check_workers(self) -> None:
        for index, process in enumerate(self._workers, 1):
            status = process.poll()
            if status is not None:
                raise lost_process_error(index, status)

    def end(self, terminate: bool = False) -> None:
        if self._ranks is not None and not terminate:
            with suppress(ProcessLostError):
                self._ranks.broadcast_json(None)
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
            if self._folder is not None:
                leave()
                shutil.rmtree(self._folder, ignore_errors=True)
            self._workers, self._ranks, self._folder = [], None, None


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
            shutil.rmtree(_slurm_folder(), ignore_errors=True)
            os._exit(1)  # SLURM ends the other tasks only when a task exits

    def end(self, terminate: bool = False) -> None:
        # Tasks that cannot receive a message end with the job.
        if self._ranks is None:
            return
        if not terminate:
            self._ranks.broadcast_json(None)
            leave()
            self._ranks = None
        shutil.rmtree(_slurm_folder(), ignore_errors=True)


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
    """Connect to the other tasks of this job's step, which Lightning finds.

    Raises:
        ReseedError: reseed did not submit the job, or this rank cannot use the tasks' folder.
    """
    place = SLURMEnvironment(auto_requeue=False)  # our launcher requeues
    index, count = place.global_rank(), place.world_size()
    folder = _slurm_folder()
    until = time.monotonic() + _MEETING_S
    while index and not folder.exists():
        if time.monotonic() > until:
            raise ReseedError(f"rank {index} waited {_MEETING_S:.0f} s for {folder}, which rank 0 "
                              "makes: all nodes must see runtime.sweeps")  # fmt: skip
        time.sleep(0.1)
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    store = open_store(folder, make=index == 0)
    return join(store, index, count, kind, place.local_rank(), count // nodes)


def _slurm_folder() -> Path:
    """Return the folder, in that of the sweep, in which the tasks of this start of the job meet."""
    found = os.environ
    if "SUBMITIT_FOLDER" not in found:
        raise ReseedError(
            "the tasks of a SLURM step train together only in jobs that reseed submits: add "
            "hydra/launcher=slurm, or start one task"
        )
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    start = "-".join(found.get(name, "0") for name in names)
    return Path(found["SUBMITIT_FOLDER"]) / f".ranks-{start}"


def open_store(folder: Path, make: bool = False) -> FileStore:
    """Return the key-value store of ``folder``, through which ranks find each other.

    Args:
        make: make the folder, which must not exist yet.

    Raises:
        ReseedError: other users can enter the folder, or this process cannot.
    """
    try:
        if make:
            folder.mkdir(0o700)
        there = folder.lstat()
        private = stat.S_ISDIR(there.st_mode) and not there.st_mode & 0o077  # setgid is harmless
        if there.st_uid != os.geteuid() or not private:
            raise PermissionError("it must be a folder of this user with mode 0700")
        (folder / "store").touch(0o600)
        return FileStore(str(folder / "store"), -1)
    except OSError as error:
        why = error.strerror or error
        raise ReseedError(f"cannot use {folder}, in which the ranks meet: {why}") from error


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
        store: the key-value store through which the ranks find each other (`open_store`). Rank 0
            puts the key of the group into it.
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
    if index == 0:
        store.set("key", secrets.token_hex(32))
    # Wait here until all are ready: `init_process_group` would wait without calling `check`.
    store.set(f"ready-{index}", "")
    while not store.check([f"ready-{other}" for other in range(count)]):
        check()
        time.sleep(0.02)
    if local_count == count:
        _use_loopback()
    dist.init_process_group(
        "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=index,
        world_size=count,
        timeout=PATIENCE,
    )
    key = bytes.fromhex(store.get("key").decode())
    return ProcessGroup(index, count, device, local_index, local_count, check, key)


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in _interfaces.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    _interfaces.clear()


_interfaces: dict[str, str | None] = {}
"""The user's values of the variables that `_use_loopback` sets."""


def _use_loopback() -> None:
    """Let gloo and NCCL listen on the loopback interface alone until `leave`.

    Each channel opens sockets of its own, so the variables stay set.
    """
    found = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if not found:
        raise ReseedError("processes of one machine need its loopback interface (lo): it has none")
    for name, value in (("GLOO_SOCKET_IFNAME", found[0]), ("NCCL_SOCKET_IFNAME", f"={found[0]}")):
        _interfaces[name] = os.environ.get(name)
        os.environ[name] = value


def lost_process_error(index: int, status: int) -> ProcessLostError:
    """Return the error for a worker that ended unexpectedly.

    Args:
        status: its exit status, negative for a signal.
    """
    if status == OUT_OF_MEMORY:
        return ProcessLostError(f"rank {index} ran out of memory", out_of_memory=True)
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    return ProcessLostError(f"rank {index} ended {how}; see its output above")
