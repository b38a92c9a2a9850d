"""Evaluations of single SAEs."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every evaluation, so that a record's stable name can be looked up."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
