"""What a group will cost, from shapes, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from reseed.console import say
from reseed.train.muon import STEPS

if TYPE_CHECKING:
    from reseed.activations.source import ActivationSource
    from reseed.experiment import Resolved

_STEP_EFFICIENCY = 0.25
"""Share of the speed of a plain product that model and training step reach (small products, sparse
parts, optimiser). A rough figure: what is announced can be off by a factor of two."""


def announce(group: Sequence[Resolved], source: ActivationSource, device: torch.device) -> None:
    """Say what will be trained, and about how long and how much memory it takes."""
    flops, memory, parameters = cost(group, source)
    seconds = flops / (_STEP_EFFICIENCY * product_speed(device))
    budgets = sorted({r.tokens for r in group})
    tokens = " to ".join(f"{budget:,}" for budget in dict.fromkeys((budgets[0], budgets[-1])))
    recipes = ", ".join(sorted({r.experiment.training.recipe for r in group}))
    kinds = ", ".join(sorted({_kind(r) for r in group}))
    hooks = ", ".join(sorted({str(r.experiment.hook) for r in group}))
    plural = "s" if len(group) > 1 else ""
    say(
        f"training {len(group)} SAE{plural} ({kinds}) on {group[0].model_label} {hooks}, "
        f"{group[0].data.described}\n"
        f"  recipe {recipes}: {tokens} tokens each, {parameters:,} parameters in all\n"
        f"  on {device.type}, about {_duration(seconds)} and {memory / 2**30:.1f} GiB"
    )


def _kind(resolved: Resolved) -> str:
    sae = resolved.experiment.sae
    return f"{sae.name} {resolved.num_latents:,} {sae.sparsity}"


def cost(group: Sequence[Resolved], source: ActivationSource) -> tuple[float, float, int]:
    """Floating-point operations, bytes and SAE parameters of a group.

    Counted are the products: those of the source, and those of each SAE's step (with what Muon or
    an archetypal decoder adds); then 12 operations per weight for Adam. Bytes: weights, gradients
    and two moments in float32, the source's weights, a chunk with its permuted copy, a batch's work
    space.
    """
    first = group[0].experiment
    tokens = max(r.experiment.training.steps for r in group) * first.training.batch_size
    flops = source.flops_per_token([r.experiment.hook for r in group]) * tokens
    memory = 4.0 * source.parameters
    parameters = 0
    for r in group:
        size = 2 * r.num_latents * r.d_in
        parameters += size + r.num_latents + r.d_in
        steps = r.experiment.training.steps
        product = 2.0 * r.num_latents * r.d_in * first.training.batch_size
        flops += steps * (r.experiment.sae.dense_products * product + 12.0 * size)
        memory += 16.0 * size
        more_flops, more_weights = _beside_the_sae(r)
        flops += steps * more_flops
        memory += 16.0 * more_weights
    widths = {r.experiment.hook: r.d_in for r in group}
    memory += 2 * 4.0 * first.dataset.chunk_tokens * sum(widths.values())
    memory += 8.0 * first.training.batch_size * max(r.d_in for r in group)
    return flops, memory, parameters


def _beside_the_sae(resolved: Resolved) -> tuple[float, int]:
    """Operations per step and weights that Muon and an archetypal decoder add."""
    training, rows, columns = resolved.experiment.training, resolved.num_latents, resolved.d_in
    flops, weights = 0.0, 0
    if training.optimizer == "muon":
        short, long = min(rows, columns), max(rows, columns)
        matrices = 1 if training.decoder == "archetypal" else 2
        flops += matrices * STEPS * 2.0 * (2 * short**2 * long + short**3)
    if training.decoder == "archetypal":
        weights = rows * (training.archetypes or rows)
        flops += 2 * 2.0 * weights * columns + 12.0 * weights  # the rows, their gradient, Adam
    return flops, weights


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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
