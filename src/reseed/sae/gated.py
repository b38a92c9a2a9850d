"""Gated SAE (Rajamanoharan et al. 2024, *Improving Dictionary Learning with …*, 2404.16014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae import kernels
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.losses import auxk_term, warmup_factor
from reseed.sae.pairs import Pairs, PairsByLatent, block_rows, float32_product


# MERGED The gated SAE's loss and its gradient in one pass over blocks of tokens. Neither holds a full [B, F] tensor: autograd would keep ten of them, and on a CPU a step would spend more time on fetching their pages than on products. Gradients flow only where the gate is open. If few (token, latent) pairs a
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
        return _BlockLoss.apply(x, *parameters, l1_coefficient)
    return _PairLoss.apply(x, *parameters, l1_coefficient, pairs)


def _pairs(x: Tensor, parameters: tuple[Tensor, ...]) -> Pairs | None:
    """Return the pairs whose gate is open, with the pre-activation before the biases."""
    if not kernels.supports(x, *parameters) or len(x) == 0:
        return None
    from reseed.sae.kernels.active import active_pairs

    W_enc, b_enc, *_, b_dec = (p.detach() for p in parameters)
    return active_pairs(x.detach() - b_dec, W_enc, torch.zeros_like(b_enc), -b_enc)


class _BlockLoss(torch.autograd.Function):
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


class _PairLoss(torch.autograd.Function):
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
        from reseed.sae.kernels import pairs

        shared, owners, latents = pairs
        batch, ratio, rows = len(x), r_mag.exp(), x - b_dec
        opened, values = torch.empty_like(shared), torch.empty_like(shared)
        fired = torch.zeros(len(W_enc), dtype=torch.int64)
        given = (shared, latents, *(p.detach().contiguous() for p in (b_enc, ratio, b_mag)))
        opened_sum = pairs.gate(*(t.numpy() for t in (*given, opened, values, fired)))
        grouped = PairsByLatent(latents, len(W_enc), owners, batch).grouped
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
        from reseed.sae.kernels import pairs
        from reseed.sae.kernels.relu_blocks import column_sums

        W_enc, rows, ratio, shared, latents, values, error, by_value, by_gate = ctx.saved_tensors
        each = float(grad_total) / len(rows)
        by_value, by_gate = by_value * (-2 * each), by_gate * (-2 * each)
        by_gate += each * ctx.l1_coefficient
        grad = torch.empty_like(shared)
        into_bias, into_ratio, into_gate = sums = torch.zeros(3, len(ratio), dtype=torch.float64)
        given = (by_value, by_gate, values, shared, latents, ratio, grad, *sums)
        pairs.gate_backward(*(t.numpy() for t in given))
        for_W_enc, through_rows = ctx.grouped.per_latent(grad, rows)
        for_W_dec, _ = ctx.grouped.per_latent(values, error, -2 * each)
        for_b_dec = column_sums(error) * (-2 * each) - column_sums(W_enc, through_rows)
        biases = (into_gate.float(), (into_ratio * ratio).float(), into_bias.float())
        return None, for_W_enc, *biases, for_W_dec, for_b_dec, None, None


def _where_positive(values: Tensor, key: Tensor) -> Tensor:
    """Zero ``values`` in place where ``key`` is not positive: the derivative of ReLU."""
    return torch.ops.aten.threshold_backward.grad_input(values, key, 0, grad_input=values)


@dataclass(frozen=True)
class GatedConfig(SAEConfig, name="gated"):
    """f = 1[π > 0] · ReLU(exp(r) ⊙ W_enc (x − b_dec) + b_mag), π = W_enc (x − b_dec) + b_enc.

    L = ‖e‖² + λ Σ ReLU(π) + ‖x − x̂(ReLU(π))‖², with the decoder held constant in the last term;
    for inputs with E‖x‖ = √D.

    Args:
        l1_coefficient: λ after the warm-up.
        l1_warmup_fraction: λ rises linearly from 0 over this fraction of the steps.
    """

    version: ClassVar[int] = 2
    dense_products = 7  # the second reconstruction costs a product and one for its gradient

    penalty_field: ClassVar[str | None] = "l1_coefficient"

    l1_coefficient: float = setting(5.0, at_least=0)
    l1_warmup_fraction: float = setting(0.05, at_least=0, at_most=1)

    @property
    def sparsity(self) -> str:
        return self._penalised_sparsity()

    def published_lr(self, num_latents: int) -> float:
        """Return 3e-4 at every width (the authors' value, given outside the paper)."""
        return 3e-4

    def empty(self, d_in: int) -> Gated:
        return Gated(self, d_in)


@final
class Gated(SAE):
    """A gated sparse autoencoder. ``b_enc`` is the gate's bias.

    Attributes:
        r_mag: log of the scale of each magnitude row relative to its gate row.
        b_mag: bias of the magnitudes.
        penalty_weight: λ after the warm-up; may be set between steps. Not part of the state.
    """

    homogeneous: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec", "b_mag")

    config: GatedConfig
    r_mag: Float[nn.Parameter, " num_latents"]
    b_mag: Float[nn.Parameter, " num_latents"]

    def __init__(self, config: GatedConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.penalty_weight: float = config.l1_coefficient
        self.r_mag = nn.Parameter(torch.zeros(self.num_latents))
        self.b_mag = nn.Parameter(torch.zeros(self.num_latents))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        return self._encode(x)[1]

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """Return the loss: sums over D (and F), means over B. Only AuxK uses ``dead``, with the
        gates' π."""
        x = x.to(self.W_enc.dtype)
        warmup = warmup_factor(step.index, step.total, self.config.l1_warmup_fraction)
        parameters = (self.W_enc, self.b_enc, self.r_mag, self.b_mag, self.W_dec, self.b_dec)
        # The gate learns to reconstruct, but its shrunken values must not train the decoder.
        with torch.autocast(x.device.type, enabled=False):  # sums over tokens need float32
            total, squared_error, opened, by_gate, fired, error = gated_loss(
                x, parameters, self.penalty_weight * warmup
            )
        parts = {"mse": squared_error / len(x), "l1": opened / len(x), "aux": by_gate / len(x)}
        if self.config.aux_alpha > 0:
            term, parts["auxk"] = auxk_term(self, x, error, dead, per=len(x), centred=True)
            total = total + term
        return Loss(
            total=total,
            parts={name: part.detach() for name, part in parts.items()},
            fired=fired,
            squared_error=squared_error,
            l0=fired.sum() / len(x),
        )

    def _encode(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch num_latents"], Float[Tensor, "*batch num_latents"]]:
        """Return π and f."""
        shared = nn_functional.linear(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc)
        gate = shared + self.b_enc
        magnitude = (self.r_mag.exp() * shared + self.b_mag).relu()
        return gate, torch.where(gate > 0, magnitude, 0.0)
