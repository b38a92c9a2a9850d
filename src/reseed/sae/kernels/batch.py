"""Sums over a batch; functions of tensors."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.kernels import moments
from reseed.sae.kernels.threads import in_ranges


def column_sums(
    rows: Float[Tensor, "rows d_in"], weights: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, " d_in"]:
    """Return Σ weight × row; weights default to 1."""
    return torch.from_numpy(_column_sums(rows, weights).astype(np.float32))


def _column_sums(rows: Tensor, weights: Tensor | None = None) -> np.ndarray:
    numbers = rows.detach().contiguous().numpy()
    given = np.ones(len(rows), dtype=np.float32) if weights is None else weights.contiguous()
    parts = np.empty((-(-len(rows) // moments.PART), rows.shape[1]), dtype=np.float32)
    in_ranges(
        lambda start, stop: moments.part_sums(numbers, np.asarray(given), parts, start, stop),
        len(parts),
        moments.PART * rows.shape[1],
    )
    return parts.sum(0, dtype=np.float64)


def total_variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Return Σ‖x − x̄‖²."""
    mean = (_column_sums(x) / len(x)).astype(np.float32)
    numbers = x.detach().contiguous().numpy()
    squares = np.empty(len(x), dtype=np.float32)
    in_ranges(
        lambda start, stop: moments.squared_distances(numbers, mean, squares, start, stop),
        len(x),
        x.shape[1],
    )
    return torch.tensor(squares.sum(dtype=np.float64), dtype=torch.float32)
