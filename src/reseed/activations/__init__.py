"""Activations to train and measure on: language models reading text, and synthetic worlds."""

from __future__ import annotations

from reseed.config import DATASETS, load_plugins


def load_all() -> None:
    """Import every kind of model and data set, so that records can name them."""
    load_plugins(DATASETS, __name__)
