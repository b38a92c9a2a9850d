"""Settings of architectures with a number k of active latents (Gao et al. 2024, 2406.04093)."""

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
    """Settings that the k-sparse architectures share.

    Args:
        target_l0: another name for k: k takes its value, and it becomes null.
        aux_alpha: weight of the auxiliary loss; 0 leaves it out.
        k_aux: number of dead latents per token that reconstruct the error; null is D/2 (App. A.2).
        k: active latents per token.
        k_anneal_fraction: k falls linearly from min(D, F) over this first fraction of the steps
            (Llama Scope, 2410.20526, section 3).
        weigh_by_decoder_norm: choose latents by f_j‖d_j‖, with value f_j (Llama Scope). Replaces
            `unit_norm_decoder`: a latent's scale then does not affect the choice.
    """

    version: ClassVar[int] = 2
    dense_products = 1  # the encoder's; the cost of all else follows the active latents

    # Not signed, because k holds its value: `target_l0=8` and `k=8` are the same run.
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
                "{key} needs `unit_norm_decoder=false`: with all norms at 1 it changes nothing",
                "weigh_by_decoder_norm",
            )
        object.__setattr__(self, "target_l0", None)  # either name gives the same configuration

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
        """Return k of a training step, unrounded; the caller rounds k or k·B."""
        steps = self.k_anneal_fraction * step.total
        if step.index >= steps:
            return self.k
        start = max(self.k, min(d_in, self.width(d_in)))
        return start + (self.k - start) * step.index / steps

    @property
    def sparsity(self) -> str:
        return f"k={self.k}"

    def published_lr(self, num_latents: int) -> float:
        """Return 2e-4 / √(F / 2¹⁴), for Adam (Gao et al. 2024, section 2.4, as in sparsify)."""
        return 2e-4 / (num_latents / 2**14) ** 0.5


def choice_weights(sae: SAE) -> Float[Tensor, " num_latents"] | None:
    """Return the weight of each latent in the choice of latents: ‖d_j‖, or None for 1.

    The weights are detached: the choice has no gradient.
    """
    config = sae.config
    assert isinstance(config, KSparseConfig)
    return sae.W_dec.detach().norm(dim=1) if config.weigh_by_decoder_norm else None
