"""Activations to train and measure on: language models reading text, and synthetic worlds."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every kind of model and data set, so that records can name them."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
