"""Sparse autoencoders: tensors in, tensors out. An architecture is one file here."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

ENTRY_POINTS = "reseed.sae"
"""Entry-point group in which other packages name the modules of their architectures."""


def load_all() -> None:
    """Import every architecture, so that records that name one by its stable name can be read."""
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
