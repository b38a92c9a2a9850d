"""Gathering of the contexts of one SAE's latents from blocks of held-out text."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.evaluate.contexts.firings import Firings
from reseed.evaluate.contexts.kept import Kept, by_activation, by_lot
from reseed.sae.base import SAE


class Gathering:
    """Contexts and firing counts of an SAE's latents over the blocks added so far.

    Args:
        sae: SAE for raw activations.
        top, reservoir: contexts stored for each latent: sequences where it fires most, and firings
            drawn uniformly.
        reach: tokens of a context on either side.
        seed: seed of the draw.

    Attributes:
        firing: number of tokens that each latent fired on.
        total: sum of its activations on them.
    """

    def __init__(self, sae: SAE, top: int, reservoir: int, reach: int, seed: int) -> None:
        device = sae.W_dec.device
        self.sae, self.seed = sae, seed
        self.top = Kept(sae.num_latents, top, reach, device)
        self.drawn = Kept(sae.num_latents, reservoir, reach, device)
        self.firing: Int[Tensor, " F"] = torch.zeros(
            sae.num_latents, dtype=torch.int64, device=device
        )
        self.total: Float[Tensor, " F"] = torch.zeros(
            sae.num_latents, dtype=torch.float64, device=device
        )

    def add(
        self,
        x: Float[Tensor, "sequences context d_in"],
        kept: Bool[Tensor, "sequences context"],
        first: int,
    ) -> None:
        """Add whole sequences; see `Firings.of` for the arguments."""
        self.count(Firings.of(self.sae, x, kept, first))

    def count(self, firings: Firings) -> None:
        """Add the firings of a block; blocks may come in any order."""
        latent, size = firings.latent, len(self.firing)
        self.firing += torch.bincount(latent, minlength=size)
        self.total += torch.bincount(latent, firings.value.double(), minlength=size)
        rank = by_activation(firings)
        chosen = self.top.reaching(rank, latent)
        chosen = chosen[_highest_of_runs(rank[chosen], latent[chosen], firings.sequence[chosen])]
        self.top.offer(firings, chosen, rank[chosen])
        rank = by_lot(firings, self.seed)
        chosen = self.drawn.reaching(rank, latent)
        self.drawn.offer(firings, chosen, rank[chosen])


def _highest_of_runs(
    rank: Int[Tensor, " n"], latent: Int[Tensor, " n"], sequence: Int[Tensor, " n"]
) -> Int[Tensor, " some"]:
    """Return each latent's highest firing per sequence: a sequence gives one top context."""
    if not len(rank):
        return rank
    _, run = ((latent << 32) + sequence).unique_consecutive(return_inverse=True)
    best = rank.new_zeros(int(run[-1]) + 1).scatter_reduce(0, run, rank, "amax")
    return (rank == best[run]).nonzero()[:, 0]
