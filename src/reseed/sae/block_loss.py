"""Base classes of losses that compute their own gradient: those of ReLU, gated and JumpReLU.

Autograd would keep up to ten [B, F] tensors of these architectures, and on a CPU a step would spend
more time on fetching their pages than on products. The gradient flows only through latents that are
active or near a threshold. If these are few, everything after the encoder's product is computed
from (token, latent) pairs, by compiled loops (`PairLoss`); else by products of blocks of tokens (in
`BlockSums`, or compiled for ReLU). The number of pairs decides (`reseed.sae.kernels.active_pairs`).
Both ways give the same result up to the order of their sums, and neither holds a [B, F] tensor.

An architecture writes each way as an `OwnGradient`: a `forward` and a `backward` with its formulas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from reseed.sae import kernels
from reseed.sae.kernels import Pairs
from reseed.sae.pairs import block_rows, float32_product


class Terms(NamedTuple):
    """Result of a forward pass."""

    differentiable: tuple[Float[Tensor, ""], ...]
    """Terms of the loss; `backward` receives their gradients."""
    detached: tuple[Tensor, ...]
    """Further results, without a gradient."""
    saved: tuple[Tensor, ...]
    """Tensors that `backward` receives."""


class OwnGradient(ABC):
    """A function of a batch and an SAE's parameters that computes its own gradient."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch d_in"], *parameters: Tensor) -> Terms:
        """Compute the terms; autograd does not record the computation."""

    @abstractmethod
    def backward(self, saved: tuple[Tensor, ...], *grads: Float[Tensor, ""]) -> tuple[Tensor, ...]:
        """Return the gradient of each parameter, from those of the differentiable terms."""

    def __call__(self, x: Float[Tensor, "batch d_in"], *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the differentiable terms and the further results."""
        return _Function.apply(self, x, *parameters)


class _Function(torch.autograd.Function):
    """The connection of an `OwnGradient` with autograd. The batch gets no gradient."""

    @staticmethod
    def forward(ctx: Any, own: OwnGradient, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        terms = own.forward(x, *parameters)
        ctx.save_for_backward(*terms.saved)
        ctx.mark_non_differentiable(*terms.detached)
        ctx.own, ctx.count = own, len(terms.differentiable)
        return *terms.differentiable, *terms.detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.own.backward(ctx.saved_tensors, *grads[: ctx.count])


def can_use_pairs(x: Float[Tensor, "batch d_in"], *parameters: Tensor) -> bool:
    """Return True if compiled loops support these tensors, so that `PairLoss` can be used."""
    return len(x) > 0 and kernels.supports(x, *parameters)


class PairLoss(OwnGradient):
    """Base of a loss that is computed from pairs.

    Args:
        pairs: the pairs that have a gradient, with their pre-activations.
        batch: number of tokens.
        num_latents: F.
    """

    def __init__(self, pairs: Pairs, batch: int, num_latents: int) -> None:
        self.pre, owners, self.latents = pairs
        self.num_latents = num_latents
        self.grouped = kernels.group_pairs(self.latents, owners, batch, num_latents)

    def gradients(
        self,
        grad: Float[Tensor, " pairs"],
        rows: Float[Tensor, "batch d_in"],
        values: Float[Tensor, " pairs"],
        error: Float[Tensor, "batch d_in"],
        factor: float,
        centre: Float[Tensor, "num_latents d_in"] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of W_enc, of a bias of the pre-activations, of W_dec and of b_dec.

        Args:
            grad: the gradient of each pair's pre-activation.
            rows: the encoder's inputs.
            values: the latents f.
            error: e; ``factor`` · e is the gradient of the reconstruction.
            centre: W_enc if the encoder's inputs are x − b_dec, else None.
        """
        for_W_enc, for_bias = self.grouped.per_latent(grad, rows)
        for_W_dec, _ = self.grouped.per_latent(values, error, factor)
        for_b_dec = kernels.column_sums(error) * factor
        if centre is not None:
            for_b_dec -= kernels.column_sums(centre, for_bias)
        return for_W_enc, for_bias, for_W_dec, for_b_dec


class BlockSums:
    """Products of an SAE with blocks of tokens, and the sums over blocks that every loss needs.

    Gradients are sums over the batch: those of Σ‖e‖², and those that the caller adds.

    Args:
        rows: the encoder's inputs.
        targets: the reconstruction's targets.
        W_enc, b_enc, W_dec, b_dec: parameters of the pre-activations and of the reconstruction;
            the biases may be zeros if the caller adds them itself.

    Attributes:
        encode, decode, into_latents: the products of a block with W_enc, W_dec and W_decᵀ; the
            next call overwrites the result.
        errors: e of each token.
        squared_error: Σ‖e‖².
        fired: number of active tokens of each latent, in floats; the caller adds to it.
        for_W_enc, for_bias, for_W_dec, for_b_dec: gradients; ``for_bias`` is that of a bias of the
            pre-activations.
    """

    def __init__(
        self,
        rows: Float[Tensor, "batch d_in"],
        targets: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "num_latents d_in"],
        b_enc: Float[Tensor, " num_latents"],
        W_dec: Float[Tensor, "num_latents d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> None:
        self.rows, self.targets, self.W_enc = rows, targets, W_enc
        self.size = min(block_rows(rows, len(W_enc)), len(rows))
        repeats = len(rows) // self.size
        self.encode = float32_product(self.size, W_enc, b_enc, repeats)
        self.decode = float32_product(self.size, W_dec.t(), b_dec, repeats)
        self.into_latents = float32_product(self.size, W_dec, torch.zeros_like(b_enc), repeats)
        self.errors, self.squared_error = torch.empty_like(targets), targets.new_zeros(())
        self.fired, self.for_bias = torch.zeros_like(b_enc), torch.zeros_like(b_enc)
        self.for_W_enc, self.for_W_dec = torch.zeros_like(W_enc), torch.zeros_like(W_dec)
        self.for_b_dec = torch.zeros_like(b_dec)

    def blocks(self) -> Iterator[slice]:
        """Yield the rows of each block."""
        for start in range(0, len(self.rows), self.size):
            yield slice(start, start + self.size)

    def reconstruct(
        self, block: slice, latents: Float[Tensor, "block num_latents"]
    ) -> Float[Tensor, "block num_latents"]:
        """Add ‖e‖² and its gradient with respect to the decoder; return that of the latents."""
        error = torch.sub(self.targets[block], self.decode(latents), out=self.errors[block])
        self.squared_error += error.square().sum()
        error = error * -2
        self.for_W_dec.addmm_(latents.t(), error)
        self.for_b_dec += error.sum(0)
        return self.into_latents(error)

    def add_encoder(self, block: slice, grad: Float[Tensor, "block num_latents"]) -> None:
        """Add the gradients of the encoder, from that of the pre-activations."""
        self.for_bias += grad.sum(0)
        self.for_W_enc.addmm_(grad.t(), self.rows[block])

    def add_centring(self) -> None:
        """Add the gradient of b_dec through the encoder's inputs x − b_dec, at the end."""
        self.for_b_dec -= self.for_bias @ self.W_enc
