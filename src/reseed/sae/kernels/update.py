"""One step of Adam, row by row: a row stays in the cache from the gradient to the norm."""

from __future__ import annotations

import numpy as np

from reseed.compiling import njit
from reseed.sae.kernels.screening import REORDER

_TINY = np.float32(np.finfo(np.float32).tiny)


@njit(nogil=True, cache=True, fastmath=REORDER)
def _parallel(grad, weight, i):  # pragma: no cover
    total = np.float32(0.0)
    for c in range(weight.shape[1]):
        total += grad[i, c] * weight[i, c]
    return total


@njit(nogil=True, cache=True, fastmath=REORDER)
def squared_norms(grad, weight, project, squares, start, stop):  # pragma: no cover
    """Write ‖g‖² of every row; if ``project``, g without its component along the weight's row."""
    for i in range(start, stop):
        along = _parallel(grad, weight, i) if project else np.float32(0.0)
        total = np.float32(0.0)
        for c in range(grad.shape[1]):
            one = grad[i, c] - along * weight[i, c]
            total += one * one
        squares[i] = total


@njit(nogil=True, cache=True, fastmath=REORDER, error_model="numpy")
def adam(
    weight, grad, first, second, project, renormalise, numbers, start, stop
):  # pragma: no cover
    """Update the rows ``start`` … ``stop`` in place; the gradient is not changed.

    Args:
        first, second: Adam's moments.
        project: remove from each row of the gradient its component along the weight's row.
        renormalise: scale rows to norm 1 at the end; a row of zeros stays.
        numbers: float32 array: clipping factor, 1 − β₁, β₂, 1 − β₂, 1 − lr · decay, lr / (1 − β₁ᵗ),
            √(1 − β₂ᵗ), ε.
    """
    width = weight.shape[1]
    factor, rate1, keep2, rate2 = numbers[0], numbers[1], numbers[2], numbers[3]
    decay, step, correction, eps = numbers[4], numbers[5], numbers[6], numbers[7]
    for i in range(start, stop):
        along = _parallel(grad, weight, i) if project else np.float32(0.0)
        total = np.float32(0.0)
        for c in range(width):
            g = factor * (grad[i, c] - along * weight[i, c])
            m = first[i, c] + rate1 * (g - first[i, c])
            v = keep2 * second[i, c] + rate2 * (g * g)
            first[i, c], second[i, c] = m, v
            w = decay * weight[i, c] - step * m / (np.sqrt(v) / correction + eps)
            weight[i, c] = w
            total += w * w
        if renormalise:
            norm = max(np.sqrt(total), _TINY)
            for c in range(width):
                weight[i, c] /= norm
