"""Linear CKA: similarity of two SAEs' representations of the same tokens, without matched latents.

CKA(X, Y) = HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) of the Gram matrices K = XXᵀ, L = YYᵀ over tokens
(Kornblith et al. 2019). HSIC is estimated on each batch of tokens by the unbiased estimator of Song
et al. 2012 and averaged over batches before the ratio is taken (Nguyen, Raghu & Kornblith 2021,
arXiv 2010.15327). Unlike an average of CKAs, the result depends on the batch size by noise alone;
unlike the plain estimator, it does not rise to 1 with the width. It may fall slightly below 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MIN_TOKENS = 4
"""The estimator combines four tokens at a time."""


def centred_gram(x: Float[Tensor, "B D"]) -> Float[Tensor, "B B"]:
    """Return the scalar products of centred rows, in float64.

    HSIC does not depend on the centre; centring reduces cancellation.
    """
    exact = x.double()
    exact = exact - exact.mean(0)
    return exact @ exact.T


def hsic(grams: Sequence[Float[Tensor, "B B"]]) -> Float[Tensor, "n n"]:
    """Return the unbiased HSIC of every two of n Gram matrices over the same B ≥ 4 tokens.

    For K and L with zeroed diagonals: [tr(KL) + 1ᵀK1·1ᵀL1 / ((B−1)(B−2)) − 2·1ᵀKL1 / (B−2)]
    / (B(B−3)) (Song et al. 2012, eq. 5).
    """
    hollow = torch.stack([gram.double() for gram in grams])
    size = hollow.shape[1]
    if size < MIN_TOKENS:
        raise ValueError(f"HSIC needs at least {MIN_TOKENS} tokens in a batch; got {size}")
    hollow.diagonal(dim1=1, dim2=2).zero_()
    flat, rows = hollow.flatten(1), hollow.sum(2)
    total = rows.sum(1)
    found = flat @ flat.T
    found += torch.outer(total, total) / ((size - 1) * (size - 2))
    found -= rows @ rows.T * (2 / (size - 2))
    return found / (size * (size - 3))


class CKA:
    """Linear CKA of every two of n representations, accumulated over batches.

    Batches are weighted by their tokens, so that a smaller last batch counts less.
    """

    def __init__(self, n: int) -> None:
        self._sums = np.zeros((n, n))

    def add(self, grams: Sequence[Float[Tensor, "B B"]]) -> None:
        """Add a batch, given its Gram matrix in each representation; skip fewer than 4 tokens."""
        if len(grams[0]) >= MIN_TOKENS:
            self._sums += len(grams[0]) * hsic(grams).cpu().numpy()

    def values(self) -> Float[np.ndarray, "n n"]:
        """Return the CKA of every two; NaN for a representation without variance."""
        own = self._sums.diagonal()
        scale = np.sqrt(np.where(own > 0, own, np.nan))
        return self._sums / np.outer(scale, scale)
