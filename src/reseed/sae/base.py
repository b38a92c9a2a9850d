"""Base classes of sparse autoencoders.

The module has, in this order, the results of `SAE.forward` and of a training loss; `SAEConfig`,
whose `build` makes the initial weights; and `SAE`, with its parameters, encode, decode and loss.

Letters of this package: B batch (tokens), D ``d_in``, F ``num_latents``; x activations, π
pre-activations, f latents, x̂ reconstruction, e = x − x̂. ``W_enc`` and ``W_dec`` are both [F, D]: a
row per latent.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from reseed.config import Config, setting
from reseed.errors import ConfigError
from reseed.sae.pairs import PairsByLatent, SparseLatents

DENSE_BYTES = 1 << 27
"""Maximum number of bytes of dense latents that `SAE.encode_sparse` holds at once."""


@dataclass(frozen=True)
class SAEOutput:
    """Latents and reconstruction, as `SAE.forward` returns them."""

    latents: Float[Tensor, "*batch num_latents"]
    reconstruction: Float[Tensor, "*batch d_in"]


@dataclass(frozen=True)
class Step:
    """A position in training: ``index`` counts optimiser steps from 0 up to ``total`` − 1."""

    index: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.total:
            raise ValueError(f"`index` (={self.index}) must be in [0, total) (total={self.total})")


@dataclass(frozen=True)
class Loss:
    """Loss of one batch and its parts.

    Attributes:
        total: the scalar to differentiate.
        parts: its named terms, detached.
        fired: number of tokens of the batch on which each latent is active (int64).
        squared_error: Σ‖e‖² over the batch, detached; FVU needs sums over batches, not means.
        l0: active latents per token, mean over the batch, detached.
    """

    total: Float[Tensor, ""]
    parts: Mapping[str, Tensor]
    fired: Int[Tensor, " num_latents"]
    squared_error: Float[Tensor, ""]
    l0: Float[Tensor, ""]


@dataclass(frozen=True)
class SAEOption(Config, ABC, family="sae"):
    """A choice of ``sae=``: an architecture to train (`SAEConfig`), or an SAE that exists already
    (`reseed.sae.pretrained`)."""


@dataclass(frozen=True)
class SAEConfig(SAEOption, ABC):
    """Settings that all architectures share.

    Args:
        num_latents: number of latents, F.
        expansion_factor: F as a multiple of D; ignored (and set to null) if `num_latents` is given.
        decoder_init_norm: initial norm of every decoder row.
        encoder_init_scale: initial norm of the encoder's rows over that of the decoder's.
        encoder_init: ``tied``: the encoder starts as the transpose of the decoder (scaled);
            ``untied``: it starts in random directions of its own.
        unit_norm_decoder: whether the optimiser keeps decoder rows at norm 1.
        target_l0: the L0 to reach, if the architecture supports it: k, the target of a penalty, or
            the L0 for which the weight of a penalty is searched (`needs_calibration`).
        aux_alpha: weight of the auxiliary loss of dead latents (`reseed.sae.losses`), in units of
            the variance of the inputs; 0 leaves this loss out.
        k_aux: number of dead latents per token that reconstruct the error; null is D/2.
        aux_scale: ``dead_fraction``: the auxiliary loss is multiplied by min(dead latents / k_aux,
            1), as in sparsify; ``none``: it is not, as in Gao et al. 2024.
        aux_denominator: ``residual``: the auxiliary loss is relative to the variance of the error
            that the dead latents reconstruct (Gao et al. 2024); ``input``: to that of the inputs,
            as in sparsify, so that it becomes smaller while the SAE improves.
    """

    dense_products: ClassVar[int] = 5
    """Number of batch × num_latents × d_in products in a step, for estimates of time: encoder,
    decoder and their gradients."""
    penalty_field: ClassVar[str | None] = None
    """Name of the field that weighs the sparsity penalty; None without a penalty."""

    num_latents: int | None = setting(None, at_least=1)
    expansion_factor: int | None = setting(None, at_least=1)
    decoder_init_norm: float = setting(1.0, above=0)
    encoder_init_scale: float = setting(1.0, at_least=0)
    encoder_init: str = setting("tied", choices=("tied", "untied"), neutral="tied")
    unit_norm_decoder: bool = setting(True)
    target_l0: float | None = setting(None, above=0, neutral=None)
    aux_alpha: float = setting(0.0, at_least=0, neutral=0.0)
    k_aux: int | None = setting(None, at_least=1, neutral=None)
    aux_scale: str = setting(
        "dead_fraction", choices=("dead_fraction", "none"), neutral="dead_fraction"
    )
    aux_denominator: str = setting("residual", choices=("residual", "input"), neutral="residual")

    def validate(self) -> None:
        if self.num_latents is None and self.expansion_factor is None:
            raise ConfigError(
                "{key} or `expansion_factor` must be given; both are null", "num_latents"
            )
        if self.num_latents is not None:
            object.__setattr__(self, "expansion_factor", None)
        if self.unit_norm_decoder and self.decoder_init_norm != 1:
            raise ConfigError(
                "{key} must be 1 with `unit_norm_decoder=true`; got "
                f"{self.decoder_init_norm}. Change one of the two.",
                "decoder_init_norm",
            )
        if self.target_l0 is not None:
            self._apply_target(self.target_l0)
            self._check_initial_weight()

    def _apply_target(self, target: float) -> None:
        """Apply `target_l0` where it sets another field; raise `ConfigError` if nothing uses it."""
        if self.penalty_field is None:
            raise ConfigError(f"{{key}} must be null: sae={self.name} does not use it", "target_l0")

    def width(self, d_in: int) -> int:
        """Return F for activations of width ``d_in``."""
        if self.num_latents is not None:
            return self.num_latents
        assert self.expansion_factor is not None
        return self.expansion_factor * d_in

    def check_d_in(self, d_in: int) -> None:
        """Raise `ConfigError` if a rule that needs the width of the activations is broken."""
        width = self.width(d_in)
        if self.target_l0 is not None and self.target_l0 > width:
            raise ConfigError(
                f"{{key}} (={self.target_l0:g}) must not exceed `num_latents` (={width})",
                "target_l0",
            )

    @property
    @abstractmethod
    def sparsity(self) -> str:
        """Label of the sparsity for tables: ``k=32``, ``λ=5``, ``L0*=32``."""

    def _check_initial_weight(self) -> None:
        """Raise `ConfigError` for a weight of 0: the search runs on a logarithmic scale."""
        if self.needs_calibration and getattr(self, self.penalty_field or "") == 0:
            raise ConfigError(
                "{key} must be above 0 with `target_l0`: the search starts at this weight; got 0",
                self.penalty_field or "",
            )

    @property
    def needs_calibration(self) -> bool:
        """True if the weight of the penalty must be searched such that L0 is `target_l0`."""
        return self.target_l0 is not None and self.penalty_field is not None

    def calibrated(self, coefficient: float) -> Self:
        """Return a copy with the penalty weight that the search found. `target_l0` stays, to record
        what the search aimed at.

        Raises:
            ValueError: the architecture has no penalty.
        """
        if self.penalty_field is None:
            raise ValueError(f"sae={self.name} has no penalty to weigh")
        return dataclasses.replace(self, **{self.penalty_field: coefficient})

    def _penalised_sparsity(self) -> str:
        """Return `sparsity` of an architecture with a penalty."""
        assert self.penalty_field is not None
        if self.target_l0 is not None:
            return f"L0*={self.target_l0:g}"
        return f"λ={getattr(self, self.penalty_field):g}"

    @abstractmethod
    def published_lr(self, num_latents: int) -> float:
        """Return the learning rate of the published recipe."""

    @abstractmethod
    def empty(self, d_in: int) -> SAE:
        """Return the module with all parameters zero, for `build` and the checkpoint to fill."""

    def build(self, d_in: int, generator: Generator) -> SAE:
        """Make a new SAE in float32 on the CPU; ``generator`` alone decides its weights."""
        self.check_d_in(d_in)
        sae = self.empty(d_in)
        directions = random_directions(self.width(d_in), d_in, generator)
        with torch.no_grad():
            sae.W_dec.copy_(directions * self.decoder_init_norm)
            if self.encoder_init == "untied":
                # Sampled after the decoder's rows, so that these do not depend on `encoder_init`.
                directions = random_directions(self.width(d_in), d_in, generator)
                sae.W_enc.copy_(directions * self.decoder_init_norm * self.encoder_init_scale)
            else:
                sae.W_enc.copy_(sae.W_dec * self.encoder_init_scale)
        return sae


def random_directions(
    num_latents: int, d_in: int, generator: Generator
) -> Float[Tensor, "num_latents d_in"]:
    """Sample rows of norm 1, uniform on the sphere, in float32 on the CPU.

    The CPU's generator gives the same numbers for every device on which the SAE is trained.

    Raises:
        ValueError: the generator is not on the CPU.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"`generator` must be a CPU generator, got one on {generator.device}")
    rows = torch.randn(num_latents, d_in, generator=generator, dtype=torch.float32)
    # Normalise in float64, so that the norms are right to the last bit of float32.
    return (rows.double() / rows.double().norm(dim=1, keepdim=True)).float()


