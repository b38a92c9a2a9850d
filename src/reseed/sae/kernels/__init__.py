"""Compiled loops (numba) for a training step of an SAE on the CPU.

    threads   ranges or blocks of rows, on as many threads as torch may use
    buffers   reuse of an earlier step's memory for large results
    lanes     vectorised comparisons (SIMD)
    choice    the k largest of a row
    screening exact top k through a rough product, on each block while it is in the cache
    pairs     sums over (token, latent) pairs: decoder, error, gradients
    moments   sums over a batch
    collect   pre-activations above a floor; its interface for tensors: active
    jump      JumpReLU and gates on pairs
    rectify   ReLU and its derivative, with their sums; its interface for tensors: relu_blocks
    update    clipping, projection, Adam and renormalisation, row by row

Each has a plain PyTorch equivalent, which runs on other devices and dtypes and when the kernels are
off: by the environment (``RESEED_KERNELS=0``), by `override_enabled`, or because numba is not installed.
Both give the same result up to the order of their sums.

One thread takes each sum, in an order that only the shapes decide: results repeat bit for bit for
any number of threads. Numba is imported when a kernel is first used.
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
    """Return True if kernels are in use."""
    if _switch is not None:
        return _switch
    return os.environ.get(VARIABLE, "1") != "0" and _installed()


@contextmanager
def override_enabled(on: bool) -> Iterator[None]:
    """Turn kernels on or off inside the context, overriding the environment."""
    global _switch
    before, _switch = _switch, on
    try:
        yield
    finally:
        _switch = before


def supports(*tensors: Tensor) -> bool:
    """Return True if kernels are on and support these: float32 on the CPU, without autocast."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return enabled() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
