"""Devices and their memory."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

import torch

from reseed.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device that ``runtime.device`` names; ``auto`` is the GPU if there is one.

    Raises:
        ConfigError: this machine has no such device.
    """
    key = "runtime.device"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or name.startswith("cpu:"):
        raise ConfigError(f"{{key}} must be auto, cpu, cuda or cuda:N; got {name}", key)
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(f"{{key}}: this machine has {there} CUDA devices; got {name}", key)
    return device


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if ``error`` reports that a device or the host ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if getattr(error, "out_of_memory", False):  # reported by another process of the team
        return True
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory() -> None:
    """Release memory that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory(device: torch.device) -> int:
    """Return the free bytes on ``device``; on the host, within the limit of the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_host_memory()]
    for folder, limit, used, reclaimable in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # no such group, or no limit ("max")
            cached = _entry(folder / "memory.stat", reclaimable)
            left.append(
                int((folder / limit).read_text(encoding="utf-8"))
                - int((folder / used).read_text(encoding="utf-8"))
                + cached
            )
    return max(0, min(left))


def total_memory(device: torch.device) -> int:
    """Return all bytes of ``device``; on the host, within the limit of the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder, limit, _, _ in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            found.append(int((folder / limit).read_text(encoding="utf-8")))
    return min(found)


_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Linux files that hold a container's memory limit and use, for cgroup versions 2 and 1."""


def _host_memory() -> int:
    with suppress(OSError, ValueError):
        return _entry(Path("/proc/meminfo"), "MemAvailable:") * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: the total memory


def _entry(path: Path, name: str) -> int:
    """Return the number after ``name`` in a file. Raises `ValueError` if there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1])
    raise ValueError(f"{path} has no {name}")
