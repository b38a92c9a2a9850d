"""The gated SAE's loss and its gradient in one pass over blocks of tokens.

Neither holds a full [B, F] tensor: autograd would keep ten of them, and on a CPU a step would
spend more time on fetching their pages than on products. Gradients flow only where the gate is
open. If few (token, latent) pairs are open (in float32 on the CPU), all but the encoder's product
is computed from these pairs; see `reseed.sae.relu_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reseed.sae import kernels
from reseed.sae.pairs import ByLatent, Pairs
from reseed.sae.product import block_rows, float32_product


def gated_loss(
    x: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    l1_coefficient: float,
) -> tuple[
    Float[Tensor, ""],
    Float[Tensor, ""],
    Float[Tensor, ""],
    Float[Tensor, ""],
    Int[Tensor, " num_latents"],
    Float[Tensor, "batch d_in"],
]:
    """Return ‖e‖² + λ Σ ReLU(π) + ‖e by the gate‖² as a mean over tokens, and its terms.

    Args:
        parameters: W_enc, b_enc (the gate's), r_mag, b_mag, W_dec, b_dec.

    Returns:
        The loss, differentiable in the parameters; then, detached, Σ‖e‖², Σ ReLU(π) and
        Σ‖e by the gate‖² over the batch, the number of active tokens of each latent, and e.
    """
    pairs = _pairs(x, parameters)
    if pairs is None:
        return _GatedLoss.apply(x, *parameters, l1_coefficient)
    return _ByPairs.apply(x, *parameters, l1_coefficient, pairs)


def _pairs(x: Tensor, parameters: tuple[Tensor, ...]) -> Pairs | None:
    """Return the pairs whose gate is open, with the pre-activation before the biases."""
    if not kernels.serve(x, *parameters) or len(x) == 0:
        return None
    from reseed.sae.kernels.active import active_pairs

    W_enc, b_enc, *_, b_dec = (p.detach() for p in parameters)
    return active_pairs(x.detach() - b_dec, W_enc, torch.zeros_like(b_enc), -b_enc)


class _GatedLoss(torch.autograd.Function):
    """Blocks of tokens. `forward` computes the gradient too: the loss is a sum over tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        r_mag: Tensor,
        b_mag: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        l1_coefficient: float,
    ) -> tuple[Tensor, ...]:
        batch, ratio = len(x), r_mag.exp()
        rows = x - b_dec
        size = min(block_rows(x, len(W_enc)), batch)
        repeats = batch // size
        nothing = torch.zeros_like(b_enc)
        encode = float32_product(size, W_enc, nothing, repeats)
        decode = float32_product(size, W_dec.t(), torch.zeros_like(b_dec), repeats)
        into_latents = float32_product(size, W_dec, nothing, repeats)
        grads = [torch.zeros_like(p) for p in (W_enc, b_enc, r_mag, b_mag, W_dec, b_dec)]
        for_W_enc, for_b_enc, for_r_mag, for_b_mag, for_W_dec, for_b_dec = grads
        through_rows = torch.zeros_like(b_enc)
        squared_error, opened_sum, by_gate = x.new_zeros(3).unbind()
        fired, errors = torch.zeros_like(b_enc), torch.empty_like(rows)
        for start in range(0, batch, size):
            block = rows[start : start + size]
            shared = encode(block)
            opened = (shared + b_enc).relu_()
            latents = _where_positive(torch.addcmul(b_mag, shared, ratio).relu_(), opened)
            fired += latents.sign().sum(0)
            opened_sum += opened.sum()
            # These are gradients of sums over the batch; they become means at the end.
            error = torch.sub(block, decode(latents), out=errors[start : start + size])
            squared_error += error.square().sum()
            error = error * -2
            for_W_dec.addmm_(latents.t(), error)
            for_b_dec += error.sum(0)
            magnitude = _where_positive(into_latents(error), latents)
            for_b_mag += magnitude.sum(0)
            for_r_mag += shared.mul_(magnitude).sum(0)
            through_magnitude = torch.mul(magnitude, ratio, out=shared)
            error = block - decode(opened)
            by_gate += error.square().sum()
            error *= -2
            gate = _where_positive(into_latents(error).add_(l1_coefficient), opened)
            for_b_enc += gate.sum(0)
            gate += through_magnitude
            for_W_enc.addmm_(gate.t(), block)
            through_rows += gate.sum(0)
        for_r_mag *= ratio
        for_b_dec -= through_rows @ W_enc
        for grad in grads:
            grad /= batch
        ctx.save_for_backward(*grads)
        total = (squared_error + l1_coefficient * opened_sum + by_gate) / batch
        detached = squared_error, opened_sum, by_gate, fired.long(), errors
        ctx.mark_non_differentiable(*detached)
        return total, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad_total * grad for grad in ctx.saved_tensors), None


class _ByPairs(torch.autograd.Function):
    """Sums over the pairs whose gate is open."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        r_mag: Tensor,
        b_mag: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        l1_coefficient: float,
        pairs: Pairs,
    ) -> tuple[Tensor, ...]:
        from reseed.sae.kernels import jump

        shared, owners, latents = pairs
        batch, ratio, rows = len(x), r_mag.exp(), x - b_dec
        opened, values = torch.empty_like(shared), torch.empty_like(shared)
        fired = torch.zeros(len(W_enc), dtype=torch.int64)
        given = (shared, latents, *(p.detach().contiguous() for p in (b_enc, ratio, b_mag)))
        opened_sum = jump.gate(*(t.numpy() for t in (*given, opened, values, fired)))
        grouped = ByLatent(latents, len(W_enc), owners, batch).grouped
        nothing = torch.zeros_like(b_dec)
        error, by_value, squared_error = grouped.error(values, rows, W_dec, nothing)
        _, by_gate, gate_error = grouped.error(opened, rows, W_dec, nothing)
        ctx.save_for_backward(W_enc, rows, ratio, shared, latents, values, error, by_value, by_gate)
        ctx.grouped, ctx.l1_coefficient = grouped, l1_coefficient
        opened_sum = torch.tensor(opened_sum, dtype=x.dtype)
        total = (squared_error + l1_coefficient * opened_sum + gate_error) / batch
        detached = squared_error, opened_sum, gate_error, fired, error
        ctx.mark_non_differentiable(*detached)
        return total, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        from reseed.sae.kernels import jump
        from reseed.sae.kernels.batch import column_sums

        W_enc, rows, ratio, shared, latents, values, error, by_value, by_gate = ctx.saved_tensors
        each = float(grad_total) / len(rows)
        by_value, by_gate = by_value * (-2 * each), by_gate * (-2 * each)
        by_gate += each * ctx.l1_coefficient
        grad = torch.empty_like(shared)
        into_bias, into_ratio, into_gate = sums = torch.zeros(3, len(ratio), dtype=torch.float64)
        given = (by_value, by_gate, values, shared, latents, ratio, grad, *sums)
        jump.through_gate(*(t.numpy() for t in given))
        for_W_enc, through_rows = ctx.grouped.per_latent(grad, rows)
        for_W_dec, _ = ctx.grouped.per_latent(values, error, -2 * each)
        for_b_dec = column_sums(error) * (-2 * each) - column_sums(W_enc, through_rows)
        biases = (into_gate.float(), (into_ratio * ratio).float(), into_bias.float())
        return None, for_W_enc, *biases, for_W_dec, for_b_dec, None, None


def _where_positive(values: Tensor, key: Tensor) -> Tensor:
    """Zero ``values`` in place where ``key`` is not positive: the derivative of ReLU."""
    return torch.ops.aten.threshold_backward.grad_input(values, key, 0, grad_input=values)
