"""The geometric median: a centre that is robust to outliers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-6
MAX_ROUNDS = 1_000


@torch.no_grad()
def geometric_median(points: Float[Tensor, "points d_in"]) -> Float[Tensor, " d_in"]:
    """Return the y that minimises Σ ‖x_i − y‖, in float64, by Weiszfeld's iteration.

    The variant of Vardi & Zhang (2000) also handles a y that meets a point. It ends when the mean
    of the unit vectors from y to the points, which is 0 at the median, has a norm of at most
    `TOLERANCE` (beyond what points at y itself may balance), or after `MAX_ROUNDS`.
    """
    points = points.double()
    median = points.mean(0)
    # A point nearer than this counts as met: distances are not resolved below rounding.
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
