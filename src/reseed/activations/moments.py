"""Mean, covariance and geometric median of activations, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 4_096
"""Number of activations that are converted to float64 at once; a whole chunk takes much memory."""
TOLERANCE = 1e-6
MAX_ROUNDS = 1_000


@dataclass(frozen=True)
class Moments:
    """Mean [d_in] and covariance [d_in, d_in] (divided by the number of tokens), float64."""

    mean: Float[Tensor, " d_in"]
    covariance: Float[Tensor, "d_in d_in"]

    @classmethod
    def of(cls, x: Float[Tensor, "tokens d_in"]) -> Moments:
        """Compute the moments of ``x`` in two passes, the second with centred activations."""
        parts = x.split(_BLOCK)
        mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(x)
        squares = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for part in parts:
            centred = part.double() - mean
            squares += centred.T @ centred
        return cls(mean, squares / len(x))

    def root(self) -> Float[Tensor, "d_in d_in"]:
        """Return the symmetric square root of the covariance.

        Eigenvalues that rounding made negative count as 0.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    def tensors(self) -> dict[str, Tensor]:
        """Return ``mean`` and ``covariance`` for storage: float32, on the CPU."""
        stored = {"mean": self.mean.float().cpu(), "covariance": self.covariance.float().cpu()}
        return {name: tensor.contiguous() for name, tensor in stored.items()}


@dataclass
class MomentSums:
    """Running sums of activations and of their products, for one pass over a stream."""

    tokens: int = 0
    total: Float[Tensor, " d_in"] | None = None
    products: Float[Tensor, "d_in d_in"] | None = None

    @torch.inference_mode()
    def add(self, x: Float[Tensor, "tokens d_in"]) -> None:
        """Add the activations ``x``; the sums stay on their device."""
        for part in x.split(_BLOCK):
            exact = part.double()
            total, products = exact.sum(0), exact.T @ exact
            self.tokens += len(part)
            self.total = total if self.total is None else self.total + total
            self.products = products if self.products is None else self.products.add_(products)

    def so_far(self) -> Moments:
        """Return the moments of all activations added.

        Raises:
            ValueError: no activations were added.
        """
        if self.total is None or self.products is None:
            raise ValueError("no activations were added, so they have no mean")
        mean = self.total / self.tokens
        return Moments(mean, self.products / self.tokens - torch.outer(mean, mean))


@torch.no_grad()
def geometric_median(points: Float[Tensor, "points d_in"]) -> Float[Tensor, " d_in"]:
    """Return the y that minimises Σ ‖x_i − y‖, a robust centre, by Weiszfeld's iteration.

    The variant of Vardi & Zhang (2000) also handles a y that coincides with a point. The iteration
    ends when the sum of the unit vectors from y to the other points has a norm of at most the
    number of points at y, plus `TOLERANCE` per point, or after `MAX_ROUNDS`.
    """
    points = points.double()
    median = points.mean(0)
    # A point nearer than this counts as coinciding with y: smaller distances are rounding errors.
    met_within = 1e-12 * float(torch.linalg.vector_norm(points - median, dim=1).mean())
    for _ in range(MAX_ROUNDS):
        offsets = points - median
        distances = torch.linalg.vector_norm(offsets, dim=1)
        met = distances <= met_within
        weights = torch.where(met, 0.0, 1 / distances.clamp_min(torch.finfo(torch.float64).tiny))
        pull = weights @ offsets  # the sum of the unit vectors
        strength = float(torch.linalg.vector_norm(pull))
        multiplicity = int(met.sum())
        if strength <= multiplicity + TOLERANCE * len(points):
            break
        median = median + (1 - multiplicity / strength) * pull / weights.sum()
    return median
