"""Sparse autoencoders: tensors in, tensors out. An architecture is one file here."""

from __future__ import annotations

from reseed.config import SAES, load_plugins


def load_all() -> None:
    """Import every architecture, so that records that name one by its stable name can be read."""
    load_plugins(SAES, __name__, subpackages=False)
