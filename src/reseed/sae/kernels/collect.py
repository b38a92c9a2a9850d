"""Pairs of a block of pre-activations above a floor, collected while the block is in the cache."""

from __future__ import annotations

import numpy as np

from reseed.compiling import njit
from reseed.sae.kernels.lanes import LANES, above, first_one, without_first


@njit(nogil=True, cache=True)
def collect(pre, floors, first, most):  # pragma: no cover
    """Return row, latent and value of each number above its latent's floor (or NaN).

    Args:
        first: index of the block's first row in the batch.
        most: largest number of pairs.

    Returns:
        Three arrays of length ``most``, sorted by row and latent, and how many entries are used; −1
        if there are more than ``most``.
    """
    rows, width = pre.shape
    owners = np.empty(most, dtype=np.int64)
    latents = np.empty(most, dtype=np.int64)
    values = np.empty(most, dtype=np.float32)
    whole = width // LANES * LANES
    count = 0
    for r in range(rows):
        row = pre[r]
        for start in range(0, whole, LANES):
            bits = above(row, start, floors)  # pyright: ignore
            while bits != 0:
                if count == most:
                    return owners, latents, values, -1
                j = start + first_one(bits)
                bits = without_first(bits)
                owners[count], latents[count], values[count] = first + r, j, row[j]
                count += 1
        for j in range(whole, width):
            if not row[j] <= floors[j]:
                if count == most:
                    return owners, latents, values, -1
                owners[count], latents[count], values[count] = first + r, j, row[j]
                count += 1
    return owners, latents, values, count
