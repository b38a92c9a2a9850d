"""Compared rows of a dictionary, and exact cosines of chosen pairs of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from reseed.compare.dictionary import Dictionary

_BLOCK_ENTRIES = 1 << 20
"""Entries of a matrix that are converted to float64 at a time: 8 MB."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Encoder and decoder rows; both are zero where one of them has no direction.

    The rows keep their trained lengths, and the caller normalises them. No normalised copy is
    stored, because at 131,072 × 4,096 it would take 4.3 GB in float64.
    """

    encoder: Float[np.ndarray, "n d_in"]
    decoder: Float[np.ndarray, "n d_in"]

    @classmethod
    def of(cls, x: Dictionary) -> Rows:
        zero = x.zero
        encoder = _without(x.encoder, zero)
        if x.decoder is x.encoder or np.array_equal(x.encoder, x.decoder):
            return cls(encoder, encoder)
        return cls(encoder, _without(x.decoder, zero))

    def __len__(self) -> int:
        return len(self.encoder)

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def tied(self) -> bool:
        """True if encoder and decoder are the same rows; then one matching serves for both."""
        return self.encoder is self.decoder

    def joint(self) -> Float[np.ndarray, "n 2*d_in"]:
        """Return [E, W]/√2 of unit rows, float32; their cosine is the mean of both cosines."""
        halves = [unit32(self.encoder), unit32(self.decoder)]
        return np.concatenate(halves, axis=1) / np.float32(np.sqrt(2))


def _without(rows: Float[np.ndarray, "n d_in"], zero: np.ndarray) -> Float[np.ndarray, "n d_in"]:
    return np.where(zero[:, None], np.float32(0), rows) if zero.any() else rows


def unit_rows(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "n d_in"]:
    """Normalise rows to length 1 in float64; a row that is zero or not finite becomes zero."""
    rows = np.asarray(rows, dtype=np.float64)
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    # Divide by the largest entry first, so that squares of tiny or huge rows stay in range.
    scale = np.abs(rows).max(axis=1, keepdims=True)
    rows = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def unit32(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "n d_in"]:
    """Return `unit_rows` in float32, computed block by block."""
    out = np.empty(rows.shape, dtype=np.float32)
    step = max(1, _BLOCK_ENTRIES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        out[block] = unit_rows(rows[block])
    return out


def row_cosines(
    a: Float[np.ndarray, "n d_in"],
    b: Float[np.ndarray, "m d_in"],
    i: Int[np.ndarray, " pairs"],
    j: Int[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """Return the cosines of rows ``i`` of ``a`` with rows ``j`` of ``b``, pairwise in float64."""
    out = np.empty(len(i))
    step = max(1, _BLOCK_ENTRIES // a.shape[1])
    for start in range(0, len(i), step):
        block = slice(start, start + step)
        products = np.einsum("pd,pd->p", unit_rows(a[i[block]]), unit_rows(b[j[block]]))
        out[block] = np.clip(products, -1.0, 1.0)
    return out


def both_cosines(
    a: Rows, b: Rows, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    """Return min(c_enc, c_dec) of pairs of latents, in float64."""
    by_encoder = row_cosines(a.encoder, b.encoder, i, j)
    if a.tied and b.tied:
        return by_encoder
    return np.minimum(by_encoder, row_cosines(a.decoder, b.decoder, i, j))
