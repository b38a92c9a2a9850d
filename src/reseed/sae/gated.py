"""Gated SAE (Rajamanoharan et al. 2024, *Improving Dictionary Learning with …*, 2404.16014).

`gated_loss` computes the loss and its gradient (`reseed.sae.block_loss`). The gradient flows only
where the gate is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae import kernels
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.block_loss import BlockSums, OwnGradient, PairLoss, Terms, can_use_pairs
from reseed.sae.kernels import Pairs
from reseed.sae.losses import auxk_term, warmup_factor


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
    dense_products = 7  # the second reconstruction adds one product, and one for its gradient

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
    pairs = _open_pairs(x, parameters)
    loss = (
        _ByBlocks(l1_coefficient)
        if pairs is None
        else _ByPairs(pairs, len(x), len(parameters[0]), l1_coefficient)
    )
    return loss(x, *parameters)  # pyright: ignore


def _open_pairs(x: Tensor, parameters: tuple[Tensor, ...]) -> Pairs | None:
    """Return the pairs whose gate is open, with the pre-activation before the biases."""
    if not can_use_pairs(x, *parameters):
        return None
    W_enc, b_enc, *_, b_dec = (p.detach() for p in parameters)
    return kernels.active_pairs(x.detach() - b_dec, W_enc, torch.zeros_like(b_enc), -b_enc)


class _ByPairs(PairLoss):
    """Loss as sums over the pairs whose gate is open."""

    def __init__(self, pairs: Pairs, batch: int, num_latents: int, l1_coefficient: float) -> None:
        super().__init__(pairs, batch, num_latents)
        self.l1_coefficient = l1_coefficient

    def forward(self, x: Tensor, *parameters: Tensor) -> Terms:
        W_enc, b_enc, r_mag, b_mag, W_dec, b_dec = parameters
        ratio, rows = r_mag.exp(), x - b_dec
        opened, values, fired, total = kernels.gate(self.pre, self.latents, b_enc, ratio, b_mag)
        nothing = torch.zeros_like(b_dec)
        error, by_value, squared_error = self.grouped.error(values, rows, W_dec, nothing)
        _, by_gate, gate_error = self.grouped.error(opened, rows, W_dec, nothing)
        opened_sum = torch.tensor(total, dtype=x.dtype)
        total = (squared_error + self.l1_coefficient * opened_sum + gate_error) / len(x)
        return Terms(
            (total,),
            (squared_error, opened_sum, gate_error, fired, error),
            (W_enc, rows, ratio, values, error, by_value, by_gate),
        )

    def backward(self, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, ...]:
        W_enc, rows, ratio, values, error, by_value, by_gate = saved
        each = float(grads[0]) / len(rows)
        by_value, by_gate = by_value * (-2 * each), by_gate * (-2 * each)
        by_gate += each * self.l1_coefficient
        grad, (into_bias, into_ratio, into_gate) = kernels.gate_backward(
            by_value, by_gate, values, self.pre, self.latents, ratio
        )
        for_W_enc, _, for_W_dec, for_b_dec = self.gradients(
            grad, rows, values, error, -2 * each, centre=W_enc
        )
        biases = (into_gate.float(), (into_ratio * ratio).float(), into_bias.float())
        return for_W_enc, *biases, for_W_dec, for_b_dec


class _ByBlocks(OwnGradient):
    """Loss by products of blocks. `forward` also computes the gradient, which is a sum over
    tokens."""

    def __init__(self, l1_coefficient: float) -> None:
        self.l1_coefficient = l1_coefficient

    def forward(self, x: Tensor, *parameters: Tensor) -> Terms:
        W_enc, b_enc, r_mag, b_mag, W_dec, b_dec = parameters
        batch, ratio, rows = len(x), r_mag.exp(), x - b_dec
        zeros = torch.zeros_like(b_enc), torch.zeros_like(b_dec)
        sums = BlockSums(rows, rows, W_enc, zeros[0], W_dec, zeros[1])
        for_b_enc, for_r_mag, for_b_mag = (torch.zeros_like(p) for p in (b_enc, r_mag, b_mag))
        opened_sum, by_gate = x.new_zeros(()), x.new_zeros(())
        for block in sums.blocks():
            shared = sums.encode(rows[block])
            opened = (shared + b_enc).relu_()
            latents = _where_positive(torch.addcmul(b_mag, shared, ratio).relu_(), opened)
            sums.fired += latents.sign().sum(0)
            opened_sum += opened.sum()
            # These are gradients of sums over the batch; they become means at the end.
            magnitude = _where_positive(sums.reconstruct(block, latents), latents)
            for_b_mag += magnitude.sum(0)
            for_r_mag += shared.mul_(magnitude).sum(0)
            through_magnitude = torch.mul(magnitude, ratio, out=shared)
            error = rows[block] - sums.decode(opened)
            by_gate += error.square().sum()
            error *= -2
            gate = _where_positive(sums.into_latents(error).add_(self.l1_coefficient), opened)
            for_b_enc += gate.sum(0)
            gate += through_magnitude
            sums.add_encoder(block, gate)
        for_r_mag *= ratio
        sums.add_centring()
        biases = for_b_enc, for_r_mag, for_b_mag
        grads = sums.for_W_enc, *biases, sums.for_W_dec, sums.for_b_dec
        for grad in grads:
            grad /= batch
        total = (sums.squared_error + self.l1_coefficient * opened_sum + by_gate) / batch
        detached = sums.squared_error, opened_sum, by_gate, sums.fired.long(), sums.errors
        return Terms((total,), detached, grads)

    def backward(self, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grads[0] * grad for grad in saved)


def _where_positive(values: Tensor, key: Tensor) -> Tensor:
    """Zero ``values`` in place where ``key`` is not positive: the derivative of ReLU."""
    return torch.ops.aten.threshold_backward.grad_input(values, key, 0, grad_input=values)
