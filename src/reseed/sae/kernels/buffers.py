"""Reuse of an earlier step's memory for large results.

Fresh memory costs a page fault for every 4 KiB, which the gradients of a large SAE would pay in
every step. A buffer is reused once no tensor uses it any more.
"""

from __future__ import annotations

import math
import os
import sys
from threading import Lock

import numpy as np
import torch
from torch import Tensor

LEAST_BYTES = 2**20
"""Minimum size of a buffer. Smaller tensors are left to malloc, which reuses their memory."""
MOST_IDLE_BYTES = 2**30
"""Maximum size of all idle buffers together; those beyond it are freed."""

_lock = Lock()
_buffers: list[np.ndarray] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised tensor, in an idle buffer of the same size if there is one."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        for place in range(len(_buffers)):  # a loop variable for the buffer would add a reference
            if _buffers[place].nbytes == size and _idle(place):
                _buffers.append(_buffers.pop(place))
                break
        else:
            _give_back()
            _buffers.append(np.empty(size, dtype=np.uint8))
        return torch.from_numpy(_buffers[-1]).view(dtype).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialised, contiguous tensor of the same shape and dtype."""
    return empty(tuple(tensor.shape), tensor.dtype)


def _idle(place: int) -> bool:
    """Return True if no tensor uses this buffer; a tensor that does adds a reference to it."""
    return sys.getrefcount(_buffers[place]) <= _ALONE


def _give_back() -> None:
    """Free idle buffers beyond `MOST_IDLE_BYTES`, the least recently used first."""
    idle = sum(_buffers[place].nbytes for place in range(len(_buffers)) if _idle(place))
    place = 0
    while idle > MOST_IDLE_BYTES and place < len(_buffers):
        if _idle(place):
            idle -= _buffers.pop(place).nbytes
        else:
            place += 1


def _forget() -> None:
    global _lock
    _lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _count_alone() -> int:
    """Return `sys.getrefcount` of an array that only the list holds (Python versions differ)."""
    _buffers.append(np.empty(1))
    count = sys.getrefcount(_buffers[0])
    _buffers.clear()
    return count


_ALONE = _count_alone()
