"""The plan of a command: groups of runs that train together, and their cost.

The plan is made and printed before training starts. Runs that read the same activations form one
group, even if their hookpoints, architectures, budgets and batch sizes differ: one pass of the
source serves all of them, up to the deepest hookpoint and the largest budget. A group that would
not fit into memory is split into as few groups as possible, because each needs its own pass.

The file defines the cost of a group (time, memory and disk space, estimated from shapes alone);
groups, the machine and the plan; the division of runs; and the descriptions of groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from reseed.distributed.launcher import process_count
from reseed.errors import ReseedError
from reseed.system.console import counted, format_duration, say
from reseed.system.devices import available_memory, pick_device
from reseed.train.config import ArchetypalDecoder, Muon, RuntimeConfig
from reseed.train.optim.muon import STEPS
from reseed.train.spec import RunSpec

MEMORY_SHARE = 0.85
"""Fraction of the free memory that a group may take; the rest is a reserve for errors of the
estimate and for other processes."""
STEP_EFFICIENCY = 0.25
"""Speed of the model and of training steps relative to a large product; they are slower because of
small products, sparse operations and the optimiser. A planned time can be wrong by a factor of
two."""
_CHUNKS = 3
"""Maximum number of chunks in memory: one that a block still refers to, the next, and a prefetched
one."""
_FLOAT = 4.0  # bytes of a float32


@dataclass(frozen=True)
class Cost:
    """Cost of training a group of runs on one stream.

    Attributes:
        flops: floating-point operations of the source and of all steps.
        memory: peak memory in bytes.
        parameters: number of parameters of all SAEs together.
    """

    flops: float
    memory: float
    parameters: int

    @property
    def stored(self) -> float:
        """Bytes of the runs' weights on disk."""
        return _FLOAT * self.parameters


def cost(group: Sequence[RunSpec], beside: Sequence[RunSpec] = ()) -> Cost:
    """Estimate the cost of a group that trains in one pass of its source.

    Operations are the products of the source and of each SAE's step (with those that Muon or an
    archetypal decoder adds), and 12 operations per weight for Adam. Memory holds the source's
    weights; for each SAE its weights, two moments and the copy that is measured and stored; the
    gradients of one SAE, since they are freed before the next SAE's step; chunks; and the work
    space of a step. For an SAE that was trained elsewhere only its weights count.

    Args:
        beside: runs that other processes train, whose hookpoints this process also reads.
    """
    read = [*group, *beside]
    hooks = [r.hookpoint for r in read]
    widths = {r.hookpoint: r.d_in for r in read}
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
        flops += r.training.steps * step_flops(r)
    return Cost(flops, memory, parameters)


def _weights(spec: RunSpec) -> int:
    """Count the trained weights; an archetypal decoder also has the weights of its mixtures."""
    rows = spec.num_latents
    weights = 2 * rows * spec.d_in
    if isinstance(decoder := spec.training.decoder_options, ArchetypalDecoder):
        weights += rows * decoder.count(rows)
    return weights


def step_flops(spec: RunSpec) -> float:
    """Estimate the floating-point operations of one training step."""
    training, rows, columns = spec.training, spec.num_latents, spec.d_in
    product = 2.0 * rows * columns * training.batch_size
    flops = spec.sae.dense_products * product + 12.0 * _weights(spec)
    decoder = training.decoder_options
    if isinstance(training.optimizer_options, Muon):
        short, long = min(rows, columns), max(rows, columns)
        matrices = 1 if isinstance(decoder, ArchetypalDecoder) else 2
        flops += matrices * STEPS * 2.0 * (2 * short**2 * long + short**3)
    if isinstance(decoder, ArchetypalDecoder):  # the rows, and their gradient
        flops += 2 * 2.0 * rows * decoder.count(rows) * columns
    return flops


def _work_space(spec: RunSpec) -> float:
    """Estimate the bytes of a step besides weights and gradients; dense products hold all
    latents."""
    latents = (spec.sae.dense_products - 1) * spec.num_latents
    return _FLOAT * spec.training.batch_size * (latents + 6 * spec.d_in)


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


