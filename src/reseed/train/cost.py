"""Estimates, from shapes alone, of what training a group costs: time, memory, disk space."""

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
