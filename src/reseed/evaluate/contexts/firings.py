"""Firings of latents in a block of sequences, sorted for gathering contexts.

n firings, m chosen firings, W = 2·reach + 1 tokens of a window
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.sae.base import SAE


@dataclass(frozen=True, eq=False)
class Firings:
    """(latent, token) pairs, sorted by latent, then by token.

    Attributes:
        latent: the latent that fires.
        place: index of the token in the block, counting first and special tokens.
        value: activation, above 0, in float32.
        first: position of the block's first token in the whole text.
        context: tokens per sequence; a block is whole sequences.
    """

    latent: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    first: int
    context: int

    @classmethod
    def of(
        cls,
        sae: SAE,
        x: Float[Tensor, "sequences context d_in"],
        kept: Bool[Tensor, "sequences context"],
        first: int,
    ) -> Firings:
        """Encode the activations at the kept tokens.

        Args:
            kept: the tokens that the SAE is trained on.
            first: position of the block's first token.
        """
        places = kept.flatten().nonzero()[:, 0].to(sae.W_dec.device)
        rows = x[kept.to(x.device)].to(sae.W_dec.device, sae.W_dec.dtype)
        value, token, latent = sae.encode_sparse(rows).active()
        return cls(latent.long(), places[token], value.float(), first, x.shape[1])

    @property
    def position(self) -> Int[Tensor, " n"]:
        """Position of each token in the whole text."""
        return self.place + self.first

    @property
    def sequence(self) -> Int[Tensor, " n"]:
        """Index in the block of each token's sequence."""
        return self.place // self.context

    def windows(self, chosen: Int[Tensor, " m"], reach: int) -> Float[Tensor, "m W"]:
        """Return the latents' activations around some firings; 0 beyond their sequences.

        Args:
            reach: tokens on either side.
        """
        latent, place = self.latent[chosen], self.place[chosen]
        begin = self.sequence[chosen] * self.context
        low = torch.maximum(place - reach, begin)
        high = torch.minimum(place + reach, begin + self.context - 1)
        start = torch.searchsorted(self._order, self._key(latent, low))
        count = torch.searchsorted(self._order, self._key(latent, high), right=True) - start
        row = torch.arange(len(chosen), device=count.device).repeat_interleave(count)
        within = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count)[row]
        found = start[row] + within
        out = self.value.new_zeros(len(chosen), 2 * reach + 1)
        out[row, self.place[found] - place[row] + reach] = self.value[found]
        return out

    @cached_property
    def _order(self) -> Int[Tensor, " n"]:
        return self._key(self.latent, self.place)

    def _key(self, latent: Int[Tensor, " m"], place: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Return sort keys that ascend by latent, then by token."""
        return (latent << 32) + place
