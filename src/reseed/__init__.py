"""Training and comparison of sparse autoencoders over random seeds."""

# pyright: reportUnsupportedDunderAll=false
from importlib import import_module
from typing import Any

from reseed.errors import ConfigError, ReseedError

__version__ = "0.1.0"

# Imported on first use, so that `import reseed` and the command line start quickly.
_LAZY = {
    "compose": "reseed.api",
    "load_run": "reseed.store.find",
    "load_sae": "reseed.sae.formats",
    "load_sweep": "reseed.api",
    "match": "reseed.compare.matching",
    "read_activations": "reseed.api",
}

__all__ = [
    "ConfigError",
    "ReseedError",
    "__version__",
    "compose",
    "load_run",
    "load_sae",
    "load_sweep",
    "match",
    "read_activations",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'reseed' has no attribute '{name}'")
