"""Where tensors live."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

import torch

from reseed.config import ConfigError


def pick_device(name: str) -> torch.device:
    """The device that ``runtime.device`` means; ``auto`` is the GPU where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    key = "runtime.device"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{{key}} must be auto, cpu, cuda or cuda:N; got {name}", key)
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(f"{{key}}: there are {there} CUDA devices here; got {name}", key)
    return device


def cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, of a device or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if getattr(error, "out_of_memory", False):  # of another process of the team
        return True
    # The CPU's allocator has no exception of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory(device: torch.device) -> int:
    """Bytes that are free on ``device`` now: of the host, within what its control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_host_memory()]
    for folder, limit, used, reclaimable in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # no such group, or one without a limit ("max")
            cached = _entry(folder / "memory.stat", reclaimable)
            left.append(
                int((folder / limit).read_text()) - int((folder / used).read_text()) + cached
            )
    return max(0, min(left))


_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Where Linux says what a container may use: version 2, and version 1."""


def _host_memory() -> int:
    with suppress(OSError, ValueError):
        return _entry(Path("/proc/meminfo"), "MemAvailable:") * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all there is, elsewhere


def _entry(path: Path, name: str) -> int:
    """The number beside ``name``. Raises `ValueError` where there is none."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1])
    raise ValueError(f"{path} has no {name}")
