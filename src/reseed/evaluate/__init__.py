"""Evaluations of single SAEs."""

from __future__ import annotations

from reseed.config import EVALUATIONS, load_plugins


def load_all() -> None:
    """Import every evaluation, so that a record's stable name can be looked up."""
    load_plugins(EVALUATIONS, __name__)
