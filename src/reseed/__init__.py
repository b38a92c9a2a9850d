"""Training and comparison of sparse autoencoders over random seeds."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported on first use, so that `import reseed` and the command line start quickly.
_LAZY = {
    "load_sae": "reseed.sae.formats",
    "load_run": "reseed.store.runs",
    "match": "reseed.compare.matching",
}

__all__ = ["__version__", "load_run", "load_sae", "match"]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'reseed' has no attribute '{name}'")
