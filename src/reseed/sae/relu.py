"""ReLU with an L1 penalty (Anthropic, *Circuits Updates*, April 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae import kernels
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.losses import auxk_term, warmup_factor
from reseed.sae.pairs import PairsByLatent


# MERGED The loss of a ReLU SAE and its gradient on the CPU, in blocks of tokens. Gradients flow through active latents alone. If those are few, everything after the encoder's product is computed from (token, latent) pairs; else by products of blocks. The number of pairs decides (`reseed.sae.kernels.active`)
class ReLUTerms(NamedTuple):
    """Loss (differentiable in the parameters) and its terms (detached)."""

    total: Float[Tensor, ""]
    """‖e‖² + λ Σ_j f_j‖d_j‖, a mean over tokens."""
    squared_error: Float[Tensor, ""]
    """Σ‖e‖² over the batch."""
    l1: Float[Tensor, ""]
    """Σ_j f_j‖d_j‖, a mean over tokens."""
    fired: Int[Tensor, " num_latents"]
    """Number of tokens on which each latent is active."""
    error: Float[Tensor, "batch d_in"]


def is_supported(x: Tensor, *parameters: Tensor) -> bool:
    """Return True if `relu_loss` supports these tensors: float32 on the CPU, without autocast."""
    if x.requires_grad or len(x) == 0 or torch.is_autocast_enabled(x.device.type):
        return False
    return kernels.supports(x, *parameters)


def relu_loss(
    x: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    l1_coefficient: float,
    *,
    weighted: bool,
    centred: bool,
) -> ReLUTerms:
    """Return the loss of one batch, in float32 on the CPU.

    Args:
        parameters: W_enc, b_enc, W_dec, b_dec.
        l1_coefficient: λ at this step.
        weighted: weigh f_j by ‖d_j‖, else by 1.
        centred: encode x − b_dec.
    """
    from reseed.sae.kernels.active import active_pairs

    W_enc, b_enc, W_dec, b_dec = (p.detach().contiguous() for p in parameters)
    with torch.no_grad():
        x = x.contiguous()
        rows = x - b_dec if centred else x
        norms = W_dec.norm(dim=1) if weighted else torch.ones_like(b_enc)
        pairs = active_pairs(rows, W_enc, b_enc, torch.zeros_like(b_enc))
    options = (rows, norms, l1_coefficient, weighted, centred)
    if pairs is None:
        return ReLUTerms(*_BlockLoss.apply(x, *parameters, *options))
    return ReLUTerms(*_PairLoss.apply(x, *parameters, *options, pairs))


class _PairLoss(torch.autograd.Function):
    """Sums over the active pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        rows: Tensor,
        norms: Tensor,
        l1_coefficient: float,
        weighted: bool,
        centred: bool,
        pairs: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        values, owners, latents = pairs
        grouped = PairsByLatent(latents, len(W_enc), owners, len(x)).grouped
        error, inner, squared_error = grouped.error(values, x, W_dec, b_dec)
        sums = _sums(latents, values, len(W_enc))
        l1 = ((sums * norms).sum() / len(x)).to(x.dtype)
        total = squared_error / len(x) + l1_coefficient * l1
        fired = grouped.fired(values)
        ctx.save_for_backward(W_enc, W_dec, rows, norms, values, latents, error, inner, sums)
        ctx.grouped, ctx.options = grouped, (l1_coefficient, weighted, centred)
        detached = squared_error, l1, fired, error
        ctx.mark_non_differentiable(*detached)
        return total, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        from reseed.sae.kernels.relu_blocks import column_sums

        W_enc, W_dec, rows, norms, values, latents, error, inner, sums = ctx.saved_tensors
        l1_coefficient, weighted, centred = ctx.options
        each = float(grad_total) / len(rows)
        grad = torch.mul(inner, -2 * each).add_((each * l1_coefficient * norms)[latents])
        for_W_enc, for_b_enc = ctx.grouped.per_latent(grad, rows)
        for_W_dec, _ = ctx.grouped.per_latent(values, error, -2 * each)
        for_b_dec = column_sums(error) * (-2 * each)
        if weighted:
            _add_norm_gradient(for_W_dec, W_dec, norms, each * l1_coefficient * sums)
        if centred:
            for_b_dec -= column_sums(W_enc, for_b_enc)
        return None, for_W_enc, for_b_enc, for_W_dec, for_b_dec, *[None] * 6


