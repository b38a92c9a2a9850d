"""Sparse latents of many activations: only values that are not 0 are stored.

Letters: n tokens, F latents. A pair is a token and a latent that is active on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from reseed.sae.base import SAE


@dataclass(frozen=True, eq=False)
class SparseLatents:
    """Active pairs, sorted by token (CSR).

    Attributes:
        starts: index of each token's first pair; the last entry is the number of pairs.
        latent: latent of each pair; ascending within a token.
        value: activation of each pair, in float32.
        num_latents: number of latents, F.
    """

    starts: Int[Tensor, " n_plus_1"]
    latent: Int[Tensor, " pairs"]
    value: Float[Tensor, " pairs"]
    num_latents: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def token(self) -> Int[Tensor, " pairs"]:
        """The token of each pair."""
        tokens = torch.arange(len(self), device=self.starts.device)
        return tokens.repeat_interleave(self.starts.diff())

    def rows(self, chosen: Int[Tensor | np.ndarray, " m"]) -> SparseLatents:
        """Return the latents of the chosen tokens, in the given order."""
        chosen = torch.as_tensor(chosen, device=self.starts.device)
        counts = self.starts.diff()[chosen]
        starts = _ends(counts)
        shift = self.starts[chosen] - starts[:-1]
        pairs = torch.arange(int(starts[-1]), device=starts.device)
        pairs = pairs + shift.repeat_interleave(counts)
        return SparseLatents(starts, self.latent[pairs], self.value[pairs], self.num_latents)

    def columns(self, latents: Int[Tensor, " k"]) -> Float[Tensor, "n k"]:
        """Return the given latents as the columns of a dense matrix."""
        latents = latents.to(self.latent.device)
        place = torch.full((self.num_latents,), -1, device=self.latent.device)
        place[latents] = torch.arange(len(latents), device=place.device)
        column = place[self.latent]
        chosen = (column >= 0).nonzero()[:, 0]
        dense = torch.zeros(len(self), len(latents), device=self.value.device)
        dense[self.token[chosen], column[chosen]] = self.value[chosen]
        return dense

    def transposed(self) -> SparseLatents:
        """Return the transpose: rows are latents, and the columns ("latents") are tokens."""
        order = self.latent.argsort(stable=True)
        counts = torch.bincount(self.latent, minlength=self.num_latents)
        return SparseLatents(_ends(counts), self.token[order], self.value[order], len(self))

    def matmul(self, matrix: Float[Tensor, "F C"]) -> Float[Tensor, "n C"]:
        """Return the product of the latents and a matrix; only active pairs are read."""
        return functional.embedding_bag(
            self.latent, matrix, self.starts[:-1], mode="sum", per_sample_weights=self.value
        )

    def top_pairs(
        self, value: Float[Tensor, " pairs"], k: int, among: Bool[Tensor, " pairs"] | None = None
    ) -> Int[Tensor, "n k"]:
        """Return each token's k pairs of largest value, the largest first; −1 if it has fewer.

        Args:
            value: a value for every pair.
            among: mask of the pairs to choose from; by default all.
        """
        order = value.argsort(descending=True, stable=True)
        order = order if among is None else order[among[order]]
        order = order[self.token[order].argsort(stable=True)]
        token = self.token[order]
        counts = torch.bincount(token, minlength=len(self))
        rank = torch.arange(len(order), device=value.device) - (counts.cumsum(0) - counts)[token]
        kept = rank < k
        found = torch.full((len(self), k), -1, device=value.device)
        found[token[kept], rank[kept]] = order[kept]
        return found

    @cached_property
    def live(self) -> Int[Tensor, " some"]:
        """Latents that are active on some token."""
        return torch.unique(self.latent)


def gather_pairs(
    value: Shaped[Tensor, " pairs"], pairs: Int[Tensor, "n k"], otherwise: float
) -> Shaped[Tensor, "n k"]:
    """Return the value of each pair; ``otherwise`` for −1 (no pair)."""
    if not len(value):
        return torch.full(pairs.shape, otherwise, dtype=value.dtype, device=value.device)
    return torch.where(pairs >= 0, value[pairs.clamp(min=0)], otherwise)


@torch.no_grad()
def encode(sae: SAE, x: Float[Tensor, "n D"]) -> SparseLatents:
    """Encode raw activations, on the SAE's device."""
    found = sae.encode_sparse(x.to(sae.W_dec.device, sae.W_dec.dtype))
    values, token, latent = found.active()
    order = token.argsort(stable=True)  # by token, then by latent
    counts = torch.bincount(token, minlength=len(x))
    return SparseLatents(_ends(counts), latent[order], values[order].float(), sae.num_latents)


def _ends(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    return functional.pad(counts.cumsum(0), (1, 0))