class SAE(nn.Module, ABC):
    """A sparse autoencoder. Subclasses are final.

    Attributes:
        homogeneous: names of the parameters and buffers in units of the activations, which
            `folded` rescales.
        logarithmic: names of the parameters and buffers that hold the logarithm of such a number.
        penalty_weight: λ, if the architecture has a penalty (`SAEConfig.penalty_field`); may be
            set between steps.
        origin: ``model``, ``layer`` and ``hookpoint`` of the activations that a loaded SAE was
            trained on, as far as its files tell.
    """

    homogeneous: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    logarithmic: ClassVar[tuple[str, ...]] = ()

    penalty_weight: float
    W_enc: Float[nn.Parameter, "num_latents d_in"]
    b_enc: Float[nn.Parameter, " num_latents"]
    W_dec: Float[nn.Parameter, "num_latents d_in"]
    b_dec: Float[nn.Parameter, " d_in"]

    def __init_subclass__(cls, **given: Any) -> None:
        """Let the methods that take activations refuse those of another width."""
        super().__init_subclass__(**given)
        for name in ("encode", "encode_sparse", "forward"):
            if name in cls.__dict__:
                setattr(cls, name, _of_width(cls.__dict__[name]))

    def __init__(self, config: SAEConfig, d_in: int) -> None:
        super().__init__()
        self.origin: dict[str, Any] = {}
        self.config = config
        self.d_in = d_in
        self.num_latents = config.width(d_in)
        self.W_enc = nn.Parameter(torch.zeros(self.num_latents, d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.num_latents))
        self.W_dec = nn.Parameter(torch.zeros(self.num_latents, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch num_latents"]:
        """Return the latents f, dense. Activations are cast to the parameters' dtype."""

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        """Return the latents that are not 0, without a [batch, num_latents] tensor."""
        size = max(1, DENSE_BYTES // (4 * self.num_latents))
        values, tokens, latents = [], [], []
        for start in range(0, len(x), size):
            dense = self.encode(x[start : start + size])
            token, latent = dense.nonzero(as_tuple=True)
            values.append(dense[token, latent])
            tokens.append(token + start)
            latents.append(latent)
        owners, indices = torch.cat(tokens), torch.cat(latents)
        return SparseLatents(
            torch.cat(values), indices, PairsByLatent(indices, self.num_latents, owners, len(x))
        )

    def decode(self, latents: Float[Tensor, "*batch num_latents"]) -> Float[Tensor, "*batch d_in"]:
        """Return x̂ = f W_dec + b_dec."""
        return latents.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SAEOutput:
        latents = self.encode(x)
        return SAEOutput(latents, self.decode(latents))

    @abstractmethod
    def training_loss(
        self, x: Float[Tensor, "batch d_in"], step: Step, dead: Bool[Tensor, " num_latents"]
    ) -> Loss:
        """Return the loss of one batch.

        Args:
            x: activations, scaled as the recipe requires.
            step: position in training; every schedule inside the loss is a function of it.
            dead: latents that count as dead at this step.
        """

    @torch.no_grad()
    def initialise_b_dec(self, mean: Float[Tensor, " d_in"]) -> None:
        """Start the decoder's bias at the mean of (scaled) activations."""
        self.b_dec.copy_(mean)

    def initialise_threshold(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set a threshold that is a running statistic, not a parameter, from (scaled) activations.
        Most architectures have no such threshold and do nothing."""

    @torch.no_grad()
    def folded(self, scale: float) -> Self:
        """Return the SAE for raw activations x, given that this one was trained on ``scale``·x.

        Exact, because every architecture is homogeneous: with the biases (and thresholds) divided
        by the scale, latents and reconstruction of x are those of ``scale``·x divided by ``scale``.
        Weights do not change: unit rows stay unit, and latents are in units of raw activations.
        """
        if not scale > 0:
            raise ValueError(f"`scale` must be above 0, got {scale}")
        sae = copy.deepcopy(self)
        for name in self.homogeneous:
            getattr(sae, name).div_(scale)
        for name in self.logarithmic:
            getattr(sae, name).sub_(math.log(scale))
        return sae

    def extra_repr(self) -> str:
        sizes = {"d_in": self.d_in, "num_latents": self.num_latents}
        return ", ".join(f"{name}={value}" for name, value in {**self.origin, **sizes}.items())


def _of_width(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method with a check of the activations' width, whose error names both widths."""

    @wraps(encode)
    def checked(sae: SAE, x: Tensor, *more: Any, **named: Any) -> Any:
        if x.shape[-1] != sae.d_in:
            raise ValueError(f"expected d_in {sae.d_in}, got {x.shape[-1]}")
        return encode(sae, x, *more, **named)

    return checked


def origin_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `SAE.origin` from the metadata of a saved SAE."""
    names = {"model": "model", "layer": "layer", "hookpoint": "hookpoint"}
    if metadata.get("site") not in (None, "module"):
        names["hookpoint"] = "site"
    return {name: metadata[key] for name, key in names.items() if key in metadata}
