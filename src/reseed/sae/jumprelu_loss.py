"""JumpReLU's error and L0, and their gradients, in one pass over blocks of tokens.

Neither ever holds a [B, F] tensor in full; see `reseed.sae.gated_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reseed.sae.product import block_rows, float32_product


def jumprelu_terms(
    x: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    width: float,
    subtract_b_dec: bool,
) -> tuple[
    Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, " num_latents"], Float[Tensor, "batch d_in"]
]:
    """Σ‖e‖² over the batch, the mean L0, on how many tokens each latent is active, and e.

    The first two are differentiable in the parameters, by the paper's pseudo-derivatives. With
    K((π − θ)/ε) = 1 where |π − θ| < ε/2, on both sides of θ:

        ∂f/∂π = H(π − θ)    ∂f/∂θ = −(θ/ε) K    ∂H/∂θ = −(1/ε) K    ∂H/∂π = 0

    Args:
        parameters: W_enc, b_enc, θ, W_dec, b_dec.
        width: ε.
        subtract_b_dec: encode x − b_dec.
    """
    return _Terms.apply(x, *parameters, width, subtract_b_dec)


class _Terms(torch.autograd.Function):
    """The gradients are made with the terms, because both are sums over tokens."""

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
