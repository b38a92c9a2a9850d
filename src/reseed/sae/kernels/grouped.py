"""The pairs of a batch in the form that the kernels take, and sums over them; takes tensors."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.sae.kernels import buffers, pairs
from reseed.sae.kernels.threads import in_ranges


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


class Grouped:
    """(token, latent) pairs, sorted by token.

    Args:
        indices: latent of each pair: a table [B, k], or a flat list.
        owners: token of each pair of a flat list, ascending; None for a table.
        batch: number of tokens.
    """

    def __init__(
        self, indices: Int[Tensor, "*pairs"], owners: Tensor | None, batch: int, num_latents: int
    ) -> None:
        self.latents = _numbers(indices).reshape(-1)
        self.batch, self.num_latents = batch, num_latents
        if owners is None:
            each = indices.shape[1]
            self.ends = np.arange(batch + 1) * each
            self.owners = np.repeat(np.arange(batch), each)
        else:
            self.owners = _numbers(owners)
            self.ends = np.searchsorted(self.owners, np.arange(batch + 1))
        self._each = 1 + len(self.latents) // max(1, batch)
        self._firing = 1 + len(self.latents) // num_latents

    @cached_property
    def _by_latent(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.empty(len(self.latents), dtype=np.int64)
        ends = np.empty(self.num_latents + 1, dtype=np.int64)
        pairs.by_latent(self.latents, self.num_latents, order, ends)
        return order, ends

    def fired(self, weights: Float[Tensor, "*pairs"]) -> Int[Tensor, " num_latents"]:
        """Return the number of pairs of each latent with a weight above 0."""
        counts = np.zeros(self.num_latents, dtype=np.int64)
        pairs.fired(self.latents, _numbers(weights).reshape(-1), counts)
        return torch.from_numpy(counts)

    def per_token(
        self, weights: Float[Tensor, "*pairs"], W: Float[Tensor, "num_latents d_in"]
    ) -> Float[Tensor, "batch d_in"]:
        """Return for each token Σ over its latents of weight × row of W."""
        out = buffers.empty((self.batch, W.shape[1]))
        given = _numbers(W), self.latents, _numbers(weights).reshape(-1), self.ends, out.numpy()
        in_ranges(
            lambda start, stop: pairs.sums_by_token(*given, start, stop),
            self.batch,
            self._each * W.shape[1],
        )
        return out

    def inner_products(
        self, rows: Float[Tensor, "batch d_in"], W: Float[Tensor, "num_latents d_in"]
    ) -> Float[Tensor, " pairs"]:
        """Return for each pair the token's row · the latent's row of W."""
        out = torch.empty(len(self.latents))
        given = _numbers(rows), _numbers(W), self.latents, self.ends, out.numpy()
        in_ranges(
            lambda start, stop: pairs.inner_products(*given, start, stop),
            self.batch,
            self._each * W.shape[1],
        )
        return out

    def per_latent(
        self,
        weights: Float[Tensor, "*pairs"],
        rows: Float[Tensor, "batch d_in"],
        factor: float = 1.0,
    ) -> tuple[Float[Tensor, "num_latents d_in"], Float[Tensor, " num_latents"]]:
        """Return for each latent factor × Σ over its tokens of weight × row, and of the weight."""
        out = buffers.empty((self.num_latents, rows.shape[1]))
        totals = torch.empty(self.num_latents)
        given = (
            _numbers(rows),
            self.owners,
            _numbers(weights).reshape(-1),
            *self._by_latent,
            np.float32(factor),
            out.numpy(),
            totals.numpy(),
        )
        in_ranges(
            lambda start, stop: pairs.sums_by_latent(*given, start, stop),
            self.num_latents,
            self._firing * rows.shape[1],
        )
        return out, totals

    def error(
        self,
        weights: Float[Tensor, "*pairs"],
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "num_latents d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, " pairs"], Float[Tensor, ""]]:
        """Return e = x − (Σ weight × row of W + b_dec), each pair's e · row of W, and Σ‖e‖²."""
        error, inner = buffers.empty((self.batch, x.shape[1])), torch.empty(len(self.latents))
        squares = np.empty(self.batch, dtype=np.float32)
        given = (
            _numbers(x),
            _numbers(b_dec),
            _numbers(W),
            self.latents,
            _numbers(weights).reshape(-1),
            self.ends,
            error.numpy(),
            inner.numpy(),
            squares,
        )
        in_ranges(
            lambda start, stop: pairs.errors(*given, start, stop),
            self.batch,
            2 * self._each * x.shape[1],
        )
        return error, inner, torch.tensor(squares.sum(dtype=np.float64), dtype=torch.float32)
