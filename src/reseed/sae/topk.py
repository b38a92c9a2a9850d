"""TopK with AuxK (Gao et al. 2024, *Scaling and evaluating sparse autoencoders*, 2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Bool, Float
from torch import Tensor

from reseed.config import ConfigError, setting
from reseed.sae.base import SAE, Loss, SAEConfig, SAEOutput, Step
from reseed.sae.losses import fvu, ratio_or_zero, total_variance
from reseed.sae.sparse import SparseLatents, sparse_decode, topk_encode


@dataclass(frozen=True)
class TopKConfig(SAEConfig, name="topk"):
    """f = TopK_k(ReLU(W_enc (x − b_dec) + b_enc)).

    Args:
        k: active latents per token.
        aux_alpha: weight of the auxiliary loss; 0 leaves it out.
        k_aux: how many dead latents per token reconstruct the error; null is D/2 (App. A.2).
        multi_topk: add FVU at 4k, divided by 8 (section 4.2, as sparsify weights it).
    """

    dense_products = 1  # the encoder's; all else follows the active latents

    k: int = setting(32, at_least=1)
    aux_alpha: float = setting(1 / 32, at_least=0)
    k_aux: int | None = setting(None, at_least=1)
    multi_topk: bool = setting(False)

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

    def empty(self, d_in: int) -> TopK:
        return TopK(self, d_in)


@final
class TopK(SAE):
    """A TopK sparse autoencoder."""

    config: TopKConfig

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        return self._encode(x).dense().reshape(*x.shape[:-1], self.num_latents)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SAEOutput:
        # By the sparse decoder: equal to `decode(encode(x))` up to rounding, and many times faster.
        latents = self._encode(x)
        reconstruction = sparse_decode(latents, self.W_dec) + self.b_dec
        return SAEOutput(
            latents.dense().reshape(*x.shape[:-1], self.num_latents),
            reconstruction.reshape(x.shape),
        )

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """FVU + α·AuxK [+ FVU(4k)/8], the first normalised by the batch's total variance.

        A batch without variance (a single token) has no finite loss.
        """
        x = x.to(self.W_enc.dtype)
        variance = total_variance(x)
        latents, more = self._encode_for_loss(x)
        error = x - (sparse_decode(latents, self.W_dec) + self.b_dec)
        squared_error = error.square().sum()
        parts = {"fvu": fvu(squared_error, variance)}
        total = parts["fvu"]
        if more is not None:
            error_more = x - (sparse_decode(more, self.W_dec) + self.b_dec)
            parts["multi_topk"] = fvu(error_more.square().sum(), variance)
            total = total + parts["multi_topk"] / 8
        if self.config.aux_alpha > 0:
            parts["aux"] = self._aux_loss(x, error.detach(), dead)
            total = total + self.config.aux_alpha * parts["aux"]
        fired = latents.fired()
        return Loss(
            total=total,
            parts={name: part.detach() for name, part in parts.items()},
            fired=fired,
            squared_error=squared_error.detach(),
            l0=fired.sum() / len(x),
        )

    def _encode(self, x: Float[Tensor, "*batch d_in"]) -> SparseLatents:
        rows = x.to(self.W_enc.dtype).reshape(-1, self.d_in)
        return topk_encode(rows, self.W_enc, self.b_enc, self.config.k, b_dec=self.b_dec)

    def _encode_for_loss(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[SparseLatents, SparseLatents | None]:
        """The k largest, and for Multi-TopK the 4k largest, from one pass of the encoder."""
        if not self.config.multi_topk:
            return self._encode(x), None
        k = min(4 * self.config.k, self.num_latents)
        more = topk_encode(x, self.W_enc, self.b_enc, k, b_dec=self.b_dec, descending=True)
        return more.first(self.config.k), more

    def _aux_loss(
        self,
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_in"],
        dead: Bool[Tensor, " num_latents"],
    ) -> Float[Tensor, ""]:
        """‖ê − e‖² over the variance of e, with ê from the largest k_aux *dead* latents (App. A.2).

        The error is a constant here: only dead rows (of encoder and decoder) are moved to fit it.
        """
        candidates = dead.nonzero().squeeze(1)
        if len(candidates) == 0:
            return error.new_zeros(())
        k_aux = self.config.k_aux or max(1, self.d_in // 2)
        latents = topk_encode(
            x,
            self.W_enc,
            self.b_enc,
            min(k_aux, len(candidates)),
            b_dec=self.b_dec.detach(),
            among=candidates,
        )
        miss = (sparse_decode(latents, self.W_dec) - error).square().sum()
        scale = min(len(candidates) / k_aux, 1.0)
        return scale * ratio_or_zero(miss, total_variance(error))
