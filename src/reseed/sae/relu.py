"""ReLU with an L1 penalty (Anthropic, *Circuits Updates*, April 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.losses import warmed_up


@dataclass(frozen=True)
class ReLUConfig(SAEConfig, name="relu"):
    """f = ReLU(W_enc x + b_enc), L = ‖e‖² + λ Σ_j f_j‖d_j‖, for inputs with E‖x‖ = √D.

    Args:
        l1_coefficient: λ after the warm-up.
        l1_warmup_fraction: λ rises linearly from 0 over this fraction of the steps.
        l1_weighted_by_decoder_norm: weigh each latent by its decoder row's norm; false is the plain
            L1, which needs `unit_norm_decoder` (else small latents and large rows evade it).
        subtract_b_dec: encode x − b_dec, as before April 2024.
    """

    decoder_init_norm: float = setting(0.1, above=0)
    unit_norm_decoder: bool = setting(False)
    l1_coefficient: float = setting(5.0, at_least=0)
    l1_warmup_fraction: float = setting(0.05, at_least=0, at_most=1)
    l1_weighted_by_decoder_norm: bool = setting(True)
    subtract_b_dec: bool = setting(False)

    @property
    def sparsity(self) -> str:
        return f"λ={self.l1_coefficient:g}"

    def published_lr(self, num_latents: int) -> float:
        """5e-5 at every width."""
        return 5e-5

    def empty(self, d_in: int) -> ReLU:
        return ReLU(self, d_in)


@final
class ReLU(SAE):
    """A ReLU sparse autoencoder."""

    config: ReLUConfig

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        x = x.to(self.W_enc.dtype)
        if self.config.subtract_b_dec:
            x = x - self.b_dec
        return nn_functional.linear(x, self.W_enc, self.b_enc).relu()

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """Sums over D (and F), means over B. ``dead`` plays no part."""
        x = x.to(self.W_enc.dtype)
        latents = self.encode(x)
        error = x - self.decode(latents)
        squared_error = error.square().sum()
        mse = squared_error / len(x)
        weights = latents.mean(0)
        if self.config.l1_weighted_by_decoder_norm:
            weights = weights * self.W_dec.norm(dim=1)
        l1 = weights.sum()
        warmup = warmed_up(step.index, step.total, self.config.l1_warmup_fraction)
        with torch.no_grad():
            # Exact below 2²⁴ tokens, and three times as fast as a sum of booleans.
            fired = latents.sign().sum(0).long()
        return Loss(
            total=mse + self.config.l1_coefficient * warmup * l1,
            parts={"mse": mse.detach(), "l1": l1.detach()},
            fired=fired,
            squared_error=squared_error.detach(),
            l0=fired.sum() / len(x),
        )
