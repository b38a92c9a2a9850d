"""Large results in memory that an earlier step had.

Fresh memory costs a page fault for every 4 KiB, which for the gradients of a large SAE takes as
long as making them. A buffer is taken again once no tensor is left that uses it.
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
"""What is smaller, malloc keeps."""
MOST_IDLE_BYTES = 2**30
"""Unused buffers beyond this are given back."""

_lock = Lock()
_buffers: list[np.ndarray] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor."""
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        for place in range(len(_buffers)):  # a name for a buffer would be a reference to it
            if _buffers[place].nbytes == size and _idle(place):
                _buffers.append(_buffers.pop(place))
                break
        else:
            _give_back()
            _buffers.append(np.empty(size, dtype=np.uint8))
        return torch.from_numpy(_buffers[-1]).view(dtype).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of this shape and dtype, contiguous."""
    return empty(tuple(tensor.shape), tensor.dtype)


def _idle(place: int) -> bool:
    """Whether no tensor holds this buffer: a tensor's storage keeps a reference to the array."""
    return sys.getrefcount(_buffers[place]) <= _ALONE


def _give_back() -> None:
    """The longest unused first."""
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
    """What `sys.getrefcount` says of an array that only the list holds (versions differ)."""
    _buffers.append(np.empty(1))
    count = sys.getrefcount(_buffers[0])
    _buffers.clear()
    return count


_ALONE = _count_alone()
