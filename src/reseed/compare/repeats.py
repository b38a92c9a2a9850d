"""Repeated latents of a dictionary: duplicates and antipodal pairs.

s_i = max_{j≠i} cos(E_i, E_j)·cos(W_i, W_j) is near 1 for both, and the signs distinguish them. Both
cosines positive: two latents for the same feature. Both negative: two latents for the two ends of
one direction. Repeated latents make matching ambiguous, because equal latents are interchangeable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from reseed.compare.rows import Rows, row_cosines
from reseed.compare.similarity import Running, tiles, unit_pair


@dataclass(frozen=True, eq=False)
class Repeats:
    """Repetition of each latent of one dictionary.

    Attributes:
        duplicate_product, antipodal_product: the largest product of both cosines with another
            latent, over latents where both are positive, and where both are negative; 0 if there
            is none.
        duplicate, antipodal: that product is ≥ τ².
    """

    duplicate_product: Float[np.ndarray, " num_latents"]
    antipodal_product: Float[np.ndarray, " num_latents"]
    duplicate: Bool[np.ndarray, " num_latents"]
    antipodal: Bool[np.ndarray, " num_latents"]


def repeats(x: Rows, threshold: float, device: str = "cpu") -> Repeats:
    """Find the most similar other latent of every latent of one dictionary, in blocks.

    The search is in float32; the products with the latents found are in float64.
    """
    n = len(x)
    encoder, decoder = unit_pair(x, device)
    positive, negative = Running(n, n, device), Running(n, n, device)
    for rows, columns in tiles(n, n):
        c_enc = encoder[rows] @ encoder[columns].T
        product = c_enc * (c_enc if x.tied else decoder[rows] @ decoder[columns].T)
        first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
        own = torch.arange(first, max(first, last))  # the diagonal: a latent with itself
        product[own - rows.start, own - columns.start] = 0
        positive.look(product.where(c_enc > 0, 0), rows, columns)
        negative.look(product.where(c_enc < 0, 0), rows, columns)
    duplicate, antipodal = (_exact(x, running) for running in (positive, negative))
    least = threshold**2
    return Repeats(duplicate, antipodal, duplicate >= least, antipodal >= least)


def _exact(x: Rows, running: Running) -> Float[np.ndarray, " num_latents"]:
    found = running.found()
    out = np.zeros(len(x))
    i = np.flatnonzero(found.a > 0)
    j = found.of_a[i]
    out[i] = row_cosines(x.encoder, x.encoder, i, j) * row_cosines(x.decoder, x.decoder, i, j)
    return np.maximum(out, 0.0)