class _BlockLoss(torch.autograd.Function):
    """Products of blocks. `forward` computes the gradient too: the loss is a sum over tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        rows: Tensor,
        norms: Tensor,
        l1_coefficient: float,
        weighted: bool,
        centred: bool,
    ) -> tuple[Tensor, ...]:
        from reseed.sae.kernels.relu_blocks import column_sums, relu_blocks

        done = relu_blocks(x, rows, (W_enc, b_enc, W_dec, b_dec), l1_coefficient * norms)
        for_b_dec = column_sums(done.error) * -2
        if weighted:
            _add_norm_gradient(done.for_W_dec, W_dec, norms, l1_coefficient * done.sums)
        if centred:
            for_b_dec -= column_sums(W_enc, done.for_b_enc)
        l1 = ((done.sums * norms).sum() / len(x)).to(x.dtype)
        total = done.squared_error / len(x) + l1_coefficient * l1
        ctx.save_for_backward(done.for_W_enc, done.for_b_enc, done.for_W_dec, for_b_dec)
        ctx.batch = len(x)
        detached = done.squared_error, l1, done.fired, done.error
        ctx.mark_non_differentiable(*detached)
        return total, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        from reseed.sae.kernels import buffers

        each = float(grad_total) / ctx.batch
        grads = (torch.mul(g, each, out=buffers.empty_like(g)) for g in ctx.saved_tensors)
        return None, *grads, *[None] * 5


def _sums(latents: Tensor, values: Tensor, num_latents: int) -> Float[Tensor, " num_latents"]:
    """Return Σ f_j over the batch, accumulated in float64."""
    return torch.bincount(latents, weights=values.double(), minlength=num_latents).float()


def _add_norm_gradient(
    grad: Float[Tensor, "num_latents d_in"],
    W_dec: Float[Tensor, "num_latents d_in"],
    norms: Float[Tensor, " num_latents"],
    into_norms: Float[Tensor, " num_latents"],
) -> None:
    """Add the gradient through the norms: ``into_norms`` times d_j/‖d_j‖, or 0 if ‖d_j‖ = 0."""
    grad.addcmul_(W_dec, torch.where(norms == 0, 0.0, into_norms / norms)[:, None])


@dataclass(frozen=True)
class ReLUConfig(SAEConfig, name="relu"):
    """f = ReLU(W_enc x + b_enc), L = ‖e‖² + λ Σ_j f_j‖d_j‖, for inputs with E‖x‖ = √D.

    Args:
        l1_coefficient: λ after the warm-up.
        l1_warmup_fraction: λ rises linearly from 0 over this fraction of the steps.
        l1_weighted_by_decoder_norm: weigh each latent by its decoder row's norm. False is the plain
            L1, which needs `unit_norm_decoder` (else small latents with large rows evade it).
        subtract_b_dec: encode x − b_dec, as before April 2024.
    """

    penalty_field: ClassVar[str | None] = "l1_coefficient"

    decoder_init_norm: float = setting(0.1, above=0)
    unit_norm_decoder: bool = setting(False)
    l1_coefficient: float = setting(5.0, at_least=0)
    l1_warmup_fraction: float = setting(0.05, at_least=0, at_most=1)
    l1_weighted_by_decoder_norm: bool = setting(True)
    subtract_b_dec: bool = setting(False)

    @property
    def sparsity(self) -> str:
        return self._penalised_sparsity()

    def published_lr(self, num_latents: int) -> float:
        """Return 5e-5 at every width."""
        return 5e-5

    def empty(self, d_in: int) -> ReLU:
        return ReLU(self, d_in)


@final
class ReLU(SAE):
    """A ReLU sparse autoencoder.

    Attributes:
        penalty_weight: λ after the warm-up; may be set between steps. Not part of the state.
    """

    config: ReLUConfig

    def __init__(self, config: ReLUConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.penalty_weight: float = config.l1_coefficient

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        x = x.to(self.W_enc.dtype)
        if self.config.subtract_b_dec:
            x = x - self.b_dec
        return nn_functional.linear(x, self.W_enc, self.b_enc).relu()

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """Return the loss: sums over D (and F), means over B. Only AuxK uses ``dead``."""
        x = x.to(self.W_enc.dtype)
        warmup = warmup_factor(step.index, step.total, self.config.l1_warmup_fraction)
        terms = self._terms(x, self.penalty_weight * warmup)
        total, parts = terms.total, {"mse": terms.squared_error / len(x), "l1": terms.l1}
        if self.config.aux_alpha > 0:
            centred = self.config.subtract_b_dec
            term, parts["auxk"] = auxk_term(self, x, terms.error, dead, per=len(x), centred=centred)
            total = total + term
        return Loss(
            total=total,
            parts={name: part.detach() for name, part in parts.items()},
            fired=terms.fired,
            squared_error=terms.squared_error.detach(),
            l0=terms.fired.sum() / len(x),
        )

    def _terms(self, x: Float[Tensor, "batch d_in"], l1_coefficient: float) -> ReLUTerms:
        """Return ‖e‖² + λ Σ_j f_j‖d_j‖ and its terms."""
        parameters = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        if is_supported(x, *parameters):
            return relu_loss(
                x,
                parameters,
                l1_coefficient,
                weighted=self.config.l1_weighted_by_decoder_norm,
                centred=self.config.subtract_b_dec,
            )
        latents = self.encode(x)
        error = x - self.decode(latents)
        squared_error = error.square().sum()
        mse = squared_error / len(x)
        weights = latents.mean(0)
        if self.config.l1_weighted_by_decoder_norm:
            weights = weights * self.W_dec.norm(dim=1)
        l1 = weights.sum()
        with torch.no_grad():
            # Exact below 2²⁴ tokens, and three times as fast as a sum of booleans.
            fired = latents.sign().sum(0, dtype=torch.float32).long()
        return ReLUTerms(mse + l1_coefficient * l1, squared_error, l1, fired, error)
