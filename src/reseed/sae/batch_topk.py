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
from reseed.distributed.process_group import min_over_batch
from reseed.sae.base import SAE, Loss, Step
from reseed.sae.losses import auxk_loss, fvu, variance_or_nan
from reseed.sae.pairs import SparseLatents
from reseed.sae.selection import select_in_batch
from reseed.sae.sparse import batch_topk_encode, sparse_error, weighted_encoder
from reseed.sae.topk import KSparseConfig, choice_weights


@dataclass(frozen=True)
class BatchTopKConfig(KSparseConfig, name="batch_topk"):
    """f = the k·B largest of ReLU(W_enc (x − b_dec) + b_enc) in a training batch; after training,
    those above θ.

    Args:
        k: active latents per token, on average; may be a fraction: k·B is rounded.
        threshold_rate: in each batch θ moves by this fraction of its distance to the batch's
            smallest chosen activation.
        threshold_window: if above 0, θ is a mean over about this fraction of the steps so far, and
            never over more than 1/`threshold_rate` steps: the rate of step t is at least
            1/(1 + window·t). Without it, the far larger activations of the first batches keep θ too
            high, and L0 below k, in a run of a few hundred steps.
    """

    threshold_rate: float = setting(0.01, above=0, at_most=1)
    threshold_window: float = setting(0.0, at_least=0, at_most=1, neutral=0.0)

    def threshold_rate_at(self, step: Step, d_in: int) -> float:
        """Return the fraction of the distance by which θ moves at a training step."""
        if self.k_at(step, d_in) != self.k:
            return 1.0  # while k falls, θ of earlier steps is for another k
        if self.threshold_window == 0:
            return self.threshold_rate
        return max(self.threshold_rate, 1 / (1 + self.threshold_window * step.index))

    def empty(self, d_in: int) -> BatchTopK:
        return BatchTopK(self, d_in)


class BatchSparseSAE(SAE):
    """Base of SAEs that choose latents within the batch in training, and by a threshold after it.

    Attributes:
        threshold: θ, the running mean of the smallest chosen activation; 0 before the first batch.
            With `weigh_by_decoder_norm`, that of the smallest chosen f_j‖d_j‖.
    """

    homogeneous: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec", "threshold")

    config: BatchTopKConfig
    threshold: Float[Tensor, ""]

    def __init__(self, config: BatchTopKConfig, d_in: int) -> None:
        super().__init__(config, d_in)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        """Return f = π·1[π > θ] (or π·1[π‖d‖ > θ]), token by token."""
        x = x.to(self.W_enc.dtype) - self.b_dec
        pre = nn_functional.linear(x, self.W_enc, self.b_enc)
        weights = choice_weights(self)
        if weights is not None:
            return torch.where(pre * weights > self.threshold, pre, 0.0)
        return nn_functional.threshold(pre, float(self.threshold), 0.0)

    @abstractmethod
    def _reconstruction_loss(
        self,
        x: Float[Tensor, "batch d_in"],
        latents: SparseLatents,
        variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_in"], Mapping[str, Tensor]]:
        """Return the loss of reconstructing x, the error e of the whole SAE, and named terms."""

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """Return the reconstruction loss + α·AuxK, normalised like TopK's, and update θ."""
        x = x.to(self.W_enc.dtype)
        k, weights = self.config.k_at(step, self.d_in), choice_weights(self)
        latents = batch_topk_encode(x, self.W_enc, self.b_enc, k, b_dec=self.b_dec, weights=weights)
        kept = latents.values.detach()
        if weights is not None:
            kept = kept * weights[latents.indices]
        self._update_threshold(kept, self.config.threshold_rate_at(step, self.d_in))
        total, error, parts = self._reconstruction_loss(x, latents, variance_or_nan(x))
        if self.config.aux_alpha > 0:
            aux = auxk_loss(self, x, error.detach(), dead, weights=weights)
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
    def initialise_threshold(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set θ to the (k·B + 1)-th largest activation of ``x``, so that k·B are above it. Keep θ
        if it is set already."""
        if self.threshold > 0:
            return
        x, weights = x.to(self.W_enc.device, self.W_enc.dtype) - self.b_dec, choice_weights(self)
        encoder = weighted_encoder(self.W_enc, self.b_enc, weights)
        wanted = max(1, round(self.config.k * len(x)))
        largest, _, _ = select_in_batch(x, *encoder, (wanted + 1) / len(x))
        if len(largest) > wanted:  # else no more than k·B are positive: all of them are active
            self.threshold.copy_(largest.amin())

    @torch.no_grad()
    def _update_threshold(self, kept: Float[Tensor, " pairs"], rate: float) -> None:
        """Move θ towards the smallest chosen activation; at the first batch, set it to that."""
        smallest = min_over_batch(kept)
        moved = torch.lerp(self.threshold, smallest, rate)
        moved = torch.where(self.threshold > 0, moved, smallest)
        self.threshold.copy_(torch.where(smallest == torch.inf, self.threshold, moved))


@final
class BatchTopK(BatchSparseSAE):
    """A BatchTopK sparse autoencoder."""

    def _reconstruction_loss(
        self,
        x: Float[Tensor, "batch d_in"],
        latents: SparseLatents,
        variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_in"], Mapping[str, Tensor]]:
        squared_error, error = sparse_error(x, latents, self.W_dec, self.b_dec)
        loss = fvu(squared_error, variance)
        return loss, error, {"fvu": loss}
