"""Sparse latents of a batch of tokens, from which the measures on activations are computed.

Letters: B tokens of a batch, F latents, P active latents in the batch (token by token), D `d_in`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from reseed.sae.base import SAE

_DENSE_ENTRIES = 1 << 24
"""Maximum number of entries of the dense [tokens, F] that is encoded at once (64 MB in float32)."""
_ROW_ENTRIES = 1 << 20
"""Maximum number of entries of decoder rows gathered at once, so that they fit the CPU's cache."""


@dataclass(frozen=True, eq=False)
class BatchCodes:
    """The active latents of B tokens: latent ``latent[p]`` is ``value[p]`` at token ``token[p]``.

    Entries are sorted by token, then by latent; latents that are not listed are 0.
    """

    token: Int[Tensor, " P"]
    latent: Int[Tensor, " P"]
    value: Float[Tensor, " P"]
    tokens: int
    num_latents: int

    def sum_by_latent(self, weights: Float[Tensor, " P"]) -> Float[Tensor, " F"]:
        """Return for each latent the sum, in float64, of the weights of its active entries."""
        return torch.bincount(self.latent, weights.double(), minlength=self.num_latents)

    def values_at(self, token: Int[Tensor, " n"], latent: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return the value of ``latent[i]`` at ``token[i]`` for each i; 0 if it is not active."""
        wanted = token * self.num_latents + latent
        if not len(self._keys):
            return self.value.new_zeros(len(wanted))
        place = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        return torch.where(self._keys[place] == wanted, self.value[place], 0.0)

    @cached_property
    def _keys(self) -> Int[Tensor, " P"]:
        return self.token * self.num_latents + self.latent

    def gram(self) -> Float[Tensor, "B B"]:
        """Return the scalar products of tokens' latents, in float64, without an F × F matrix."""
        value, token, latent = (x.cpu().numpy() for x in (self.value, self.token, self.latent))
        shape = (self.tokens, self.num_latents)
        rows = csr_array((value.astype(np.float64), (token, latent)), shape=shape)
        return torch.from_numpy((rows @ rows.T).toarray()).to(self.value.device)


class EncodedBatch(NamedTuple):
    """The latents and the reconstruction of a batch."""

    codes: BatchCodes
    reconstruction: Float[Tensor, "B D"]


@torch.inference_mode()
def encode_batch(sae: SAE, x: Float[Tensor, "B D"]) -> EncodedBatch:
    """Return the latents and the reconstruction of ``x``.

    Encodes in blocks of tokens, to avoid a dense [B, F] where F is large.
    """
    rows = max(1, _DENSE_ENTRIES // sae.num_latents)
    parts, made = [], []
    for start, block in zip(range(0, len(x), rows), x.split(rows), strict=True):
        output = sae(block)
        token, latent = output.latents.nonzero(as_tuple=True)
        parts.append((token + start, latent, output.latents[token, latent]))
        made.append(output.reconstruction)
    token, latent, value = (torch.cat(column) for column in zip(*parts, strict=True))
    return EncodedBatch(BatchCodes(token, latent, value, len(x), sae.num_latents), torch.cat(made))


@torch.inference_mode()
def project_on_rows(
    targets: Sequence[Float[Tensor, "B D"]], codes: BatchCodes, W: Float[Tensor, "F D"]
) -> list[Float[Tensor, " F"]]:
    """Return for each target r and latent j Σ_t g_j(t) · (r(t) · W_j), with g_j(t) its value.

    Computes only the products of active latents: P·D operations, not B·F·D.
    """
    step = max(1, _ROW_ENTRIES // W.shape[1])
    products = [torch.empty_like(codes.value) for _ in targets]
    for start in range(0, len(codes.value), step):
        block = slice(start, start + step)
        rows, token = W[codes.latent[block]], codes.token[block]
        for target, found in zip(targets, products, strict=True):
            found[block] = (rows * target[token]).sum(1)
    return [codes.sum_by_latent(found.double() * codes.value) for found in products]


def rebatch(chunks: Iterable[Float[Tensor, "n D"]], size: int) -> Iterator[Float[Tensor, "B D"]]:
    """Yield the tokens of all chunks in batches of ``size``; the last batch may be smaller."""
    held: Float[Tensor, "n D"] | None = None
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held is not None and len(held):
        yield held
