"""ReLU and its derivative on a block, with the sums over its tokens in the same pass."""

from __future__ import annotations

import numpy as np

from reseed.compiling import njit

_TILE = 1024  # latents per pass, so that their sums stay in the L1 cache


@njit(nogil=True, cache=True)
def rectify(pre, out, sums, fired):  # pragma: no cover
    """Write out = max(pre, 0) (NaN stays NaN), Σ out, and the number of tokens with out > 0."""
    rows, width = pre.shape
    zero, one = np.float32(0.0), np.float32(1.0)
    for left in range(0, width, _TILE):
        right = min(width, left + _TILE)
        sums[left:right] = zero
        fired[left:right] = zero
        for r in range(rows):
            for j in range(left, right):
                value = pre[r, j]
                value = zero if value <= zero else value
                out[r, j] = value
                sums[j] += value
                fired[j] += one if value > zero else zero


@njit(nogil=True, cache=True)
def through(grad, latents, added, out, sums):  # pragma: no cover
    """Write out = grad + added[latent] where the latent is above 0, else 0, and Σ out."""
    rows, width = grad.shape
    zero = np.float32(0.0)
    for left in range(0, width, _TILE):
        right = min(width, left + _TILE)
        sums[left:right] = zero
        for r in range(rows):
            for j in range(left, right):
                value = grad[r, j] + added[j]
                value = value if latents[r, j] > zero else zero
                out[r, j] = value
                sums[j] += value
