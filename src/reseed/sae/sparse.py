"""Top-k encoders and sparse decoder whose work and memory scale with the k active latents.

Neither pass holds a full [B, F] tensor: the encoder's product is computed and reduced in blocks of
rows, and the gradient of a weight, SᵀG with S [B, F] sparse, is a sum of the rows of G over the
(token, latent) pairs sorted by latent. On the CPU every result is bit-reproducible: one thread
computes each sum, in the order of the tokens. This file is plain PyTorch and defines the result; in
float32 on the CPU compiled loops replace it (`reseed.sae.kernels`).

Letters: B batch, D d_in, F num_latents, k active latents per token; the layouts of pairs are those
of `reseed.sae.pairs`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reseed.sae import kernels
from reseed.sae.pairs import PairsByLatent, SparseLatents
from reseed.sae.selection import select, select_in_batch, select_in_groups


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    *,
    b_dec: Float[Tensor, " d_in"] | None = None,
    among: Int[Tensor, " candidates"] | None = None,
    weights: Float[Tensor, " num_latents"] | None = None,
    descending: bool = False,
) -> SparseLatents:
    """Return the k largest of ReLU(W_enc (x − b_dec) + b_enc) of every token.

    Args:
        k: number of active latents, at most that of all latents (or candidates).
        b_dec: subtracted from x first, if given.
        among: choose among these latents only; indices are still those of all latents.
        weights: constants ≥ 0: choose by weight × value. The returned values are unweighted, but 0
            where the weight is 0.
        descending: sort, the largest first (slightly slower); otherwise the order is arbitrary.

    Differentiable in x, b_dec and the parameters. Ties are broken arbitrarily, but in the same way
    at every call.
    """
    num_latents = len(W_enc)
    candidates = num_latents if among is None else len(among)
    if not 1 <= k <= candidates:
        raise ValueError(f"`k` (={k}) must be between 1 and the number of latents (={candidates})")
    with torch.no_grad():
        rows = (x if b_dec is None else x - b_dec).contiguous()
        if among is None:
            values, indices = select(rows, *weighted_encoder(W_enc, b_enc, weights), k, descending)
        else:
            some = None if weights is None else weights[among]
            W, b = weighted_encoder(W_enc[among], b_enc[among], some)
            values, indices = select(rows, W, b, k, descending)
            indices = among[indices]
        values = _unweighted(values.clamp_min_(0), indices, weights)
    by_latent = PairsByLatent(indices, num_latents)
    values = _EncoderGradient.apply(values, x, b_dec, W_enc, b_enc, rows, by_latent)
    return SparseLatents(values, indices, by_latent)


def batch_topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: float,
    *,
    b_dec: Float[Tensor, " d_in"],
    weights: Float[Tensor, " num_latents"] | None = None,
) -> SparseLatents:
    """Return the k·B largest of ReLU(W_enc (x − b_dec) + b_enc) of the whole batch, as a flat list.

    If fewer are positive, only those are returned. Differentiable like `topk_encode`.

    Args:
        k: mean number of latents per token. k·B is rounded (half to even) and is at least 1.
        b_dec, weights: as in `topk_encode`.
    """
    if not 0 < k <= len(W_enc):
        raise ValueError(
            f"`k` (={k}) must be above 0 and at most the number of latents (={len(W_enc)})"
        )
    with torch.no_grad():
        rows = (x - b_dec).contiguous()
        values, owners, indices = select_in_batch(rows, *weighted_encoder(W_enc, b_enc, weights), k)
        values = _unweighted(values, indices, weights)
    by_latent = PairsByLatent(indices, len(W_enc), owners, len(rows))
    values = _EncoderGradient.apply(values, x, b_dec, W_enc, b_enc, rows, by_latent)
    return SparseLatents(values, indices, by_latent)


def group_max_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    *,
    b_dec: Float[Tensor, " d_in"],
) -> SparseLatents:
    """Return the largest of ReLU(W_enc (x − b_dec) + b_enc) in each of k groups of neighbouring
    latents.

    Args:
        k: a divisor of the number of latents.

    Differentiable like `topk_encode`.
    """
    with torch.no_grad():
        rows = (x - b_dec).contiguous()
        values, indices = select_in_groups(rows, W_enc, b_enc, k)
        values.clamp_min_(0)
    by_latent = PairsByLatent(indices, len(W_enc))
    values = _EncoderGradient.apply(values, x, b_dec, W_enc, b_enc, rows, by_latent)
    return SparseLatents(values, indices, by_latent)


def weighted_encoder(
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    weights: Float[Tensor, " num_latents"] | None,
) -> tuple[Float[Tensor, "num_latents d_in"], Float[Tensor, " num_latents"]]:
    """Return the encoder of weight × pre-activation."""
    return (W_enc, b_enc) if weights is None else (W_enc * weights[:, None], b_enc * weights)


def _unweighted(
    values: Float[Tensor, "*pairs"],
    indices: Int[Tensor, "*pairs"],
    weights: Float[Tensor, " num_latents"] | None,
) -> Float[Tensor, "*pairs"]:
    """Divide values by the weights of `weighted_encoder`; 0 where the weight is 0."""
    if weights is None:
        return values
    weight = weights[indices]
    return torch.where(weight == 0, 0.0, values / weight)


def sparse_decode(
    latents: SparseLatents, W_dec: Float[Tensor, "num_latents d_in"]
) -> Float[Tensor, "batch d_in"]:
    """Return f W_dec from the active pairs alone. Differentiable in the values and in W_dec."""
    if kernels.supports(latents.values, W_dec):
        return _Decoder.apply(latents.values, W_dec, latents.by_latent)
    # Autograd computes the values' gradient only; its gradient of W_dec is not bit-reproducible.
    out = latents.by_latent.per_token(latents.values, W_dec.detach())
    return _DecoderGradient.apply(out, W_dec, latents.values.detach(), latents.by_latent)


def sparse_error(
    x: Float[Tensor, "batch d_in"],
    latents: SparseLatents,
    W_dec: Float[Tensor, "num_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_in"]]:
    """Return Σ‖e‖², and e = x − (f W_dec + b_dec), detached.

    The sum is differentiable in x, the values, W_dec and b_dec.
    """
    if kernels.supports(x, latents.values, W_dec, b_dec):
        squared, error = _SquaredError.apply(x, latents.values, W_dec, b_dec, latents.by_latent)
        return squared, error
    error = x - (sparse_decode(latents, W_dec) + b_dec)
    return error.square().sum(), error.detach()


class _EncoderGradient(torch.autograd.Function):
    """Identity on the selected values whose backward pass computes the gradient of the encoder."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        b_dec: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        rows: Tensor,
        by_latent: PairsByLatent,
    ) -> Tensor:
        ctx.save_for_backward(values, W_enc, rows)
        ctx.by_latent = by_latent
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        values, W_enc, rows = ctx.saved_tensors
        by_latent: PairsByLatent = ctx.by_latent
        _, for_x, for_b_dec, for_W_enc, for_b_enc, *_ = ctx.needs_input_grad
        grad = torch.where(values > 0, grad_values, 0.0)
        grad_x = grad_b_dec = grad_W_enc = grad_b_enc = None
        if for_x:
            grad_x = by_latent.per_token(grad, W_enc)
        if for_W_enc:
            grad_W_enc, grad_b_enc = by_latent.weighted_sums(grad, rows)
        elif for_b_enc or for_b_dec:
            grad_b_enc = by_latent.sum(grad)
        if for_b_dec:
            assert grad_b_enc is not None
            grad_b_dec = -_weighted_rows(grad_b_enc, W_enc)
        return None, grad_x, grad_b_dec, grad_W_enc, grad_b_enc, None, None


