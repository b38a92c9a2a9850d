"""JumpReLU (Rajamanoharan et al. 2024, *Jumping Ahead*, 2407.14435).

The gradient is that of the paper's pseudo-derivatives. With K((π − θ)/ε) = 1 where |π − θ| < ε/2,
on both sides of θ:

    ∂f/∂π = H(π − θ)    ∂f/∂θ = −(θ/ε) K    ∂H/∂θ = −(1/ε) K    ∂H/∂π = 0

`jumprelu_terms` computes Σ‖e‖², L0 and this gradient (`reseed.sae.block_loss`). The tanh penalty is
a function of f, and is computed by `_JumpReLUWithL0` and autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.distributed.process_group import batch_mean
from reseed.errors import ConfigError
from reseed.sae import kernels
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.block_loss import BlockSums, OwnGradient, PairLoss, Terms, can_use_pairs
from reseed.sae.kernels import Pairs
from reseed.sae.losses import auxk_term, warmup_factor


@dataclass(frozen=True)
class JumpReLUConfig(SAEConfig, name="jumprelu"):
    """f = π·H(π − θ), π = W_enc x + b_enc, L = ‖e‖²/D + λ·penalty, for inputs with E‖x‖ = √D.

    The paper's inputs have E‖x‖² = 1. Dividing ‖e‖² by D, and lengths by √D, gives its λ, θ and ε
    the same meaning here.

    Args:
        l0_coefficient: λ after the warm-up.
        l0_warmup_fraction: λ rises linearly from 0 over this fraction of the steps.
        penalty: ``step``: L0. ``quadratic``: (L0/L0* − 1)², L0* being `target_l0`. ``tanh``:
            Σ_j tanh(c f_j‖d_j‖) (Anthropic, *Circuits Updates*, January 2025).
        tanh_scale: c of the tanh penalty, for inputs with E‖x‖ = √D; Anthropic uses 4.
        threshold_init: initial θ, for inputs with E‖x‖² = 1.
        bandwidth: ε, the width of the kernel that replaces the derivative of the jump, for inputs
            with E‖x‖² = 1.
        subtract_b_dec: encode x − b_dec.
    """

    version: ClassVar[int] = 2
    penalty_field: ClassVar[str | None] = "l0_coefficient"

    # Enters the signature even when null, because it did so in earlier versions.
    target_l0: float | None = setting(None, above=0)
    l0_coefficient: float = setting(1e-3, at_least=0)
    l0_warmup_fraction: float = setting(0.05, at_least=0, at_most=1)
    penalty: str = setting("step", choices=("step", "quadratic", "tanh"), neutral="step")
    tanh_scale: float = setting(4.0, above=0, neutral=4.0)
    threshold_init: float = setting(1e-3, above=0)
    bandwidth: float = setting(1e-3, above=0)
    subtract_b_dec: bool = setting(False)

    def validate(self) -> None:
        super().validate()
        if self.penalty != "tanh" and self.tanh_scale != 4:
            raise ConfigError(
                f"{{key}} applies only to `penalty=tanh`; got {self.tanh_scale:g}", "tanh_scale"
            )
        if self.penalty == "quadratic" and self.target_l0 is None:
            raise ConfigError(
                "{key} must be given with `penalty=quadratic`; it is null", "target_l0"
            )

    @property
    def needs_calibration(self) -> bool:
        return super().needs_calibration and self.penalty != "quadratic"

    @property
    def sparsity(self) -> str:
        return self._penalised_sparsity()

    def published_lr(self, num_latents: int) -> float:
        """Return 7e-5 at every width."""
        return 7e-5

    def empty(self, d_in: int) -> JumpReLU:
        return JumpReLU(self, d_in)

    def build(self, d_in: int, generator: Generator) -> SAE:
        sae = super().build(d_in, generator)
        assert isinstance(sae, JumpReLU)
        nn.init.constant_(sae.log_threshold, math.log(self.threshold_init * d_in**0.5))
        return sae


@final
class JumpReLU(SAE):
    """A JumpReLU sparse autoencoder.

    Attributes:
        log_threshold: log θ of each latent.
        penalty_weight: λ after the warm-up; may be set between steps. Not part of the state.
    """

    logarithmic: ClassVar[tuple[str, ...]] = ("log_threshold",)

    config: JumpReLUConfig
    log_threshold: Float[nn.Parameter, " num_latents"]

    def __init__(self, config: JumpReLUConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.penalty_weight: float = config.l0_coefficient
        self.log_threshold = nn.Parameter(torch.zeros(self.num_latents))

    @property
    def threshold(self) -> Float[Tensor, " num_latents"]:
        """θ, in units of the activations."""
        return self.log_threshold.exp()

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        pre = self._pre_activations(x)
        return torch.where(pre > self.threshold, pre, 0.0)

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """Return ‖e‖²/D + λ·penalty, means over B. Only AuxK, which ignores θ, uses ``dead``."""
        x = x.to(self.W_enc.dtype)
        squared_error, penalty, l0, fired, error = self._terms(x)
        mse = squared_error / x.numel()
        warmup = warmup_factor(step.index, step.total, self.config.l0_warmup_fraction)
        total = mse + self.penalty_weight * warmup * penalty
        parts = {"mse": mse, "penalty": penalty}
        if self.config.aux_alpha > 0:
            centred = self.config.subtract_b_dec
            term, parts["auxk"] = auxk_term(self, x, error, dead, per=x.numel(), centred=centred)
            total = total + term
        return Loss(
            total=total,
            parts={name: part.detach() for name, part in parts.items()},
            fired=fired,
            squared_error=squared_error.detach(),
            l0=l0.detach(),
        )

    def _terms(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[
        Float[Tensor, ""],
        Float[Tensor, ""],
        Float[Tensor, ""],
        Int[Tensor, " num_latents"],
        Float[Tensor, "batch d_in"],
    ]:
        """Return Σ‖e‖², the penalty, L0, the number of active tokens of each latent, and e."""
        width = self.config.bandwidth * self.d_in**0.5
        if self.config.penalty == "tanh":
            latents, l0 = _JumpReLUWithL0.apply(self._pre_activations(x), self.threshold, width)
            # The penalty is a function of f, through whose pseudo-derivative θ gets its gradient.
            scale = self.config.tanh_scale * self.W_dec.norm(dim=1)
            penalty = (latents * scale).tanh().sum() / len(latents)
            fired = latents.detach().sign().sum(0, dtype=torch.float32).long()
            error = x - self.decode(latents)
            return error.square().sum(), penalty, l0, fired, error
        parameters = (self.W_enc, self.b_enc, self.threshold, self.W_dec, self.b_dec)
        with torch.autocast(x.device.type, enabled=False):  # sums over tokens need float32
            squared_error, l0, fired, error = jumprelu_terms(
                x, parameters, width, self.config.subtract_b_dec
            )
        if self.config.penalty == "step":
            return squared_error, l0, l0, fired, error
        assert self.config.target_l0 is not None
        off = batch_mean(l0) / self.config.target_l0 - 1
        return squared_error, off.square(), l0, fired, error

    def _pre_activations(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch num_latents"]:
        x = x.to(self.W_enc.dtype)
        if self.config.subtract_b_dec:
            x = x - self.b_dec
        return nn_functional.linear(x, self.W_enc, self.b_enc)


def jumprelu_terms(
    x: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    width: float,
    subtract_b_dec: bool,
) -> tuple[
    Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, " num_latents"], Float[Tensor, "batch d_in"]
]:
    """Return Σ‖e‖² over the batch, the mean L0, the number of active tokens of each latent, and e.

    The first two are differentiable in the parameters.

    Args:
        parameters: W_enc, b_enc, θ, W_dec, b_dec.
        width: ε.
        subtract_b_dec: encode x − b_dec.
    """
    pairs = _near_pairs(x, parameters, width, subtract_b_dec)
    loss = (
        _ByBlocks(width, subtract_b_dec)
        if pairs is None
        else _ByPairs(pairs, len(x), len(parameters[0]), width, subtract_b_dec)
    )
    return loss(x, *parameters)  # pyright: ignore


def _near_pairs(
    x: Tensor, parameters: tuple[Tensor, ...], width: float, subtract_b_dec: bool
) -> Pairs | None:
    """Return all pairs that are active or near the threshold, and possibly a few others."""
    if not can_use_pairs(x, *parameters):
        return None
    W_enc, b_enc, threshold, _, b_dec = (p.detach() for p in parameters)
    rows = x.detach() - b_dec if subtract_b_dec else x.detach()
    # The margin keeps rounding from losing a pair; `kernels.jump` tests both conditions again.
    floors = threshold - width / 2 - 1e-6 * (threshold + width)
    return kernels.active_pairs(rows, W_enc, b_enc, floors)


class _ByPairs(PairLoss):
    """Loss as sums over the pairs that have a gradient."""

    def __init__(
        self, pairs: Pairs, batch: int, num_latents: int, width: float, subtract_b_dec: bool
    ) -> None:
        super().__init__(pairs, batch, num_latents)
        self.width, self.centred = width, subtract_b_dec

    def forward(self, x: Tensor, *parameters: Tensor) -> Terms:
        W_enc, _, threshold, W_dec, b_dec = parameters
        values, near, fired, near_tokens = kernels.jump(
            self.pre, self.latents, threshold, self.width
        )
        error, inner, squared_error = self.grouped.error(values, x, W_dec, b_dec)
        return Terms(
            (squared_error, fired.sum().to(x.dtype) / len(x)),
            (fired, error),
            (x, W_enc, threshold, b_dec, values, near, near_tokens, error, inner),
        )

    def backward(self, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, ...]:
        x, W_enc, threshold, b_dec, values, near, near_tokens, error, inner = saved
        factor = -2 * float(grads[0])
        grad, into_threshold = kernels.jump_backward(
            inner * factor, values, self.latents, near, self.num_latents
        )
        rows, centre = (x - b_dec, W_enc) if self.centred else (x, None)
        for_W_enc, for_b_enc, for_W_dec, for_b_dec = self.gradients(
            grad, rows, values, error, factor, centre
        )
        through_l0 = float(grads[1]) / len(x) * near_tokens
        for_threshold = -(threshold * into_threshold + through_l0) / self.width
        return for_W_enc, for_b_enc, for_threshold.float(), for_W_dec, for_b_dec


class _ByBlocks(OwnGradient):
    """Loss by products of blocks. `forward` also computes the gradients, which are sums over
    tokens."""

    def __init__(self, width: float, subtract_b_dec: bool) -> None:
        self.width, self.centred = width, subtract_b_dec

    def forward(self, x: Tensor, *parameters: Tensor) -> Terms:
        W_enc, b_enc, threshold, W_dec, b_dec = parameters
        rows = x - b_dec if self.centred else x
        sums = BlockSums(rows, x, W_enc, b_enc, W_dec, b_dec)
        for_threshold, near_tokens = torch.zeros_like(b_enc), torch.zeros_like(b_enc)
        for block in sums.blocks():
            pre = sums.encode(rows[block])
            above = (pre > threshold).to(pre.dtype)
            near = ((pre - threshold).abs_() < self.width / 2).to(pre.dtype)
            sums.fired += above.sum(0)
            near_tokens += near.sum(0)
            through = sums.reconstruct(block, pre.mul_(above))
            for_threshold += near.mul_(through).sum(0)
            through *= above
            sums.add_encoder(block, through)
        for_threshold *= -threshold / self.width
        if self.centred:
            sums.add_centring()
        fired = sums.fired.long()
        grads = sums.for_W_enc, sums.for_bias, for_threshold, sums.for_W_dec, sums.for_b_dec
        return Terms(
            (sums.squared_error, fired.sum().to(x.dtype) / len(x)),
            (fired, sums.errors),
            (*grads, near_tokens.div_(-self.width * len(x))),
        )

    def backward(self, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, ...]:
        *sums, for_l0 = saved
        scaled = [grads[0] * each for each in sums]
        scaled[2] += grads[1] * for_l0
        return tuple(scaled)


class _JumpReLUWithL0(torch.autograd.Function):
    """Function that returns π·H(π − θ) and the mean L0, with the pseudo-derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Float[Tensor, "batch num_latents"],
        threshold: Float[Tensor, " num_latents"],
        width: float,
    ) -> tuple[Tensor, Tensor]:
        above = pre > threshold
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(above, pre, 0.0), above.sum().to(threshold.dtype) / len(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_latents: Tensor, grad_l0: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        grad_pre = torch.where(pre > threshold, grad_latents, 0.0)
        through_f = threshold * torch.where(near, grad_latents, 0.0).sum(0)
        through_l0 = grad_l0 * near.sum(0) / len(pre)
        return grad_pre, -(through_f + through_l0) / ctx.width, None
