"""What architectures that keep a number k of latents share (Gao et al. 2024, 2406.04093)."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from reseed.config import ConfigError, setting
from reseed.sae.base import SAE, SAEConfig, Step


@dataclass(frozen=True)
class KSparseConfig(SAEConfig, ABC):
    """The options of these architectures.

    Args:
        target_l0: another name for k, which takes its value; null afterwards.
        aux_alpha: weight of the auxiliary loss; 0 leaves it out.
        k_aux: how many dead latents per token reconstruct the error; null is D/2 (App. A.2).
        k: active latents per token.
        k_anneal_fraction: over this first fraction of the steps k falls linearly from min(D, F)
            (Llama Scope, 2410.20526, section 3).
        weigh_by_decoder_norm: choose latents by f_j‖d_j‖ and keep f_j (Llama Scope): of use
            instead of `unit_norm_decoder`, as a latent's scale is then no reason to choose it.
    """

    version: ClassVar[int] = 2
    dense_products = 1  # the encoder's; all else follows the active latents

    # k says it all. Not signed: runs of the time when it was kept are those by the name of k.
    target_l0: float | None = setting(None, above=0, signed=False)
    aux_alpha: float = setting(1 / 32, at_least=0)
    k_aux: int | None = setting(None, at_least=1)
    k: float = setting(32, above=0)
    k_anneal_fraction: float = setting(0.0, at_least=0, below=1, neutral=0.0)
    weigh_by_decoder_norm: bool = setting(False, neutral=False)

    def validate(self) -> None:
        super().validate()
        if isinstance(self.k, float) and self.k.is_integer():
            object.__setattr__(self, "k", int(self.k))  # 8 and 8.0 are one run
        if self.num_latents is not None:
            self._check_k(self.num_latents)
        if self.weigh_by_decoder_norm and self.unit_norm_decoder:
            raise ConfigError(
                "{key} needs `unit_norm_decoder=false`: where all norms are 1 it changes nothing",
                "weigh_by_decoder_norm",
            )
        object.__setattr__(self, "target_l0", None)  # by either name one configuration

    def _heed_target(self, target: float) -> None:
        object.__setattr__(self, "k", target)

    def check(self, d_in: int) -> None:
        self._check_k(self.width(d_in))

    def _check_k(self, num_latents: int) -> None:
        if self.k > num_latents:
            raise ConfigError(
                f"{{key}} (={self.k}) must not exceed `num_latents` (={num_latents})",
                "k" if self.target_l0 is None else "target_l0",
            )

    def k_at(self, step: Step, d_in: int) -> float:
        """k of a training step; whole numbers and batches are made of it where it is used."""
        steps = self.k_anneal_fraction * step.total
        if step.index >= steps:
            return self.k
        start = max(self.k, min(d_in, self.width(d_in)))
        return start + (self.k - start) * step.index / steps

    @property
    def sparsity(self) -> str:
        return f"k={self.k}"

    def published_lr(self, num_latents: int) -> float:
        """2e-4 / √(F / 2¹⁴) for Adam (Gao et al. 2024, section 2.4, as sparsify has it)."""
        return 2e-4 / (num_latents / 2**14) ** 0.5


def choice_weights(sae: SAE) -> Float[Tensor, " num_latents"] | None:
    """What each latent is multiplied by when latents are chosen: ‖d_j‖, or None for 1.

    A constant to autograd: the choice has no gradient.
    """
    config = sae.config
    assert isinstance(config, KSparseConfig)
    return sae.W_dec.detach().norm(dim=1) if config.weigh_by_decoder_norm else None
