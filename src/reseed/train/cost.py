"""What training a group costs, from shapes alone: time, memory, room on the disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from reseed.train.muon import STEPS

if TYPE_CHECKING:
    from reseed.experiment import Resolved

STEP_EFFICIENCY = 0.25
"""Share of the speed of a plain product that model and training step reach (small products, sparse
parts, optimiser). A rough figure: an announced time can be off by a factor of two."""
_CHUNKS = 3
"""That are in memory at the most: one that a block still refers to, the next, and one ahead."""
_FLOAT = 4.0  # bytes of a float32


@dataclass(frozen=True)
class Cost:
    """Of a group of runs on one stream.

    Attributes:
        flops: floating-point operations, the source's and those of all steps.
        memory: bytes at the same time, at the most.
        parameters: of all SAEs together.
    """

    flops: float
    memory: float
    parameters: int

    @property
    def stored(self) -> float:
        """Bytes that the runs' weights take on the disk."""
        return _FLOAT * self.parameters


def cost(group: Sequence[Resolved], beside: Sequence[Resolved] = ()) -> Cost:
    """What a group takes that trains in one pass of its source.

    Args:
        beside: further runs whose hookpoints are read too, as other processes train them.

    Counted are the products: those of the source, and those of each SAE's step (with what Muon or
    an archetypal decoder adds); then 12 operations per weight for Adam. Bytes: the source's
    weights; of each SAE weights, two moments and the copy that is measured and stored; gradients of
    one of them, as they are freed before the next one's turn; chunks; the work space of a step.
    Of what was trained elsewhere, the weights alone.
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
    """Trained weights; an archetypal decoder is made of others than its rows."""
    training, rows = resolved.experiment.training, resolved.num_latents
    weights = 2 * rows * resolved.d_in
    if training.decoder == "archetypal":
        weights += rows * (training.archetypes or rows)
    return weights


def step_flops(resolved: Resolved) -> float:
    """Floating-point operations of one training step, about."""
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
    """Bytes of a step beside weights and gradients: latents in full where products are dense."""
    e = resolved.experiment
    latents = (e.architecture.dense_products - 1) * resolved.num_latents
    return _FLOAT * e.training.batch_size * (latents + 6 * resolved.d_in)


@cache
def product_speed(device: torch.device) -> float:
    """Floating-point operations per second of a float32 product here, measured in a blink."""
    size = 2_048 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
