"""Loss and gradient over the (token, latent) pairs of a batch.

The file defines JumpReLU and gates, pair by pair, with sums over the pairs in order and in float64;
then the decoder, the error and the gradients of weights, as sums over pairs; last, `Grouped`, which
computes the same sums for tensors.

Pairs are sorted by token: those of token t are ``ends[t]`` … ``ends[t + 1]`` of the flat lists. A
pair of weight 0 contributes nothing; `sums_by_latent` skips it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.sae.kernels import GroupedPairs, buffers
from reseed.sae.kernels.choice import REORDER, prefetch
from reseed.system.compiling import in_ranges, njit


@njit(nogil=True, cache=True)
def jump(half, pre, latents, threshold, out, near, fired, near_tokens):  # pragma: no cover
    """Write out = π where π > θ, else 0 (NaN stays NaN), and ``near`` = |π − θ| < ``half``.

    Add the counts of both, per latent, to ``fired`` and ``near_tokens``.
    """
    for p in range(len(pre)):
        j, value = latents[p], pre[p]
        above = value > threshold[j]
        is_near = abs(value - threshold[j]) < half
        out[p] = np.float32(0.0) if value <= threshold[j] else value
        near[p] = is_near
        fired[j] += above
        near_tokens[j] += is_near


@njit(nogil=True, cache=True)
def jump_backward(grad, values, latents, near, out, into_threshold):  # pragma: no cover
    """Write out = gradient where the value is > 0, else 0; sum per latent the gradients near θ."""
    for p in range(len(grad)):
        out[p] = grad[p] if values[p] > 0 else np.float32(0.0)
        if near[p]:
            into_threshold[latents[p]] += grad[p]


@njit(nogil=True, cache=True)
def gate(shared, latents, b_enc, ratio, b_mag, opened, out, fired):  # pragma: no cover
    """Write π = shared + b_enc, which is above 0 for these pairs, and f = ReLU(ratio · shared +
    b_mag).

    Add the counts of f > 0 to ``fired``, and return the sum of π.
    """
    total = 0.0
    for p in range(len(shared)):
        j = latents[p]
        opened[p] = shared[p] + b_enc[j]
        total += opened[p]
        value = shared[p] * ratio[j] + b_mag[j]
        out[p] = np.float32(0.0) if value <= 0 else value
        fired[j] += value > 0
    return total


@njit(nogil=True, cache=True)
def gate_backward(
    by_value, by_gate, values, shared, latents, ratio, out, into_bias, into_ratio, into_gate
):  # pragma: no cover
    """Write the gradient of each pair's shared pre-activation, from those of f and of π.

    Add the gradients of b_mag, the ratio and b_enc, summed per latent, to the last three arguments.
    """
    for p in range(len(shared)):
        j = latents[p]
        magnitude = by_value[p] if values[p] > 0 else np.float32(0.0)
        into_bias[j] += magnitude
        into_ratio[j] += magnitude * shared[p]
        into_gate[j] += by_gate[p]
        out[p] = by_gate[p] + magnitude * ratio[j]


_AT_ONCE = 4  # number of rows added at once, so that a sum is loaded and stored less often


@njit(nogil=True, cache=True)
def by_latent(latents, num_latents, order, ends):  # pragma: no cover
    """Write the stable ``order`` of the pairs by latent (counting sort) and each latent's end."""
    counts = np.zeros(num_latents, dtype=np.int64)
    for p in range(len(latents)):
        counts[latents[p]] += 1
    ends[0] = 0
    for j in range(num_latents):
        ends[j + 1] = ends[j] + counts[j]
        counts[j] = ends[j]
    for p in range(len(latents)):
        j = latents[p]
        order[counts[j]] = p
        counts[j] += 1


@njit(nogil=True, cache=True)
def fired(latents, weights, counts):  # pragma: no cover
    """Add to ``counts`` the number of pairs of each latent with a weight above 0."""
    for p in range(len(latents)):
        counts[latents[p]] += weights[p] > 0


@njit(nogil=True, cache=True, inline="always")
def _prefetch_row(rows, i):  # pragma: no cover
    for c in range(0, rows.shape[1], 16):
        prefetch(rows, i, c)


@njit(nogil=True, cache=True, fastmath=REORDER)
def _add(out, i, rows, which, weights, start, stop, sign):  # pragma: no cover
    """Compute out[i] += sign · Σ weight · rows[which], in the order of the list."""
    width = rows.shape[1]
    p = start
    while p + _AT_ONCE <= stop:
        if p + 2 * _AT_ONCE <= stop:
            for ahead in range(p + _AT_ONCE, p + 2 * _AT_ONCE):
                _prefetch_row(rows, which[ahead])
        j0, j1, j2, j3 = which[p], which[p + 1], which[p + 2], which[p + 3]
        w0, w1 = sign * weights[p], sign * weights[p + 1]
        w2, w3 = sign * weights[p + 2], sign * weights[p + 3]
        for c in range(width):
            out[i, c] += (w0 * rows[j0, c] + w1 * rows[j1, c]) + (
                w2 * rows[j2, c] + w3 * rows[j3, c]
            )
        p += _AT_ONCE
    while p < stop:
        j0, w0 = which[p], sign * weights[p]
        for c in range(width):
            out[i, c] += w0 * rows[j0, c]
        p += 1


