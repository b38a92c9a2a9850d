"""A run of a group whose SAE was trained elsewhere and is only measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, final

import torch

from reseed.activations.hookpoint import Hookpoint
from reseed.atomic import atomic_write_text
from reseed.config import ReseedError
from reseed.console import say
from reseed.sae.base import SAE

if TYPE_CHECKING:
    from reseed.sae.pretrained import Pretrained

CURVE = "step,tokens,fvu,dead_fraction,lr,seconds\n"
"""The training.csv of a run without training: only its header."""


@final
class ImportedMember:
    """An imported run, with the interface of `Member` that `reseed.train.fit` needs.

    Args:
        id: the run's folder name.
        hookpoint: the hookpoint whose activations it reads.
        found: the SAE.
        device: the device on which it is measured.
    """

    scale = 1.0
    step = 0

    def __init__(
        self, id: str, hookpoint: Hookpoint, found: Pretrained, device: torch.device
    ) -> None:
        self.id, self.hookpoint = id, hookpoint
        self.error: BaseException | None = None
        try:
            self.sae: SAE = found.load().to(device)
        except ReseedError as error:  # fails this run only
            self.error = error
            say(f"failed: {id}: {error}")

    def result(self) -> SAE:
        """Return the SAE to measure and store."""
        return self.sae

    def check_weights(self) -> None:
        """Do nothing: reading the SAE already refuses values that are not finite."""

    def write_curve(self, folder: Path) -> None:
        """Write a training.csv without rows."""
        atomic_write_text(folder / "training.csv", CURVE)
