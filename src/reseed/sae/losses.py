"""Functions that several losses share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae import kernels
from reseed.sae.shared_batch import shared_variance


def total_variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Return Σ‖x − x̄‖² over the batch: the squared error of predicting the batch's own mean.

    If several ranks share the batch, each gets an equal share of the whole batch's sum
    (`reseed.sae.shared_batch`).
    """
    if kernels.serve(x) and not x.requires_grad and len(x):
        from reseed.sae.kernels import batch

        own = batch.total_variance(x)
    else:
        own = (x - x.mean(0)).square_().sum()
    return shared_variance(x, own)


def fvu(squared_error: Float[Tensor, ""], variance: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the fraction of variance unexplained: 0 for the identity, 1 for the mean."""
    return squared_error / variance


def ratio_or_zero(
    numerator: Float[Tensor, ""], denominator: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return ``numerator / denominator``, or 0 (gradient 0, never NaN) if that is not finite."""
    # Autograd differentiates both sides of a `where`, so the division itself must be safe.
    sound = (denominator > 0) & torch.isfinite(numerator) & torch.isfinite(denominator)
    safe = torch.where(sound, denominator, 1.0)
    return torch.where(sound, numerator / safe, 0.0)


def warmed_up(index: int, total: int, fraction: float) -> float:
    """Return a factor that rises linearly from 0 to 1 over ``fraction`` of the steps, then is 1."""
    steps = fraction * total
    return 1.0 if steps <= 0 else min(1.0, index / steps)
