"""ReLU with an L1 penalty (Anthropic, *Circuits Updates*, April 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae.auxk import auxk_term
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.losses import warmed_up
from reseed.sae.relu_loss import ReLUTerms, relu_loss, served


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
        warmup = warmed_up(step.index, step.total, self.config.l1_warmup_fraction)
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
        if served(x, *parameters):
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
