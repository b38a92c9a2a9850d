"""Evaluations of single SAEs."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every evaluation, so that those that records name by their stable names are known."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
