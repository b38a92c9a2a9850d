"""Exact float32 top k through a bfloat16 product, in half the time on CPUs with native bfloat16.

The rough product p̃ (inputs, weight and bias rounded, accumulated in float32, stored in bfloat16)
differs from the true pre-activation p by a summation error of at most ε and a relative storage
error of at most u:

    ε = ‖x̂‖‖δe‖ + ‖δx‖(‖ê‖ + ‖δe‖) + γ(‖x̂‖ + ‖δx‖)(‖ê‖ + ‖δe‖) + |δb| + γ|b|

with hats for rounded values, δ for the rounding residuals, and γ = 2(D + 2)2⁻²⁴ for both float32
sums (Cauchy-Schwarz, with each norm replaced by its maximum over the latents). If t is a lower
bound of the k-th largest p̃ of a row, k latents have p ≥ t/(1 + u) − ε, so every latent of the true
top k has p̃ ≥ (1 − u)(t/(1 + u) − 2ε). The latents that reach this bound are recomputed in float32,
and the k largest of them are chosen.

The steps for each row, while the rough product is in the cache:

1. Find t, a lower bound of the k-th largest rough value, from maxima of groups.
2. Compute the exact values of all latents whose rough value reaches t. The k-th largest of these
   values, τ, is a lower bound of the true k-th largest.
3. Compute the exact values of the other latents whose exact value may reach τ.
4. Choose the k largest exact values.

An exact value is a float32 dot product, always computed by the same loop, so that it does not
depend on the block.
"""

from __future__ import annotations

import numpy as np

from reseed.sae.kernels.choice import (
    REORDER,
    as_keys,
    group_maxima,
    keep_largest,
    kth_largest,
    padded,
    prefetch,
    reaching,
)
from reseed.system.compiling import njit

_AHEAD = 1  # number of rows that are prefetched
_SHRUNK = np.float32(1 - 2.0**-8)  # 1 − u
_LEAST = np.float32(1e-30)  # below this, products may be flushed to 0


@njit(nogil=True, cache=True, fastmath=REORDER, error_model="numpy")
def rounded(exact, rough, norms, lost, start, stop):  # pragma: no cover
    """Write rows as bfloat16 bits (nearest, ties to even), their norms, and the norms of the
    rounding errors.

    NaN and infinities give norms that are not finite; the bits are then not used.
    """
    width = exact.shape[1]
    bits = exact.view(np.uint32)
    kept = np.empty(width, dtype=np.uint32)
    numbers = kept.view(np.float32)
    half, one, sixteen = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    for i in range(start, stop):
        for c in range(width):
            raw = bits[i, c]
            high = np.uint32(raw + half + ((raw >> sixteen) & one)) >> sixteen
            rough[i, c] = high
            kept[c] = high << sixteen
        norm, loss = np.float32(0.0), np.float32(0.0)
        for c in range(width):
            away = exact[i, c] - numbers[c]
            norm += numbers[c] * numbers[c]
            loss += away * away
        norms[i], lost[i] = np.sqrt(norm), np.sqrt(loss)


@njit(nogil=True, cache=True, fastmath=REORDER)
def score(rows, i, W, b, places, start, stop, scores):  # pragma: no cover
    """Write the pre-activations of row i at the latents places[start:stop], in float32."""
    width = W.shape[1]
    for c in range(start, min(start + _AHEAD, stop)):
        for d in range(0, width, 16):
            prefetch(W, places[c], d)
    for c in range(start, stop):
        j = places[c]
        if c + _AHEAD < stop:
            ahead = places[c + _AHEAD]
            for d in range(0, width, 16):
                prefetch(W, ahead, d)
        total = np.float32(0.0)
        for d in range(width):
            total += rows[i, d] * W[j, d]
        scores[c] = total + b[j]


