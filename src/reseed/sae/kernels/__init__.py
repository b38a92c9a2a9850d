"""Compiled loops (numba) for what a training step of an SAE does on the CPU.

    threads   ranges of rows, or blocks of them, on as many threads as torch may use
    buffers   large results in memory that an earlier step had
    lanes     comparisons of whole registers
    choice    the k largest of a row; the k largest through a rough product, exact
    screening the encoder's product in blocks, each chosen from while it is in the cache
    pairs     sums over (token, latent) pairs: decoder, error, gradients
    moments   sums over a batch
    collect   pre-activations above a floor; from tensors to tensors: active
    jump      what JumpReLU and gates make of pairs
    rectify   ReLU and its derivative, with their sums; from tensors to tensors: relu_blocks
    update    clipping, projection, Adam and renormalisation, a row at a time

Each has a plain PyTorch path beside it, which is taken on other devices and dtypes and where the
kernels are switched off: by the environment (``RESEED_KERNELS=0``), by `switched`, or because there
is no numba. Both compute the same, up to the order of their sums.

Every sum is taken by one thread in an order that the shapes alone decide: results repeat bit for
bit, whatever the number of threads. Numba is imported when a kernel is first wanted, not before.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

VARIABLE = "RESEED_KERNELS"

_switch: bool | None = None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def enabled() -> bool:
    """Whether kernels are used at all."""
    if _switch is not None:
        return _switch
    return os.environ.get(VARIABLE, "1") != "0" and _installed()


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Within it kernels are used, or not, whatever the environment says."""
    global _switch
    before, _switch = _switch, on
    try:
        yield
    finally:
        _switch = before


def serve(*tensors: Tensor) -> bool:
    """Whether these are what the kernels are made for: float32 on the CPU, and meant to stay so."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return enabled() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
