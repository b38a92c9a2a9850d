"""The Lightning module: many SAEs, one stream."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn

from reseed.train.data import Block
from reseed.train.member import Member


class GroupModule(L.LightningModule):
    """Trains every member on each batch, each by its own optimiser, a block of batches at a time.

    Members do not see each other: no sum and no random draw is shared between them, so that a
    member's numbers are those of the run trained alone.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.members = list(members)
        self.saes = nn.ModuleList(member.sae for member in members)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [member.optimizer for member in self.members]

    def training_step(self, batch: Block, batch_idx: int) -> Tensor | None:
        first, block = batch
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for member, optimizer in zip(self.members, optimizers, strict=True):
            for step, activations in enumerate(block, first):
                # A member may be ahead of the stream, as it was saved later than another.
                if member.active and member.step == step:
                    member.train(activations[member.hookpoint], optimizer)
        return None

    @property
    def working(self) -> bool:
        """Whether any member still has steps to make."""
        return any(member.active for member in self.members)
