"""The plan of a command: groups of runs that train together, and their cost.

It is made and printed before anything starts. Runs that read the same activations form one group,
even if their hookpoints, architectures, budgets and batch sizes differ: one pass of the source
feeds them all, down to the deepest hookpoint and as far as the largest budget. A group that would
not fit into memory is split into as few groups as possible, since each needs its own pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reseed.config import ReseedError
from reseed.console import counted, say
from reseed.devices import available_memory, pick_device
from reseed.train.cost import STEP_EFFICIENCY, Cost, cost, product_speed, step_flops
from reseed.train.team import team_size

if TYPE_CHECKING:
    from reseed.experiment import Resolved
    from reseed.train.config import RuntimeConfig

MEMORY_SHARE = 0.85
"""Fraction of the free memory that a group may take: estimates err, and other processes grow."""


class OutOfMemory(ReseedError):
    """Error of a group that did not fit into memory. Checkpoints of its runs stay valid."""


@dataclass(frozen=True)
class Group:
    """Runs that train in one pass of their source."""

    members: tuple[Resolved, ...]
    cost: Cost

    @classmethod
    def of(cls, members: Sequence[Resolved]) -> Group:
        return cls(tuple(members), cost(members))

    @property
    def described(self) -> str:
        """The group in words, without the time, which depends on the machine."""
        return (
            f"{counted(len(self.members), 'SAE')} ({_kinds(self.members)}) on "
            f"{_where(self.members)}: {_tokens(self.members)}, {size(self.cost.memory)}"
        )

    def needs(self, machine: Machine) -> float:
        """Return the peak memory in bytes of any one process."""
        return machine.needs(self.members)

    def halves(self) -> tuple[Group, Group]:
        """Split the group into two of about the same size; it needs at least two runs."""
        middle = len(self.members) // 2
        return Group.of(self.members[:middle]), Group.of(self.members[middle:])


@dataclass(frozen=True)
class Machine:
    """The machine that trains.

    Attributes:
        device: of the training.
        memory: bytes that a group may take in each process that trains it.
        speed: floating-point operations per second of a plain product in each process.
        strategy: how processes train a group (`RuntimeConfig.strategy`).
        ranks: number of processes.
    """

    device: torch.device
    memory: float
    speed: float
    strategy: str = "single"
    ranks: int = 1

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> Machine:
        """Describe this machine, or the one that the runtime options describe."""
        device = pick_device(runtime.device)
        ranks = team_size(runtime)
        shared = ranks if device.type == "cpu" else 1  # processes share the host, not a GPU
        if runtime.memory_gib is not None:
            memory = runtime.memory_gib * 2**30
        else:
            memory = MEMORY_SHARE * available_memory(device) / shared
        if runtime.tflops is not None:
            speed = runtime.tflops * 1e12
        else:
            speed = product_speed(device) / shared
        return cls(device, memory, speed, runtime.strategy, ranks)

    @property
    def described(self) -> str:
        """The device or the processes in words: ``cpu``, ``4 processes (ddp)``."""
        return self.device.type if self.ranks == 1 else f"{self.ranks} processes ({self.strategy})"

    def seconds(self, cost: Cost) -> float:
        """Estimate the duration in seconds."""
        return cost.flops / (STEP_EFFICIENCY * self.speed * self.ranks)

    def needs(self, members: Sequence[Resolved]) -> float:
        """Estimate the bytes that a group takes in the process that needs the most."""
        if self.strategy != "spread" or self.ranks == 1:
            return cost(members).memory
        parts = [[members[i] for i in part] for part in spread(members, self.ranks)]
        return max(cost(part, members).memory for part in parts if part)


@dataclass(frozen=True)
class Plan:
    """The groups that a command will train.

    Attributes:
        groups: trained one after the other.
        calibrations: number of cells whose penalty weight is found first; their calibration runs
            are not counted in the plan.
    """

    machine: Machine
    groups: tuple[Group, ...]
    calibrations: int = 0

    @property
    def runs(self) -> int:
        return sum(len(group.members) for group in self.groups)

    def say(self, finished: int = 0) -> None:
        """Print the plan: one line for the whole, and one per group.

        Args:
            finished: number of runs that are finished already.
        """
        if not self.groups:
            say(f"plan: nothing to train; {counted(finished, 'run')} finished")
            return
        costs = [group.cost for group in self.groups]
        seconds = sum(map(self.machine.seconds, costs))
        done = f" ({finished:,} more already finished)" if finished else ""
        say(
            f"plan: {counted(self.runs, 'run')} in {counted(len(costs), 'group')}{done}, on "
            f"{self.machine.described} about {duration(seconds)}, at most "
            f"{size(max(group.needs(self.machine) for group in self.groups))} of memory"
            f"{' in each' if self.machine.ranks > 1 else ''}, weights of "
            f"{size(sum(c.stored for c in costs))}"
        )
        for number, group in enumerate(self.groups, 1):
            say(f"  {number:>{len(str(len(costs)))}}  {self._line(group)}")
        if self.calibrations:
            cells = counted(self.calibrations, "penalty weight")
            say(f"  before that, {cells} found by calibration runs (2 to 9 for each)")

    def _line(self, group: Group) -> str:
        crowded, needs = "", group.needs(self.machine)
        if needs > self.machine.memory:
            crowded = f" (more than the {size(self.machine.memory)} available)"
        return (
            f"{counted(len(group.members), 'SAE')} ({_kinds(group.members)}) on "
            f"{_where(group.members)}: {_tokens(group.members)}, about "
            f"{duration(self.machine.seconds(group.cost))}, {size(needs)}{crowded}"
        )


def make_plan(experiments: Sequence[Resolved], machine: Machine) -> Plan:
    """Group the distinct experiments, in the order given."""
    groups = [
        Group.of(part)
        for members in by_stream(experiments)
        for part in fitting(members, machine.memory, machine.needs)
    ]
    cells = {r.without_seeds().signature for r in experiments if r.needs_calibration}
    return Plan(machine, tuple(groups), len(cells))


def by_stream(experiments: Sequence[Resolved]) -> list[list[Resolved]]:
    """Return the distinct experiments grouped by the stream they read, in the order given."""
    streams: dict[str, dict[str, Resolved]] = {}
    for resolved in experiments:
        streams.setdefault(resolved.stream, {}).setdefault(resolved.signature, resolved)
    return [list(members.values()) for members in streams.values()]


def spread(members: Sequence[Resolved], ranks: int) -> list[list[int]]:
    """Divide the runs among processes, with about equal work; return their indices per process.

    Runs are assigned from the costliest on, each to the process with the least work. The result is
    the same on every rank.
    """
    work = [step_flops(r) * r.experiment.training.steps for r in members]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for i in sorted(range(len(members)), key=lambda i: (-work[i], i)):
        least = min(range(ranks), key=load.__getitem__)
        parts[least].append(i)
        load[least] += work[i]
    return [sorted(part) for part in parts]


def fitting(
    members: Sequence[Resolved],
    memory: float,
    needs: Callable[[Sequence[Resolved]], float] = lambda members: cost(members).memory,
) -> list[list[Resolved]]:
    """Split runs into few groups of at most ``memory`` bytes; a run that does not fit is alone.

    They are split by depth, and within a hookpoint by size, so that each group reads few
    hookpoints: chunks take memory, and the model runs only up to the deepest hookpoint.
    """
    if len(members) == 1 or needs(members) <= memory:
        return [list(members)]
    ordered = sorted(
        members, key=lambda r: (r.experiment.layer, str(r.experiment.hook), r.num_latents)
    )
    parts: list[list[Resolved]] = []
    for resolved in ordered:
        if parts and needs([*parts[-1], resolved]) <= memory:
            parts[-1].append(resolved)
        else:
            parts.append([resolved])
    return parts


def announce(group: Group, machine: Machine, number: int = 1, of: int = 1) -> None:
    """Print that a group starts; if there are several, briefly: the plan has its details."""
    if of > 1:
        say(f"group {number} of {of}: {counted(len(group.members), 'SAE')} "
            f"on {_where(group.members)}")  # fmt: skip
        return
    trained = [r for r in group.members if r.pretrained is None]
    if not trained:
        say(f"measuring {counted(len(group.members), 'SAE')} ({_kinds(group.members)}) on "
            f"{_where(group.members)}")  # fmt: skip
        return
    recipes = ", ".join(sorted({r.experiment.training.recipe for r in trained}))
    say(
        f"training {counted(len(group.members), 'SAE')} ({_kinds(group.members)}) on "
        f"{_where(group.members)}\n"
        f"  recipe {recipes}: {_tokens(group.members)}, "
        f"{group.cost.parameters:,} parameters in all\n"
        f"  on {machine.described}, about {duration(machine.seconds(group.cost))} and "
        f"{size(group.needs(machine))}{' in each' if machine.ranks > 1 else ''}"
    )


def _where(members: Sequence[Resolved]) -> str:
    hooks = ", ".join(sorted({str(r.experiment.hook) for r in members}))
    return f"{members[0].model_label} {hooks}, {members[0].data.described}"


def _kinds(members: Sequence[Resolved]) -> str:
    found = {f"{r.sae.name} {r.num_latents:,} {r.sparsity}"
             for r in members}  # fmt: skip
    return ", ".join(sorted(found))


def _tokens(members: Sequence[Resolved]) -> str:
    budgets = sorted({r.tokens for r in members if r.pretrained is None} or {0})
    told = " to ".join(f"{budget:,}" for budget in dict.fromkeys((budgets[0], budgets[-1])))
    return f"{told} tokens each"


def duration(seconds: float) -> str:
    """Format a duration: ``40 s``, ``12 min``, ``3.1 h``, ``5.0 days``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3_600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


def size(count: float) -> str:
    """Format a number of bytes: ``80 KiB``, ``35 MiB``, ``0.3 GiB``, ``48.0 GiB``, ``1.2 TiB``."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    if count < 100 * 2**20:
        return f"{count / 2**20:.0f} MiB"
    if count < 2**40:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**40:.1f} TiB"
