"""Sparse autoencoders: tensors in, tensors out. One file per architecture.

A new architecture is a new file here (a config that derives from `SAEConfig` with a ``name``, and a
class that derives from `SAE`) and a yaml in ``conf/sae``. There is no list to extend.
"""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every module of this package, so that each architecture is known by its name."""
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            importlib.import_module(f"{__name__}.{module.name}")
