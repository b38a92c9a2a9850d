"""Gated SAE (Rajamanoharan et al. 2024, *Improving Dictionary Learning with …*, 2404.16014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae.auxk import auxk_term
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.gated_loss import gated_loss
from reseed.sae.losses import warmed_up


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
        warmup = warmed_up(step.index, step.total, self.config.l1_warmup_fraction)
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
