"""The Lightning module that trains many SAEs on one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reseed.activations.stream import STRIPES, ChunkStream
from reseed.ranks import ALONE, Ranks
from reseed.train.data import Block
from reseed.train.member import Member


class GroupModule(L.LightningModule):
    """A module that trains every run of a group on each block of activations.

    Each run has its own optimiser and batch size. Runs share no sum and no random draw, so a run's
    results equal those of the run trained alone. If one fails, the others continue.

    Args:
        ranks: the processes that share each batch and make each step together.

    Attributes:
        after_step: called with a run after each of its steps; may set its `error`.
        stopping: whether to leave the block unfinished after the current step.
        wish: whether this rank wants to stop; ranks that share each batch stop together.
    """

    def __init__(
        self, members: Sequence[Member], stream: ChunkStream, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.members = list(members)
        self.saes = nn.ModuleList(member.sae for member in members)
        self.stream = stream
        self.after_step: Callable[[Member], None] = lambda member: None
        self.ranks = ranks
        self.stopping = self.wish = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [member.optimizer for member in self.members]

    def training_step(self, batch: Block, batch_idx: int) -> Tensor | None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for member, optimizer in zip(self.members, optimizers, strict=True):
            for x in self._batches(member, batch):
                with member.failing_alone():
                    member.train(x, optimizer)
                    self.after_step(member)
                if self.ranks.several:
                    self.stopping = bool(self.ranks.largest_(torch.tensor(int(self.wish))))
                if self.stopping:
                    return None
        return None

    def _batches(self, member: Member, block: Block) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Yield the batches of a block that a run still needs. A run may be ahead of the stream if
        its checkpoint is newer than another run's."""
        size = member.training.batch_size
        part = size // STRIPES
        first = self.stream.steps_before(block.chunk, size) + block.start // part
        x = block.activations[member.hookpoint]
        for number in range((block.stop - block.start) // part):
            if member.active and member.step == first + number:
                yield x[:, number * part : (number + 1) * part].flatten(0, 1)

    @property
    def working(self) -> bool:
        """True while any run still has steps to make."""
        return any(member.active for member in self.members)
