"""Where tensors live."""

from __future__ import annotations

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