class _DecoderGradient(torch.autograd.Function):
    """Identity on a reconstruction whose backward pass computes the gradient of W_dec."""

    @staticmethod
    def forward(
        ctx: Any, reconstruction: Tensor, W_dec: Tensor, values: Tensor, by_latent: PairsByLatent
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


class _Decoder(torch.autograd.Function):
    """Implementation of `sparse_decode` by compiled loops."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, by_latent: PairsByLatent) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.by_latent = by_latent
        return by_latent.per_token(values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        by_latent: PairsByLatent = ctx.by_latent
        for_values, for_weight, _ = ctx.needs_input_grad
        grad_values = grad_weight = None
        if for_values:
            grad_values = by_latent.grouped.inner_products(grad, W_dec).view(values.shape)
        if for_weight:
            grad_weight = by_latent.weighted_sum(values, grad)
        return grad_values, grad_weight, None


class _SquaredError(torch.autograd.Function):
    """Implementation of `sparse_error` by compiled loops, which also return e · d_j for the
    gradient of the values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor, by_latent: PairsByLatent
    ) -> tuple[Tensor, Tensor]:
        error, inner, squared = by_latent.grouped.error(values, x, W_dec, b_dec)
        ctx.save_for_backward(values, error, inner)
        ctx.by_latent = by_latent
        ctx.mark_non_differentiable(error)
        return squared, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, error, inner = ctx.saved_tensors
        for_x, for_values, for_weight, for_bias, _ = ctx.needs_input_grad
        factor = -2 * float(grad)
        return (
            error * -factor if for_x else None,
            (inner * factor).view(values.shape) if for_values else None,
            ctx.by_latent.grouped.per_latent(values, error, factor)[0] if for_weight else None,
            kernels.column_sums(error) * factor if for_bias else None,
            None,
        )


def _weighted_rows(
    weights: Float[Tensor, " num_latents"], W: Float[Tensor, "num_latents d_in"]
) -> Float[Tensor, " d_in"]:
    """Return Σ over the latents of weight × row of W."""
    if kernels.supports(weights, W):
        return kernels.column_sums(W, weights)
    return weights @ W
