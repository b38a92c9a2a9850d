"""A run of a group that is not trained: its SAE was there already."""

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
"""training.csv of what has no training."""


@final
class ImportedMember:
    """What `reseed.train.fit` measures and records, in the place of a `Member`.

    Args:
        id: the run's folder name.
        hookpoint: which activations it reads.
        found: the SAE.
        device: where it is measured.
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
        except ReseedError as error:  # of this run alone
            self.error = error
            say(f"failed: {id}: {error}")

    def result(self) -> SAE:
        """The SAE as it is measured and stored."""
        return self.sae

    def check_weights(self) -> None:
        """Nothing to do: what is not finite is not read."""

    def write_curve(self, folder: Path) -> None:
        """An empty training.csv."""
        atomic_write_text(folder / "training.csv", CURVE)
