"""What architectures that keep a number k of latents share (Gao et al. 2024, 2406.04093)."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from reseed.config import ConfigError, setting
from reseed.sae.base import SAE, SAEConfig
from reseed.sae.losses import ratio_or_zero, total_variance
from reseed.sae.sparse import sparse_decode, topk_encode


@dataclass(frozen=True)
class KSparseConfig(SAEConfig, ABC):
    """The options of these architectures.

    Args:
        k: active latents per token.
        aux_alpha: weight of the auxiliary loss; 0 leaves it out.
        k_aux: how many dead latents per token reconstruct the error; null is D/2 (App. A.2).
    """

    dense_products = 1  # the encoder's; all else follows the active latents

    k: int = setting(32, at_least=1)
    aux_alpha: float = setting(1 / 32, at_least=0)
    k_aux: int | None = setting(None, at_least=1)

    def validate(self) -> None:
        super().validate()
        if self.num_latents is not None:
            self._check_k(self.num_latents)

    def check(self, d_in: int) -> None:
        self._check_k(self.width(d_in))

    def _check_k(self, num_latents: int) -> None:
        if self.k > num_latents:
            raise ConfigError(
                f"{{key}} (={self.k}) must not exceed `num_latents` (={num_latents})", "k"
            )

    @property
    def sparsity(self) -> str:
        return f"k={self.k}"

    def published_lr(self, num_latents: int) -> float:
        """2e-4 / √(F / 2¹⁴) for Adam (Gao et al. 2024, section 2.4, as sparsify has it)."""
        return 2e-4 / (num_latents / 2**14) ** 0.5


def auxk_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " num_latents"],
    k_aux: int | None,
) -> Float[Tensor, ""]:
    """‖ê − e‖² over the variance of e, with ê from the largest k_aux *dead* latents (App. A.2).

    The error is a constant here: only dead rows (of encoder and decoder) are moved to fit it.

    Args:
        k_aux: as in `KSparseConfig`.
    """
    candidates = dead.nonzero().squeeze(1)
    if len(candidates) == 0:
        return error.new_zeros(())
    k_aux = k_aux or max(1, sae.d_in // 2)
    latents = topk_encode(
        x,
        sae.W_enc,
        sae.b_enc,
        min(k_aux, len(candidates)),
        b_dec=sae.b_dec.detach(),
        among=candidates,
    )
    miss = (sparse_decode(latents, sae.W_dec) - error).square().sum()
    scale = min(len(candidates) / k_aux, 1.0)
    return scale * ratio_or_zero(miss, total_variance(error))
