"""The plan of a command: groups of runs that train together, and their cost.

It is made and printed before anything starts. Runs that read the same activations form one group,
even if their hookpoints, architectures, budgets and batch sizes differ: one pass of the source
feeds them all, down to the deepest hookpoint and as far as the largest budget. A group that would
not fit into memory is split into as few groups as possible, since each needs its own pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from reseed.distributed.launcher import process_count
from reseed.errors import ReseedError
from reseed.system.console import counted, say
from reseed.system.devices import available_memory, pick_device
from reseed.train.optim.muon import STEPS

if TYPE_CHECKING:
    from reseed.experiment.resolve import Resolved
    from reseed.train.config import RuntimeConfig

# MERGED Estimates, from shapes alone, of what training a group costs: time, memory, disk space.
STEP_EFFICIENCY = 0.25
"""Fraction of a plain product's speed that model and training step reach (small products, sparse
operations, optimiser). It is rough: an announced time can be off by a factor of two."""
_CHUNKS = 3
"""Chunks in memory at most: one that a block still refers to, the next, and a prefetched one."""
_FLOAT = 4.0  # bytes of a float32


@dataclass(frozen=True)
class Cost:
    """Cost of training a group of runs on one stream.

    Attributes:
        flops: floating-point operations of the source and of all steps.
        memory: peak memory in bytes.
        parameters: of all SAEs together.
    """

    flops: float
    memory: float
    parameters: int

    @property
    def stored(self) -> float:
        """Bytes of the runs' weights on disk."""
        return _FLOAT * self.parameters


def cost(group: Sequence[Resolved], beside: Sequence[Resolved] = ()) -> Cost:
    """Estimate the cost of a group that trains in one pass of its source.

    Operations: the products of the source and of each SAE's step (with those that Muon or an
    archetypal decoder adds), and 12 operations per weight for Adam. Bytes: the source's weights;
    for each SAE its weights, two moments and the copy that is measured and stored; gradients of one
    SAE, since they are freed before the next SAE's step; chunks; the work space of a step. An SAE
    that was trained elsewhere counts only with its weights.

    Args:
        beside: runs that other processes train and whose hookpoints are read too.
    """
    read = [*group, *beside]
    hooks = [r.experiment.hook for r in read]
    widths = {r.experiment.hook: r.d_in for r in read}
    flops = max(r.tokens for r in group) * group[0].source_flops(hooks)
    memory = float(group[0].data.weight_bytes)
    memory += _CHUNKS * _FLOAT * group[0].data.config.chunk_tokens * sum(widths.values())
    memory += max(_FLOAT * _weights(r) + _work_space(r) for r in group)
    parameters = 0
    for r in group:
        parameters += 2 * r.num_latents * r.d_in + r.num_latents + r.d_in
        if r.pretrained is not None:
            memory += _FLOAT * _weights(r)
            continue
        memory += 4 * _FLOAT * _weights(r)
        flops += r.experiment.training.steps * step_flops(r)
    return Cost(flops, memory, parameters)


def _weights(resolved: Resolved) -> int:
    """Count the trained weights; an archetypal decoder also has the weights of its mixtures."""
    training, rows = resolved.experiment.training, resolved.num_latents
    weights = 2 * rows * resolved.d_in
    if training.decoder == "archetypal":
        weights += rows * (training.archetypes or rows)
    return weights


def step_flops(resolved: Resolved) -> float:
    """Estimate the floating-point operations of one training step."""
    e, rows, columns = resolved.experiment, resolved.num_latents, resolved.d_in
    product = 2.0 * rows * columns * e.training.batch_size
    flops = e.architecture.dense_products * product + 12.0 * _weights(resolved)
    if e.training.optimizer == "muon":
        short, long = min(rows, columns), max(rows, columns)
        matrices = 1 if e.training.decoder == "archetypal" else 2
        flops += matrices * STEPS * 2.0 * (2 * short**2 * long + short**3)
    if e.training.decoder == "archetypal":  # the rows, and their gradient
        flops += 2 * 2.0 * rows * (e.training.archetypes or rows) * columns
    return flops


def _work_space(resolved: Resolved) -> float:
    """Estimate a step's bytes apart from weights and gradients: dense products need all latents."""
    e = resolved.experiment
    latents = (e.architecture.dense_products - 1) * resolved.num_latents
    return _FLOAT * e.training.batch_size * (latents + 6 * resolved.d_in)


@cache
def product_speed(device: torch.device) -> float:
    """Measure briefly the floating-point operations per second of a float32 product."""
    size = 2_048 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


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
            f"{_where(self.members)}: {_tokens(self.members)}, {format_bytes(self.cost.memory)}"
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
        ranks = process_count(runtime)
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
        parts = [[members[i] for i in part] for part in divide_runs(members, self.ranks)]
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
            f"{self.machine.described} about {format_duration(seconds)}, at most "
            f"{format_bytes(max(group.needs(self.machine) for group in self.groups))} of memory"
            f"{' in each' if self.machine.ranks > 1 else ''}, weights of "
            f"{format_bytes(sum(c.stored for c in costs))}"
        )
        for number, group in enumerate(self.groups, 1):
            say(f"  {number:>{len(str(len(costs)))}}  {self._line(group)}")
        if self.calibrations:
            cells = counted(self.calibrations, "penalty weight")
            say(f"  before that, {cells} found by calibration runs (2 to 9 for each)")

    def _line(self, group: Group) -> str:
        crowded, needs = "", group.needs(self.machine)
        if needs > self.machine.memory:
            crowded = f" (more than the {format_bytes(self.machine.memory)} available)"
        return (
            f"{counted(len(group.members), 'SAE')} ({_kinds(group.members)}) on "
            f"{_where(group.members)}: {_tokens(group.members)}, about "
            f"{format_duration(self.machine.seconds(group.cost))}, {format_bytes(needs)}{crowded}"
        )


def make_plan(experiments: Sequence[Resolved], machine: Machine) -> Plan:
    """Group the distinct experiments, in the order given."""
    groups = [
        Group.of(part)
        for members in group_by_stream(experiments)
        for part in split_to_fit(members, machine.memory, machine.needs)
    ]
    cells = {r.without_seeds().signature for r in experiments if r.needs_calibration}
    return Plan(machine, tuple(groups), len(cells))


def group_by_stream(experiments: Sequence[Resolved]) -> list[list[Resolved]]:
    """Return the distinct experiments grouped by the stream they read, in the order given."""
    streams: dict[str, dict[str, Resolved]] = {}
    for resolved in experiments:
        streams.setdefault(resolved.stream, {}).setdefault(resolved.signature, resolved)
    return [list(members.values()) for members in streams.values()]


def divide_runs(members: Sequence[Resolved], ranks: int) -> list[list[int]]:
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


def split_to_fit(
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


def print_start(group: Group, machine: Machine, number: int = 1, of: int = 1) -> None:
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
        f"  on {machine.described}, about {format_duration(machine.seconds(group.cost))} and "
        f"{format_bytes(group.needs(machine))}{' in each' if machine.ranks > 1 else ''}"
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


def format_duration(seconds: float) -> str:
    """Format a duration: ``40 s``, ``12 min``, ``3.1 h``, ``5.0 days``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3_600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


def format_bytes(count: float) -> str:
    """Format a number of bytes: ``80 KiB``, ``35 MiB``, ``0.3 GiB``, ``48.0 GiB``, ``1.2 TiB``."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    if count < 100 * 2**20:
        return f"{count / 2**20:.0f} MiB"
    if count < 2**40:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**40:.1f} TiB"
