"""Top-k encoder and sparse decoder whose work and memory follow the k active latents.

Neither pass ever holds a [B, F] tensor in full: the encoder's product is made and reduced in blocks
of rows, and the gradient of a weight, SᵀG with S [B, F] sparse, is a sum of the rows of G over the
(token, latent) pairs sorted by latent. On the CPU every result repeats bit for bit: each sum is
taken by one thread in the order of the tokens.

Letters: B batch, D d_in, F num_latents, k active latents per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as nn_functional
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reseed.sae.selection import select


@dataclass(frozen=True)
class SparseLatents:
    """k (value, index) pairs per token. Values are ≥ 0; a pair with value 0 is not active."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]
    by_latent: ByLatent

    def fired(self) -> Int[Tensor, " num_latents"]:
        """On how many tokens each latent is active."""
        active = self.indices[self.values.detach() > 0]
        return torch.bincount(active, minlength=self.by_latent.num_latents)

    def dense(self) -> Float[Tensor, "batch num_latents"]:
        """The same as a full matrix."""
        shape = (len(self.values), self.by_latent.num_latents)
        return self.values.new_zeros(shape).scatter(1, self.indices, self.values)

    def first(self, k: int) -> SparseLatents:
        """The first k pairs of each token."""
        indices = self.indices[:, :k].contiguous()
        return SparseLatents(
            self.values[:, :k].contiguous(), indices, ByLatent(indices, self.by_latent.num_latents)
        )


@dataclass(frozen=True)
class ByLatent:
    """The (token, latent) pairs of a batch, sorted by latent, then by token. Sorted when asked."""

    indices: Int[Tensor, "batch k"]
    num_latents: int

    @cached_property
    def order(self) -> Int[Tensor, " pairs"]:
        # Radix sort: the narrower the key, the fewer the passes.
        narrow = torch.int16 if self.num_latents <= 2**15 else torch.int32
        return torch.sort(self.indices.flatten().to(narrow), stable=True).indices

    @cached_property
    def tokens(self) -> Int[Tensor, " pairs"]:
        return self.order // self.indices.shape[1]

    @cached_property
    def offsets(self) -> Int[Tensor, " num_latents"]:
        counts = torch.bincount(self.indices.flatten(), minlength=self.num_latents)
        return counts.cumsum(0) - counts

    def weighted_sum(
        self, weights: Float[Tensor, "batch k"], rows: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "num_latents d_in"]:
        """SᵀG: for each latent, Σ over its tokens of weight × row."""
        return nn_functional.embedding_bag(
            self.tokens,
            rows,
            self.offsets,
            per_sample_weights=weights.flatten()[self.order],
            mode="sum",
        )

    def sum(self, weights: Float[Tensor, "batch k"]) -> Float[Tensor, " num_latents"]:
        """For each latent, Σ over its tokens of the weight."""
        return torch.bincount(
            self.indices.flatten(), weights=weights.flatten(), minlength=self.num_latents
        ).to(weights.dtype)


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    *,
    b_dec: Float[Tensor, " d_in"] | None = None,
    among: Int[Tensor, " candidates"] | None = None,
    descending: bool = False,
) -> SparseLatents:
    """The k largest of ReLU(W_enc (x − b_dec) + b_enc) of every token.

    Args:
        k: at most the number of latents (or of candidates).
        b_dec: subtracted from x first, if given.
        among: choose among these latents only; indices stay those of all latents.
        descending: the largest value first (costs a little); otherwise in no particular order.

    Differentiable in x, b_dec and the parameters. Ties are broken in one way or another, the same
    at every call.
    """
    num_latents = len(W_enc)
    candidates = num_latents if among is None else len(among)
    if not 1 <= k <= candidates:
        raise ValueError(f"`k` (={k}) must be between 1 and the number of latents (={candidates})")
    with torch.no_grad():
        rows = (x if b_dec is None else x - b_dec).contiguous()
        if among is None:
            values, indices = select(rows, W_enc, b_enc, k, descending)
        else:
            values, indices = select(rows, W_enc[among], b_enc[among], k, descending)
            indices = among[indices]
        values.clamp_min_(0)
    by_latent = ByLatent(indices, num_latents)
    values = _EncoderGradient.apply(values, x, b_dec, W_enc, b_enc, rows, by_latent)
    return SparseLatents(values, indices, by_latent)


def sparse_decode(
    latents: SparseLatents, W_dec: Float[Tensor, "num_latents d_in"]
) -> Float[Tensor, "batch d_in"]:
    """f W_dec from the active pairs alone. Differentiable in the values and in W_dec."""
    # Autograd takes the values' gradient; the weight's would not repeat itself.
    out = nn_functional.embedding_bag(
        latents.indices, W_dec.detach(), per_sample_weights=latents.values, mode="sum"
    )
    return _DecoderGradient.apply(out, W_dec, latents.values.detach(), latents.by_latent)


class _EncoderGradient(torch.autograd.Function):
    """The identity on the selected values, with the gradient of the encoder that made them."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        b_dec: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        rows: Tensor,
        by_latent: ByLatent,
    ) -> Tensor:
        ctx.save_for_backward(values, W_enc, rows)
        ctx.by_latent = by_latent
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        values, W_enc, rows = ctx.saved_tensors
        by_latent: ByLatent = ctx.by_latent
        _, for_x, for_b_dec, for_W_enc, for_b_enc, *_ = ctx.needs_input_grad
        grad = torch.where(values > 0, grad_values, 0.0)
        grad_x = grad_b_dec = grad_W_enc = grad_b_enc = None
        if for_x:
            grad_x = nn_functional.embedding_bag(
                by_latent.indices, W_enc, per_sample_weights=grad, mode="sum"
            )
        if for_W_enc:
            grad_W_enc = by_latent.weighted_sum(grad, rows)
        if for_b_enc or for_b_dec:
            grad_b_enc = by_latent.sum(grad)
        if for_b_dec:
            assert grad_b_enc is not None
            grad_b_dec = -(grad_b_enc @ W_enc)
        return None, grad_x, grad_b_dec, grad_W_enc, grad_b_enc, None, None


class _DecoderGradient(torch.autograd.Function):
    """The identity on a reconstruction, with the gradient of the decoder's weight."""

    @staticmethod
    def forward(
        ctx: Any, reconstruction: Tensor, W_dec: Tensor, values: Tensor, by_latent: ByLatent
    ) -> Tensor:
        ctx.save_for_backward(values)
        ctx.by_latent = by_latent
        return reconstruction.view_as(reconstruction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        for_weight = ctx.needs_input_grad[1]
        weight = ctx.by_latent.weighted_sum(values, grad.contiguous()) if for_weight else None
        return grad, weight, None, None