@njit(nogil=True, cache=True, fastmath=REORDER)
def _inner(out, a, i, rows, which, start, stop):  # pragma: no cover
    """Write out[p] = a[i] · rows[which[p]]."""
    width = rows.shape[1]
    for p in range(start, stop):
        if p + 1 < stop:
            _prefetch_row(rows, which[p + 1])
        j = which[p]
        total = np.float32(0.0)
        for c in range(width):
            total += a[i, c] * rows[j, c]
        out[p] = total


@njit(nogil=True, cache=True, fastmath=REORDER)
def errors(
    x, b_dec, W, latents, weights, ends, error, inner, squares, start, stop
):  # pragma: no cover
    """Write e = x − (b_dec + Σ weight · row of W), e · row for each pair, and ‖e‖².

    For each of the tokens ``start`` … ``stop`` all are computed while its k rows are in the cache.
    """
    for t in range(start, stop):
        for c in range(x.shape[1]):
            error[t, c] = x[t, c] - b_dec[c]
        _add(error, t, W, latents, weights, ends[t], ends[t + 1], np.float32(-1.0))
        _inner(inner, error, t, W, latents, ends[t], ends[t + 1])
        total = np.float32(0.0)
        for c in range(x.shape[1]):
            total += error[t, c] * error[t, c]
        squares[t] = total


@njit(nogil=True, cache=True)
def sums_by_token(W, latents, weights, ends, out, start, stop):  # pragma: no cover
    """Write Σ weight · row of W, for the tokens ``start`` … ``stop``."""
    for t in range(start, stop):
        out[t, :] = 0.0
        _add(out, t, W, latents, weights, ends[t], ends[t + 1], np.float32(1.0))


@njit(nogil=True, cache=True)
def inner_products(rows, W, latents, ends, out, start, stop):  # pragma: no cover
    """Write the inner product of the token's row and the latent's row of W, for each pair of the
    tokens ``start`` … ``stop``."""
    for t in range(start, stop):
        _inner(out, rows, t, W, latents, ends[t], ends[t + 1])


@njit(nogil=True, cache=True)
def sums_by_latent(
    rows, owners, weights, order, ends, factor, out, totals, start, stop
):  # pragma: no cover
    """Write factor · Σ weight · row of the token, and factor · Σ weight, for the latents ``start``
    … ``stop``."""
    longest = 0
    for j in range(start, stop):
        longest = max(longest, ends[j + 1] - ends[j])
    tokens = np.empty(longest, dtype=np.int64)
    values = np.empty(longest, dtype=np.float32)
    for j in range(start, stop):
        count, total = 0, 0.0
        for p in range(ends[j], ends[j + 1]):
            weight = weights[order[p]]
            if weight != 0:
                tokens[count] = owners[order[p]]
                values[count] = factor * weight
                total += weight
                count += 1
        out[j, :] = 0.0
        _add(out, j, rows, tokens, values, 0, count, np.float32(1.0))
        totals[j] = factor * total


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


class Grouped(GroupedPairs):
    """Pairs with their compiled sums; `reseed.sae.kernels.group_pairs` documents the arguments."""

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
        by_latent(self.latents, self.num_latents, order, ends)
        return order, ends

    def fired(self, weights: Float[Tensor, "*pairs"]) -> Int[Tensor, " num_latents"]:
        counts = np.zeros(self.num_latents, dtype=np.int64)
        fired(self.latents, _numbers(weights).reshape(-1), counts)
        return torch.from_numpy(counts)

    def per_token(
        self, weights: Float[Tensor, "*pairs"], W: Float[Tensor, "num_latents d_in"]
    ) -> Float[Tensor, "batch d_in"]:
        out = buffers.empty((self.batch, W.shape[1]))
        given = _numbers(W), self.latents, _numbers(weights).reshape(-1), self.ends, out.numpy()
        in_ranges(
            lambda start, stop: sums_by_token(*given, start, stop),
            self.batch,
            self._each * W.shape[1],
        )
        return out

    def inner_products(
        self, rows: Float[Tensor, "batch d_in"], W: Float[Tensor, "num_latents d_in"]
    ) -> Float[Tensor, " pairs"]:
        out = torch.empty(len(self.latents))
        given = _numbers(rows), _numbers(W), self.latents, self.ends, out.numpy()
        in_ranges(
            lambda start, stop: inner_products(*given, start, stop),
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
            lambda start, stop: sums_by_latent(*given, start, stop),
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
            lambda start, stop: errors(*given, start, stop),
            self.batch,
            2 * self._each * x.shape[1],
        )
        return error, inner, torch.tensor(squares.sum(dtype=np.float64), dtype=torch.float32)
