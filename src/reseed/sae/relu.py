"""ReLU with an L1 penalty (Anthropic, *Circuits Updates*, April 2024).

`ReLU._terms` is the loss in plain PyTorch. In float32 on the CPU `relu_loss` computes it and its
gradient instead (`reseed.sae.block_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae import kernels
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.block_loss import OwnGradient, PairLoss, Terms, can_use_pairs
from reseed.sae.kernels import Pairs
from reseed.sae.losses import auxk_term, warmup_factor


@dataclass(frozen=True)
class ReLUConfig(SAEConfig, name="relu"):
    """f = ReLU(W_enc x + b_enc), L = ‖e‖² + λ Σ_j f_j‖d_j‖, for inputs with E‖x‖ = √D.

    Args:
        l1_coefficient: λ after the warm-up.
        l1_warmup_fraction: λ rises linearly from 0 over this fraction of the steps.
        l1_weighted_by_decoder_norm: weigh each latent by the norm of its decoder row. False gives
            the plain L1, which needs `unit_norm_decoder`: otherwise small latents with large rows
            evade the penalty.
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
            # Exact below 2²⁴ tokens, and faster than a sum of booleans.
            fired = latents.sign().sum(0, dtype=torch.float32).long()
        return ReLUTerms(mse + l1_coefficient * l1, squared_error, l1, fired, error)


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
    if x.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    return can_use_pairs(x, *parameters)


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
    W_enc, b_enc, W_dec, b_dec = (p.detach().contiguous() for p in parameters)
    with torch.no_grad():
        x = x.contiguous()
        rows = x - b_dec if centred else x
        norms = W_dec.norm(dim=1) if weighted else torch.ones_like(b_enc)
        pairs = kernels.active_pairs(rows, W_enc, b_enc, torch.zeros_like(b_enc))
    options = _Options(rows, norms, l1_coefficient, weighted, centred)
    loss = _ByBlocks(options) if pairs is None else _ByPairs(options, pairs)
    return ReLUTerms(*loss(x, *parameters))


class _Options(NamedTuple):
    """Constants of one loss."""

    rows: Float[Tensor, "batch d_in"]
    """The encoder's inputs."""
    norms: Float[Tensor, " num_latents"]
    """‖d_j‖, or 1."""
    l1_coefficient: float
    weighted: bool
    centred: bool

    def terms(
        self, squared_error: Tensor, sums: Tensor, fired: Tensor, error: Tensor, *saved: Tensor
    ) -> Terms:
        """Return the loss and its terms, given Σ f_j over the batch."""
        l1 = ((sums * self.norms).sum() / len(error)).to(error.dtype)
        total = squared_error / len(error) + self.l1_coefficient * l1
        return Terms((total,), (squared_error, l1, fired, error), saved)

    def add_norm_gradient(self, grad: Tensor, W_dec: Tensor, into_norms: Tensor) -> None:
        """Add the gradient through the norms: ``into_norms`` times d_j/‖d_j‖, or 0 if ‖d_j‖ = 0."""
        if self.weighted:
            slope = torch.where(self.norms == 0, 0.0, into_norms / self.norms)
            grad.addcmul_(W_dec, slope[:, None])


class _ByPairs(PairLoss):
    """Loss as sums over the active pairs, whose values are their pre-activations."""

    def __init__(self, options: _Options, pairs: Pairs) -> None:
        super().__init__(pairs, len(options.rows), len(options.norms))
        self.options = options

    def forward(self, x: Tensor, *parameters: Tensor) -> Terms:
        W_enc, _, W_dec, b_dec = parameters
        error, inner, squared_error = self.grouped.error(self.pre, x, W_dec, b_dec)
        doubles = self.pre.double()
        sums = torch.bincount(self.latents, weights=doubles, minlength=self.num_latents).float()
        fired, saved = self.grouped.fired(self.pre), (W_enc, W_dec, error, inner, sums)
        return self.options.terms(squared_error, sums, fired, error, *saved)

    def backward(self, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, ...]:
        W_enc, W_dec, error, inner, sums = saved
        rows, norms, l1_coefficient, _, centred = self.options
        each = float(grads[0]) / len(rows)
        grad = torch.mul(inner, -2 * each).add_((each * l1_coefficient * norms)[self.latents])
        centre = W_enc if centred else None
        found = self.gradients(grad, rows, self.pre, error, -2 * each, centre)
        self.options.add_norm_gradient(found[2], W_dec, each * l1_coefficient * sums)
        return found


class _ByBlocks(OwnGradient):
    """Loss by products of blocks. `forward` also computes the gradient, which is a sum over
    tokens."""

    def __init__(self, options: _Options) -> None:
        self.options = options

    def forward(self, x: Tensor, *parameters: Tensor) -> Terms:
        W_enc, b_enc, W_dec, b_dec = parameters
        rows, norms, l1_coefficient, _, centred = self.options
        done = kernels.relu_blocks_loss(
            x, rows, (W_enc, b_enc, W_dec, b_dec), l1_coefficient * norms
        )
        for_b_dec = kernels.column_sums(done.error) * -2
        self.options.add_norm_gradient(done.for_W_dec, W_dec, l1_coefficient * done.sums)
        if centred:
            for_b_dec -= kernels.column_sums(W_enc, done.for_b_enc)
        gradients = done.for_W_enc, done.for_b_enc, done.for_W_dec, for_b_dec
        return self.options.terms(done.squared_error, done.sums, done.fired, done.error, *gradients)

    def backward(self, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, ...]:
        each = float(grads[0]) / len(self.options.rows)
        return tuple(torch.mul(g, each, out=kernels.empty_like(g)) for g in saved)
