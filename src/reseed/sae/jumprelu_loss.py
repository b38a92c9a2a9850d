"""JumpReLU's error and L0, and their gradients, in one pass over blocks of tokens.

Neither holds a full [B, F] tensor; see `reseed.sae.gated_loss`. Gradients flow only where π > θ or
|π − θ| < ε/2. If few (token, latent) pairs are there (in float32 on the CPU), all but the encoder's
product is computed from these pairs; see `reseed.sae.relu_loss`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reseed.sae import kernels
from reseed.sae.pairs import ByLatent, Pairs
from reseed.sae.product import block_rows, float32_product


def jumprelu_terms(
    x: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    width: float,
    subtract_b_dec: bool,
) -> tuple[
    Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, " num_latents"], Float[Tensor, "batch d_in"]
]:
    """Return Σ‖e‖² over the batch, the mean L0, the number of active tokens of each latent, and e.

    The first two are differentiable in the parameters, by the paper's pseudo-derivatives. With
    K((π − θ)/ε) = 1 where |π − θ| < ε/2, on both sides of θ:

        ∂f/∂π = H(π − θ)    ∂f/∂θ = −(θ/ε) K    ∂H/∂θ = −(1/ε) K    ∂H/∂π = 0

    Args:
        parameters: W_enc, b_enc, θ, W_dec, b_dec.
        width: ε.
        subtract_b_dec: encode x − b_dec.
    """
    pairs = _pairs(x, parameters, width, subtract_b_dec)
    if pairs is None:
        return _Terms.apply(x, *parameters, width, subtract_b_dec)
    return _ByPairs.apply(x, *parameters, width, subtract_b_dec, pairs)


def _pairs(
    x: Tensor, parameters: tuple[Tensor, ...], width: float, subtract_b_dec: bool
) -> Pairs | None:
    """Return all pairs that are active or near the threshold, and a few that are neither."""
    if not kernels.serve(x, *parameters) or len(x) == 0:
        return None
    from reseed.sae.kernels.active import active_pairs

    W_enc, b_enc, threshold, _, b_dec = (p.detach() for p in parameters)
    rows = x.detach() - b_dec if subtract_b_dec else x.detach()
    # The margin keeps rounding from losing a pair; `jump` tests both conditions again.
    floors = threshold - width / 2 - 1e-6 * (threshold + width)
    return active_pairs(rows, W_enc, b_enc, floors)


class _Terms(torch.autograd.Function):
    """Blocks of tokens. `forward` computes the gradients too: all are sums over tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        width: float,
        subtract_b_dec: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = len(x)
        rows = x - b_dec if subtract_b_dec else x
        size = min(block_rows(x, len(W_enc)), batch)
        repeats = batch // size
        encode = float32_product(size, W_enc, b_enc, repeats)
        decode = float32_product(size, W_dec.t(), b_dec, repeats)
        into_latents = float32_product(size, W_dec, torch.zeros_like(b_enc), repeats)
        grads = [torch.zeros_like(p) for p in (W_enc, b_enc, threshold, W_dec, b_dec)]
        for_W_enc, for_b_enc, for_threshold, for_W_dec, for_b_dec = grads
        near_tokens, fired = torch.zeros_like(b_enc), torch.zeros_like(b_enc)
        squared_error, errors = x.new_zeros(()), torch.empty_like(x)
        for start in range(0, batch, size):
            pre = encode(rows[start : start + size])
            above = (pre > threshold).to(pre.dtype)
            near = ((pre - threshold).abs_() < width / 2).to(pre.dtype)
            latents = pre.mul_(above)
            block = slice(start, start + size)
            error = torch.sub(x[block], decode(latents), out=errors[block])
            squared_error += error.square().sum()
            fired += above.sum(0)
            near_tokens += near.sum(0)
            error = error * -2
            for_W_dec.addmm_(latents.t(), error)
            for_b_dec += error.sum(0)
            through = into_latents(error)
            for_threshold += near.mul_(through).sum(0)
            through *= above
            for_b_enc += through.sum(0)
            for_W_enc.addmm_(through.t(), rows[start : start + size])
        for_threshold *= -threshold / width
        if subtract_b_dec:
            for_b_dec -= for_b_enc @ W_enc
        ctx.save_for_backward(*grads, near_tokens.div_(-width * batch))
        counts = fired.long()
        ctx.mark_non_differentiable(counts, errors)
        return squared_error, counts.sum().to(x.dtype) / batch, counts, errors

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_error: Tensor, grad_l0: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        *grads, for_l0 = ctx.saved_tensors
        scaled = [grad_error * grad for grad in grads]
        scaled[2] += grad_l0 * for_l0
        return None, *scaled, None, None


class _ByPairs(torch.autograd.Function):
    """Sums over the pairs that have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        width: float,
        subtract_b_dec: bool,
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from reseed.sae.kernels import jump

        pre, owners, latents = pairs
        values, near = torch.empty_like(pre), torch.empty(len(pre), dtype=torch.bool)
        fired, near_tokens = (torch.zeros(len(W_enc), dtype=torch.int64) for _ in range(2))
        tensors = (pre, latents, threshold.contiguous(), values, near, fired, near_tokens)
        jump.jump(np.float32(width / 2), *(t.numpy() for t in tensors))
        grouped = ByLatent(latents, len(W_enc), owners, len(x)).grouped
        error, inner, squared_error = grouped.error(values, x, W_dec, b_dec)
        ctx.save_for_backward(
            x, W_enc, threshold, b_dec, values, latents, near, near_tokens, error, inner
        )
        ctx.grouped, ctx.width, ctx.centred = grouped, width, subtract_b_dec
        ctx.mark_non_differentiable(fired, error)
        return squared_error, fired.sum().to(x.dtype) / len(x), fired, error

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_error: Tensor, grad_l0: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        from reseed.sae.kernels import jump
        from reseed.sae.kernels.batch import column_sums

        x, W_enc, threshold, b_dec, values, latents, near, near_tokens, error, inner = (
            ctx.saved_tensors
        )
        factor, batch = -2 * float(grad_error), len(x)
        grad, into_threshold = torch.empty_like(inner), torch.zeros(len(W_enc), dtype=torch.float64)
        given = (inner * factor, values, latents, near, grad, into_threshold)
        jump.through_jump(*(t.numpy() for t in given))
        for_W_enc, for_b_enc = ctx.grouped.per_latent(grad, x - b_dec if ctx.centred else x)
        for_W_dec, _ = ctx.grouped.per_latent(values, error, factor)
        for_b_dec = column_sums(error) * factor
        if ctx.centred:
            for_b_dec -= column_sums(W_enc, for_b_enc)
        through_l0 = float(grad_l0) / batch * near_tokens
        for_threshold = -(threshold * into_threshold + through_l0) / ctx.width
        return None, for_W_enc, for_b_enc, for_threshold.float(), for_W_dec, for_b_dec, *[None] * 3
