"""BatchTopK (Bussmann, Leask & Nanda 2024, *BatchTopK Sparse Autoencoders*, 2412.06410)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as nn_functional

from reseed.config import setting
from reseed.sae.auxk import KSparseConfig, auxk_loss
from reseed.sae.base import SAE, Loss, Step
from reseed.sae.losses import fvu, total_variance
from reseed.sae.sparse import SparseLatents, batch_topk_encode, sparse_decode


@dataclass(frozen=True)
class BatchTopKConfig(KSparseConfig, name="batch_topk"):
    """f = the k·B largest of ReLU(W_enc (x − b_dec) + b_enc) in a batch; later, those above θ.

    Args:
        k: active latents per token, on average.
        threshold_rate: θ moves by this share of the way to each batch's smallest kept activation.
    """

    threshold_rate: float = setting(0.01, above=0, at_most=1)

    def empty(self, d_in: int) -> BatchTopK:
        return BatchTopK(self, d_in)


class BatchSparse(SAE):
    """What chooses within the batch in training, and by a threshold after it.

    Attributes:
        threshold: θ, the running mean of the smallest kept activation; 0 before the first batch.
    """

    homogeneous: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec", "threshold")

    config: BatchTopKConfig
    threshold: Float[Tensor, ""]

    def __init__(self, config: BatchTopKConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        """f = π·1[π > θ], whatever else is in the batch."""
        x = x.to(self.W_enc.dtype) - self.b_dec
        pre = nn_functional.linear(x, self.W_enc, self.b_enc)
        return nn_functional.threshold(pre, float(self.threshold), 0.0)

    @abstractmethod
    def _fit(
        self,
        x: Float[Tensor, "batch d_in"],
        latents: SparseLatents,
        variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_in"], Mapping[str, Tensor]]:
        """The loss of reconstructing x, the error e of the whole SAE, and named terms."""

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """The loss of reconstruction + α·AuxK, normalised like TopK's. Moves θ."""
        x = x.to(self.W_enc.dtype)
        latents = batch_topk_encode(x, self.W_enc, self.b_enc, self.config.k, b_dec=self.b_dec)
        self._follow(latents.values.detach())
        total, error, parts = self._fit(x, latents, total_variance(x))
        if self.config.aux_alpha > 0:
            aux = auxk_loss(self, x, error.detach(), dead, self.config.k_aux)
            total, parts = total + self.config.aux_alpha * aux, {**parts, "aux": aux}
        fired = latents.fired()
        return Loss(
            total=total,
            parts={name: part.detach() for name, part in parts.items()},
            fired=fired,
            squared_error=error.detach().square().sum(),
            l0=fired.sum() / len(x),
        )

    @torch.no_grad()
    def _follow(self, kept: Float[Tensor, " pairs"]) -> None:
        """θ towards the smallest kept activation; at the first batch, all the way."""
        if len(kept):
            smallest = kept.min()
            moved = torch.lerp(self.threshold, smallest, self.config.threshold_rate)
            self.threshold.copy_(torch.where(self.threshold > 0, moved, smallest))


@final
class BatchTopK(BatchSparse):
    """A BatchTopK sparse autoencoder."""

    def _fit(
        self,
        x: Float[Tensor, "batch d_in"],
        latents: SparseLatents,
        variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_in"], Mapping[str, Tensor]]:
        error = x - (sparse_decode(latents, self.W_dec) + self.b_dec)
        loss = fvu(error.square().sum(), variance)
        return loss, error, {"fvu": loss}