@njit(nogil=True, cache=True)
def screen(
    bits, error, first, rows, W, b, k, most, values, indices, unsure, descending
):  # pragma: no cover
    """Write the k largest of each row of a block, from its rough products.

    Args:
        bits: non-negative bfloat16 numbers as integers.
        error: ε of every row of the batch.
        first: index of the block's first row in the batch.
        most: maximum number of candidates. Rows with more, and rows whose bound excludes nothing,
            are marked ``unsure``; nothing else is written for them.
    """
    width = bits.shape[1]
    maxima = np.empty(padded(width), dtype=np.int16)
    likely = np.empty(most, dtype=np.int64)
    others = np.empty(most, dtype=np.int64)
    places = np.empty(most, dtype=np.int64)
    scores = np.empty(most, dtype=np.float32)
    keys = np.empty(padded(most), dtype=np.int32)
    word = np.empty(1, dtype=np.int32)
    number = word.view(np.float32)
    for r in range(bits.shape[0]):
        i, row = first + r, bits[r]
        unsure[i] = True
        groups = group_maxima(row, width, k, maxima)
        bound = kth_largest(maxima, groups, k)
        if bound <= 0 or not np.isfinite(error[i]):
            continue
        count = reaching(row, width, bound, places, most)
        if count < 0:
            continue
        score(rows, i, W, b, places, 0, count, scores)
        as_keys(scores, count, keys)
        word[0] = kth_largest(keys, count, k)  # of positive numbers, key and bits are the same
        number[0] = _SHRUNK * (number[0] - error[i]) if word[0] > 0 else 0.0
        if not number[0] > _LEAST:
            continue
        cut = np.int16(word[0] >> 16)
        if cut < bound:
            found = reaching(row, width, cut, likely, most)
            if found < 0:
                continue
            # Append the candidates whose exact values are not computed yet.
            left = 0
            for c in range(found):
                if row[likely[c]] < bound:
                    others[left] = likely[c]
                    left += 1
            for c in range(left):
                places[count + c] = others[c]
            score(rows, i, W, b, places, count, count + left, scores)
            count += left
        keep_largest(scores, places, count, k, keys, values[i], indices[i], descending)
        unsure[i] = False


@njit(nogil=True, cache=True)
def cuts(bound, error):  # pragma: no cover
    """Return for each row the smallest rough product, as bits, whose exact value may reach the
    bound."""
    out = np.empty(len(error), dtype=np.int16)
    word = np.empty(1, dtype=np.int32)
    number = word.view(np.float32)
    for i in range(len(error)):
        number[0] = _SHRUNK * (bound - error[i])
        out[i] = np.int16(word[0] >> 16) if number[0] > _LEAST else np.int16(1)
    return out


@njit(nogil=True, cache=True)
def gather(bits, cut, first, most):  # pragma: no cover
    """Return row, latent and bits of the rough products that reach their row's cut.

    Returns:
        Three arrays, sorted by row and latent, and False; empty arrays and True if there are more
        than ``most``.
    """
    width = bits.shape[1]
    places = np.empty(width, dtype=np.int64)
    owners = np.empty(most, dtype=np.int64)
    latents = np.empty(most, dtype=np.int64)
    found = np.empty(most, dtype=np.int16)
    count = 0
    for r in range(bits.shape[0]):
        row = bits[r]
        more = reaching(row, width, cut[first + r], places, min(width, most - count))
        if more < 0:
            return owners[:0], latents[:0], found[:0], True
        for c in range(more):
            owners[count + c], latents[count + c] = first + r, places[c]
            found[count + c] = row[places[c]]
        count += more
    return owners[:count], latents[:count], found[:count], False


@njit(nogil=True, cache=True, fastmath=REORDER)
def score_pairs(rows, W, b, owners, latents, wanted, scores, start, stop):  # pragma: no cover
    """Write the float32 pre-activations of the ``wanted`` pairs among ``start`` … ``stop``."""
    width = W.shape[1]
    for p in range(start, stop):
        if p + 1 < stop and wanted[p + 1]:
            ahead = latents[p + 1]
            for d in range(0, width, 16):
                prefetch(W, ahead, d)
        if wanted[p]:
            i, j = owners[p], latents[p]
            total = np.float32(0.0)
            for d in range(width):
                total += rows[i, d] * W[j, d]
            scores[p] = total + b[j]


@njit(nogil=True, cache=True)
def kth_score(scores, k):  # pragma: no cover
    """Return the k-th largest of positive numbers."""
    keys = np.empty(padded(len(scores)), dtype=np.int32)
    as_keys(scores, len(scores), keys)
    word = np.empty(1, dtype=np.int32)
    word[0] = kth_largest(keys, len(scores), k)
    return word.view(np.float32)[0]


@njit(nogil=True, cache=True)
def kth_rough(bits, k):  # pragma: no cover
    """Return the k-th largest of a list of rough products, as bits and as float32."""
    keys = np.empty(padded(len(bits)), dtype=np.int16)
    for i in range(len(bits)):
        keys[i] = bits[i]
    word = np.empty(1, dtype=np.int32)
    least = kth_largest(keys, len(bits), k)
    word[0] = np.int32(least) << 16
    return least, word.view(np.float32)[0]
