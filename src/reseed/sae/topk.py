"""TopK with AuxK (Gao et al. 2024, *Scaling and evaluating sparse autoencoders*, 2406.04093).

`KSparseConfig` holds the settings that BatchTopK and Matryoshka share with it.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Bool, Float
from torch import Tensor

from reseed.config import setting
from reseed.errors import ConfigError
from reseed.sae.base import SAE, Loss, SAEConfig, SAEOutput, Step
from reseed.sae.losses import auxk_loss, fvu, variance_or_nan
from reseed.sae.pairs import SparseLatents
from reseed.sae.sparse import group_max_encode, sparse_decode, sparse_error, topk_encode


@dataclass(frozen=True)
class KSparseConfig(SAEConfig, ABC):
    """Settings of architectures with k active latents per token.

    Args:
        target_l0: another name for k: its value is moved to k, and it becomes null.
        k: number of active latents per token.
        k_anneal_fraction: k falls linearly from min(D, F) over this first fraction of the steps
            (Llama Scope, 2410.20526, section 3).
        weigh_by_decoder_norm: choose latents by f_j‖d_j‖, with value f_j (Llama Scope). Replaces
            `unit_norm_decoder`: a latent's scale then does not affect the choice.
    """

    version: ClassVar[int] = 2
    dense_products = 1  # the encoder's; the other costs are proportional to the active latents

    # Not in the signature, because k holds its value: `target_l0=8` and `k=8` give the same run.
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
                "{key} needs `unit_norm_decoder=false`: it has no effect if all norms are 1",
                "weigh_by_decoder_norm",
            )
        object.__setattr__(self, "target_l0", None)  # either name gives the same configuration

    def _apply_target(self, target: float) -> None:
        object.__setattr__(self, "k", target)

    def check_d_in(self, d_in: int) -> None:
        self._check_k(self.width(d_in))

    def _check_k(self, num_latents: int) -> None:
        if self.k > num_latents:
            raise ConfigError(
                f"{{key}} (={self.k}) must not exceed `num_latents` (={num_latents})",
                "k" if self.target_l0 is None else "target_l0",
            )

    def k_at(self, step: Step, d_in: int) -> float:
        """Return k at a training step, unrounded; the caller rounds k or k·B."""
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
    """Return the weights by which latents are chosen: ‖d_j‖, or None if all are 1.

    The weights are detached: the choice has no gradient.
    """
    config = sae.config
    assert isinstance(config, KSparseConfig)
    return sae.W_dec.detach().norm(dim=1) if config.weigh_by_decoder_norm else None


@dataclass(frozen=True)
class TopKConfig(KSparseConfig, name="topk"):
    """f = TopK_k(ReLU(W_enc (x − b_dec) + b_enc)).

    Args:
        multi_topk: add FVU at 4k, divided by 8 (section 4.2, as sparsify weights it).
        activation: ``topk``, or ``groupmax``: the latents form k consecutive groups of the same
            size, and the largest of each group is active (as in sparsify).
    """

    k: int = setting(32, at_least=1)
    multi_topk: bool = setting(False)
    activation: str = setting("topk", choices=("topk", "groupmax"), neutral="topk")

    def validate(self) -> None:
        super().validate()
        if self.activation != "groupmax":
            return
        for name in ("multi_topk", "weigh_by_decoder_norm", "k_anneal_fraction"):
            if getattr(self, name):
                raise ConfigError(
                    f"{{key}} applies only to `activation=topk`; got {getattr(self, name)}", name
                )

    def _check_k(self, num_latents: int) -> None:
        super()._check_k(num_latents)
        if self.activation == "groupmax" and num_latents % self.k:
            raise ConfigError(
                f"{{key}} (={self.k}) must divide `num_latents` (={num_latents}) with "
                "`activation=groupmax`",
                "k",
            )

    def _apply_target(self, target: float) -> None:
        if not target.is_integer():
            raise ConfigError(
                f"{{key}} sets `k` in sae={self.name} and must be a whole number; got {target:g}",
                "target_l0",
            )
        super()._apply_target(target)

    def empty(self, d_in: int) -> TopK:
        return TopK(self, d_in)


@final
class TopK(SAE):
    """A TopK sparse autoencoder."""

    config: TopKConfig

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        return self._encode(x).dense().reshape(*x.shape[:-1], self.num_latents)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        return self._encode(x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SAEOutput:
        # The sparse decoder equals `decode(encode(x))` up to rounding, and reads active rows only.
        latents = self._encode(x)
        reconstruction = sparse_decode(latents, self.W_dec) + self.b_dec
        return SAEOutput(
            latents.dense().reshape(*x.shape[:-1], self.num_latents),
            reconstruction.reshape(x.shape),
        )

    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """Return FVU + α·AuxK [+ FVU(4k)/8], with FVU relative to the batch's total variance.

        The loss is NaN for a batch without variance: a single token, or tokens that are all equal
        up to rounding.
        """
        x = x.to(self.W_enc.dtype)
        variance = variance_or_nan(x)
        latents, more = self._encode_for_loss(x, round(self.config.k_at(step, self.d_in)))
        squared_error, error = sparse_error(x, latents, self.W_dec, self.b_dec)
        parts = {"fvu": fvu(squared_error, variance)}
        total = parts["fvu"]
        if more is not None:
            squared_error_more, _ = sparse_error(x, more, self.W_dec, self.b_dec)
            parts["multi_topk"] = fvu(squared_error_more, variance)
            total = total + parts["multi_topk"] / 8
        if self.config.aux_alpha > 0:
            weights = choice_weights(self)
            parts["aux"] = auxk_loss(self, x, error, dead, weights=weights)
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
        return self._largest(x.to(self.W_enc.dtype).reshape(-1, self.d_in), self.config.k)

    def _encode_for_loss(
        self, x: Float[Tensor, "batch d_in"], k: int
    ) -> tuple[SparseLatents, SparseLatents | None]:
        """Return the k largest latents, and for Multi-TopK also the 4k largest, from one pass of
        the encoder."""
        if not self.config.multi_topk:
            return self._largest(x, k), None
        more = self._largest(x, min(4 * k, self.num_latents), descending=True)
        return more.first(k), more

    def _largest(
        self, rows: Float[Tensor, "batch d_in"], k: int, descending: bool = False
    ) -> SparseLatents:
        if self.config.activation == "groupmax":
            return group_max_encode(rows, self.W_enc, self.b_enc, k, b_dec=self.b_dec)
        return topk_encode(
            rows,
            self.W_enc,
            self.b_enc,
            k,
            b_dec=self.b_dec,
            weights=choice_weights(self),
            descending=descending,
        )
