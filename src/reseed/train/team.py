"""Who trains: this process, or a team of processes that it starts or that are there already.

A team is started for the first group and serves all of them. Its followers are given what to do by
messages, never by a command line (`reseed.follow`). After an error they are in the middle of
something; then the next group has a new team.
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
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from reseed.config import ConfigError
from reseed.console import say
from reseed.devices import pick_device
from reseed.ranks import PATIENCE, RankLost, Ranks
from reseed.train.config import RuntimeConfig

ADDRESS = "RESEED_TEAM"
"""Environment variable of a follower: host:port:index:count:device."""
OUT_OF_MEMORY = 77
"""Exit status of a follower whose memory did not suffice."""
_GRACE_S = {"ddp": 0.0, "spread": 90.0}
"""Time to save for followers that are told to stop, where they have SAEs of their own."""

_END_S = 30.0
"""Time to end for followers that have nothing left to do."""


class Team(ABC):
    """The processes that train. Use it as a context, which ends it.

    Attributes:
        strategy: ``single``, ``ddp`` or ``spread``.
    """

    strategy: str = "single"

    @property
    @abstractmethod
    def ranks(self) -> Ranks:
        """This process among them. Starts those that are lacking."""

    def end(self, unheard: bool = False) -> None:  # noqa: B027 (alone there is nobody)
        """The followers end.

        Args:
            unheard: they may be in the middle of something, and are not told but stopped.
        """

    def broken(self) -> None:
        """A group failed, and followers may be in the middle of it: the next one has a new team."""
        self.end(unheard=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(unheard=error is not None)


class Alone(Team):
    """This process."""

    def __init__(self, device: torch.device) -> None:
        self._ranks = Ranks(device=device)

    @property
    def ranks(self) -> Ranks:
        return self._ranks


class LocalTeam(Team):
    """This process and others that it starts on this machine.

    Args:
        strategy: ``ddp`` or ``spread``.
        count: how many processes in all.
        kind: ``cpu``, or ``cuda``: then each has a GPU.
    """

    def __init__(self, strategy: str, count: int, kind: str) -> None:
        self.strategy, self.count, self.kind = strategy, count, kind
        self._ranks: Ranks | None = None
        self._followers: list[subprocess.Popen[bytes]] = []

    @property
    def ranks(self) -> Ranks:
        if self._ranks is None:
            self._ranks = self._start()
        return self._ranks

    def _start(self) -> Ranks:
        host = "127.0.0.1"
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        for index in range(1, self.count):
            address = f"{host}:{store.port}:{index}:{self.count}:{self.kind}"
            self._followers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "reseed.follow"],
                    env=os.environ | {ADDRESS: address},
                    stdin=subprocess.DEVNULL,
                )
            )
        return join(store, 0, self.count, self.kind, check=self._look_after)

    def _look_after(self) -> None:
        for index, process in enumerate(self._followers, 1):
            status = process.poll()
            if status is not None:
                raise lost(index, status)

    def end(self, unheard: bool = False) -> None:
        if self._ranks is not None and not unheard:
            with suppress(RankLost):
                self._ranks.tell(None)
        try:
            if unheard:
                for process in self._followers:
                    process.terminate()
            until = time.monotonic() + (_GRACE_S[self.strategy] if unheard else _END_S)
            for process in self._followers:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:  # also where a second Ctrl-C ends the waiting
            for process in self._followers:
                process.kill()
                process.wait()
            if self._ranks is not None:
                leave()
            self._followers, self._ranks = [], None


class SlurmTeam(Team):
    """The tasks of a SLURM job with several: this one is the first."""

    def __init__(self, strategy: str, kind: str) -> None:
        self.strategy, self.kind = strategy, kind
        self._ranks: Ranks | None = None

    @property
    def ranks(self) -> Ranks:
        if self._ranks is None:
            self._ranks = join_slurm(self.kind)
        return self._ranks

    def broken(self) -> None:
        if self._ranks is not None:
            say("the processes of this job have lost each other, and it ends; the same command "
                "submits what is left")  # fmt: skip
            sys.stdout.flush()
            os._exit(1)  # which ends the others; nothing else would

    def end(self, unheard: bool = False) -> None:
        # Unheard, they end with the job.
        if self._ranks is not None and not unheard:
            self._ranks.tell(None)
            leave()
            self._ranks = None


def team_of(runtime: RuntimeConfig) -> Team:
    """The team that a runtime asks for; nothing is started yet.

    Raises:
        ConfigError: there are not so many devices, or nobody says how many.
    """
    if runtime.strategy == "single":
        return Alone(pick_device(runtime.device))
    kind = pick_device(runtime.device).type
    if slurm_tasks() > 1:
        return SlurmTeam(runtime.strategy, kind)
    count = local_count(runtime, kind)
    if count == 1:
        return Alone(pick_device(runtime.device))
    return LocalTeam(runtime.strategy, count, kind)


def team_size(runtime: RuntimeConfig) -> int:
    """How many processes train together, on all nodes.

    Raises:
        ConfigError: see `team_of`.
    """
    if runtime.strategy == "single":
        return 1
    tasks = slurm_tasks()
    return tasks if tasks > 1 else local_count(runtime, pick_device(runtime.device).type)


def local_count(runtime: RuntimeConfig, kind: str) -> int:
    """How many processes train on this machine.

    Raises:
        ConfigError: see `team_of`.
    """
    key = "runtime.ranks"
    if runtime.ranks is not None and runtime.tflops is not None:  # a plan for another machine
        return runtime.ranks
    there = torch.cuda.device_count() if kind == "cuda" else None
    if runtime.ranks is None:
        if there is None:
            raise ConfigError(
                f"{{key}} is required with runtime={runtime.strategy} on the CPU: how many "
                "processes train together",
                key,
            )
        if runtime.strategy == "ddp" and there & (there - 1):
            raise ConfigError(
                f"{{key}} must be 1, 2, 4 or 8 with runtime=ddp: here are {there} GPUs, of which "
                "as many are taken as it says; it is null",
                key,
            )
        return min(there, 8) if runtime.strategy == "ddp" else there
    if there is not None and runtime.ranks > there:
        raise ConfigError(
            f"{{key}} (={runtime.ranks}) must not exceed the GPUs that are here: {there}", key
        )
    return runtime.ranks


def slurm_tasks() -> int:
    """Of the SLURM step that this process is a task of; 1 where it is of none."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def join_slurm(kind: str) -> Ranks:
    """Meet the other tasks of this job's step, as Lightning finds them."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    place = SLURMEnvironment(auto_requeue=False)  # who submits also requeues
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
) -> Ranks:
    """Meet the other ranks.

    Args:
        store: where they find each other.
        local_index, local_count: among those of the node; by default there is one node.
        check: raises `RankLost` where one is gone.
    """
    local_index = index if local_index is None else local_index
    local_count = local_count or count
    if kind == "cuda":
        device = torch.device("cuda", local_index % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # Not before all are there: what follows would wait for them without a look.
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
    return Ranks(index, count, device, local_index, local_count, check)


def leave() -> None:
    """Undo `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _loopback:
    """Within it gloo takes the loopback device, for processes of one machine: what its name
    resolves to is not always an address of it."""

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


def lost(index: int, status: int) -> RankLost:
    """What to say of a follower that ended by itself.

    Args:
        status: its exit status, negative for a signal.
    """
    if status == OUT_OF_MEMORY:
        return RankLost(f"rank {index} ran out of memory", out_of_memory=True)
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    return RankLost(f"rank {index} of the team ended {how}; what it said stands above")
