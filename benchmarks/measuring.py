"""Time and memory of one training step of each contender, measured in a separate process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import ARCHITECTURES
from contenders.base import BATCH, scaled

POOL = 4
"""Batches of activations, used in turn."""
WARM_UP = 2
"""Untimed rounds before the first timed one."""
ACTIVE = 0.03
"""Fraction of active latents at which JumpReLU is measured after training."""


def activations(architecture: str, d_in: int, count: int) -> list[Any]:
    """Make batches with structure: sparse sums of 4·D planted directions, plus noise."""
    import torch

    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(4 * d_in, d_in, generator=generator)
    truth /= truth.norm(dim=1, keepdim=True)
    batches = []
    for _ in range(count):
        active = torch.rand(BATCH, len(truth), generator=generator) < 16 / len(truth)
        size = torch.rand(BATCH, len(truth), generator=generator) + 0.5
        noise = torch.randn(BATCH, d_in, generator=generator)
        batches.append((active * size) @ truth + 0.05 * noise)
    return scaled(architecture, batches)


def measure_time(
    architecture: str, size: tuple[int, int], names: list[str], rounds: int, trained: int
) -> dict[str, Any]:
    """Measure seconds of wall and of CPU time per step of every contender, taking turns.

    Args:
        trained: steps that reseed makes first; all contenders get the resulting weights.
    """
    contenders = {name: ARCHITECTURES[architecture][name](architecture, *size) for name in names}
    batches = activations(architecture, size[0], POOL)
    if trained:
        train_first(contenders, batches, trained)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP, rounds):
        for name, contender in contenders.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            contender.step(batches[turn % POOL])
            if turn >= 0:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - started_cpu)
    median: Callable[[list[float]], float] = statistics.median
    active = contenders["reseed"].module(batches[0][:512]).latents > 0
    return {
        "active": float(active.double().mean()),
        "wall": {name: median(values) for name, values in wall.items()},
        "cpu": {name: median(values) for name, values in cpu.items()},
    }


def train_first(contenders: dict[str, Any], batches: list[Any], steps: int) -> None:
    """Give all contenders the weights of reseed after some steps at a high learning rate.

    JumpReLU's thresholds, which move slowly, are set such that `ACTIVE` of the latents are active.
    """
    import torch
    from contenders.base import LEARNING_RATE

    ours = contenders["reseed"]
    ours.optimizer.set_lr(10 * LEARNING_RATE)
    for step in range(steps):
        ours.step(batches[step % POOL])
    ours.optimizer.set_lr(LEARNING_RATE)
    sae = ours.module
    with torch.no_grad():
        if hasattr(sae, "log_threshold"):
            pre = batches[0][:512] @ sae.W_enc.T + sae.b_enc
            sae.log_threshold.fill_(float(pre.flatten()[:4_000_000].quantile(1 - ACTIVE).log()))
        weights = {name: p.detach().clone() for name, p in sae.named_parameters()}
        for name, contender in contenders.items():
            if name != "reseed":
                contender.start(batches[0]) if hasattr(contender, "start") else None
                contender.copy_from(weights)


def measure_memory(architecture: str, size: tuple[int, int], name: str) -> int:
    """Measure the peak bytes of a step beyond the parameters and Adam's moments."""
    batch = activations(architecture, size[0], 1)[0]
    contender = ARCHITECTURES[architecture][name](architecture, *size)
    # A step of a tiny SAE loads lazily loaded libraries, so that they are not counted.
    small = ARCHITECTURES[architecture][name](architecture, 8, 64)
    small.step(batch[:, :8].contiguous())
    _return_free_memory()
    before = _resident()
    _reset_peak()
    for _ in range(3):
        contender.step(batch)
    parameters = sum(parameter.numel() for parameter in contender.module.parameters())
    return _peak() - before - 2 * 4 * parameters  # the parameters are in `before`


def _return_free_memory() -> None:
    """Return freed memory to the system, because a step could reuse it without being counted."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _resident() -> int:
    return _status("VmRSS") if sys.platform == "linux" else 0


def _reset_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
