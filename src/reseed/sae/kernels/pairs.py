"""Sums over the (token, latent) pairs of a batch: decoder, error and gradients.

Pairs are sorted by token: those of token t are ``ends[t]`` … ``ends[t + 1]`` of the flat lists. A
pair of weight 0 contributes nothing; `sums_by_latent` skips it.
"""

from __future__ import annotations

import numpy as np

from reseed.compiling import njit
from reseed.sae.kernels.lanes import prefetch
from reseed.sae.kernels.screening import REORDER

_AT_ONCE = 4  # rows added together, so that a sum is loaded and stored a quarter as often


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
def _ask_for(rows, i):  # pragma: no cover
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
                _ask_for(rows, which[ahead])
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
            _ask_for(rows, which[p + 1])
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

    This covers the tokens ``start`` … ``stop``, while the k rows of each are in the cache.
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
    """Write token's row · latent's row of W, for each pair of the tokens ``start`` … ``stop``."""
    for t in range(start, stop):
        _inner(out, rows, t, W, latents, ends[t], ends[t + 1])


@njit(nogil=True, cache=True)
def sums_by_latent(
    rows, owners, weights, order, ends, factor, out, totals, start, stop
):  # pragma: no cover
    """Write factor · Σ weight · token's row, and factor · Σ weight, for latents start … stop."""
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