class OutOfMemory(ReseedError):
    """Error for a group that did not fit into memory. Checkpoints of its runs stay valid."""


@dataclass(frozen=True)
class Group:
    """Runs that train in one pass of their source."""

    runs: tuple[RunSpec, ...]
    cost: Cost

    @classmethod
    def of(cls, runs: Sequence[RunSpec]) -> Group:
        return cls(tuple(runs), cost(runs))

    @property
    def description(self) -> str:
        """Description of the group, without the time, which depends on the machine."""
        return f"{self.content}: {_tokens(self.runs)}, {format_bytes(self.cost.memory)}"

    @property
    def content(self) -> str:
        """Description of the SAEs and their source."""
        return f"{counted(len(self.runs), 'SAE')} ({_kinds(self.runs)}) on {_where(self.runs)}"

    def needs(self, machine: Machine) -> float:
        """Return the peak memory, in bytes, of the process that needs the most."""
        return machine.needs(self.runs)

    def halves(self) -> tuple[Group, Group]:
        """Split the group into two of about the same size; it needs at least two runs."""
        middle = len(self.runs) // 2
        return Group.of(self.runs[:middle]), Group.of(self.runs[middle:])


@dataclass(frozen=True)
class Machine:
    """The machine that trains.

    Attributes:
        device: the device on which SAEs train.
        memory: bytes that a group may take in each process that trains it.
        speed: floating-point operations per second of a float32 product in each process.
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
        """Return this machine, with the memory and speed of the runtime options where given."""
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
    def description(self) -> str:
        """Description of the device or the processes: ``cpu``, ``4 processes (ddp)``."""
        return self.device.type if self.ranks == 1 else f"{self.ranks} processes ({self.strategy})"

    def seconds(self, cost: Cost) -> float:
        """Estimate the duration in seconds."""
        return cost.flops / (STEP_EFFICIENCY * self.speed * self.ranks)

    def needs(self, runs: Sequence[RunSpec]) -> float:
        """Estimate the bytes that a group takes in the process that needs the most."""
        if self.strategy != "spread" or self.ranks == 1:
            return cost(runs).memory
        parts = [[runs[i] for i in part] for part in divide_runs(runs, self.ranks)]
        return max(cost(part, runs).memory for part in parts if part)


@dataclass(frozen=True)
class Plan:
    """The groups that a command will train.

    Attributes:
        groups: the groups, which are trained one after the other.
        calibrations: number of cells whose penalty weight must be found first; the plan does not
            count their calibration runs.
    """

    machine: Machine
    groups: tuple[Group, ...]
    calibrations: int = 0

    @property
    def num_runs(self) -> int:
        return sum(len(group.runs) for group in self.groups)

    def print(self, finished: int = 0) -> None:
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
            f"plan: {counted(self.num_runs, 'run')} in {counted(len(costs), 'group')}{done}, on "
            f"{self.machine.description} about {format_duration(seconds)}, at most "
            f"{format_bytes(max(group.needs(self.machine) for group in self.groups))} of memory"
            f"{' in each' if self.machine.ranks > 1 else ''}, weights of "
            f"{format_bytes(sum(c.stored for c in costs))}"
        )
        for number, group in enumerate(self.groups, 1):
            say(f"  {number:>{len(str(len(costs)))}}  {self._line(group)}")
        if self.calibrations:
            cells = counted(self.calibrations, "penalty weight")
            say(f"  before that, calibration runs find {cells} (2 to 9 runs for each)")

    def _line(self, group: Group) -> str:
        crowded, needs = "", group.needs(self.machine)
        if needs > self.machine.memory:
            crowded = f" (more than the {format_bytes(self.machine.memory)} available)"
        return (
            f"{group.content}: {_tokens(group.runs)}, about "
            f"{format_duration(self.machine.seconds(group.cost))}, {format_bytes(needs)}{crowded}"
        )


def make_plan(runs: Sequence[RunSpec], machine: Machine) -> Plan:
    """Group the distinct runs, in the order given."""
    groups = [
        Group.of(part)
        for together in group_by_stream(runs)
        for part in split_to_fit(together, machine.memory, machine.needs)
    ]
    cells = {r.waits_for for r in runs if r.waits_for is not None}
    return Plan(machine, tuple(groups), len(cells))


def group_by_stream(runs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """Return the distinct runs grouped by the stream they read, in the order given."""
    streams: dict[str, dict[str, RunSpec]] = {}
    for spec in runs:
        streams.setdefault(spec.stream, {}).setdefault(spec.signature, spec)
    return [list(distinct.values()) for distinct in streams.values()]


def divide_runs(runs: Sequence[RunSpec], ranks: int) -> list[list[int]]:
    """Divide the runs among processes, with about equal work; return their indices per process.

    Runs are assigned in order of decreasing cost, each to the process with the least work so far.
    The result is the same on every rank.
    """
    work = [step_flops(r) * r.training.steps for r in runs]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for i in sorted(range(len(runs)), key=lambda i: (-work[i], i)):
        least = min(range(ranks), key=load.__getitem__)
        parts[least].append(i)
        load[least] += work[i]
    return [sorted(part) for part in parts]


def split_to_fit(
    runs: Sequence[RunSpec],
    memory: float,
    needs: Callable[[Sequence[RunSpec]], float] = lambda runs: cost(runs).memory,
) -> list[list[RunSpec]]:
    """Split runs into few groups of at most ``memory`` bytes; a larger run gets its own group.

    They are split by depth, and within a hookpoint by size, so that each group reads few
    hookpoints: chunks take memory, and the model runs only up to the deepest hookpoint.
    """
    if len(runs) == 1 or needs(runs) <= memory:
        return [list(runs)]
    ordered = sorted(runs, key=lambda r: (r.hookpoint.layer, str(r.hookpoint), r.num_latents))
    parts: list[list[RunSpec]] = []
    for spec in ordered:
        if parts and needs([*parts[-1], spec]) <= memory:
            parts[-1].append(spec)
        else:
            parts.append([spec])
    return parts


def print_start(group: Group, machine: Machine, number: int = 1, of: int = 1) -> None:
    """Print that a group starts, without details if there are several: the plan has them."""
    if of > 1:
        say(f"group {number} of {of}: {counted(len(group.runs), 'SAE')} "
            f"on {_where(group.runs)}")  # fmt: skip
        return
    trained = [r for r in group.runs if r.pretrained is None]
    if not trained:
        say(f"measuring {group.content}")
        return
    recipes = ", ".join(sorted({r.training.recipe for r in trained}))
    say(
        f"training {group.content}\n"
        f"  recipe {recipes}: {_tokens(group.runs)}, "
        f"{group.cost.parameters:,} parameters in all\n"
        f"  on {machine.description}, about {format_duration(machine.seconds(group.cost))} and "
        f"{format_bytes(group.needs(machine))}{' in each' if machine.ranks > 1 else ''}"
    )


def _where(runs: Sequence[RunSpec]) -> str:
    hooks = ", ".join(sorted({str(r.hookpoint) for r in runs}))
    return f"{runs[0].model_label} {hooks}, {runs[0].data.description}"


def _kinds(runs: Sequence[RunSpec]) -> str:
    return ", ".join(sorted({f"{r.sae.name} {r.num_latents:,} {r.sparsity}" for r in runs}))


def _tokens(runs: Sequence[RunSpec]) -> str:
    budgets = sorted({r.tokens for r in runs if r.pretrained is None} or {0})
    told = " to ".join(f"{budget:,}" for budget in dict.fromkeys((budgets[0], budgets[-1])))
    return f"{told} tokens each"


def format_bytes(count: float) -> str:
    """Format a number of bytes: ``80 KiB``, ``35 MiB``, ``0.3 GiB``, ``48.0 GiB``, ``1.2 TiB``."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    if count < 100 * 2**20:
        return f"{count / 2**20:.0f} MiB"
    if count < 2**40:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**40:.1f} TiB"
