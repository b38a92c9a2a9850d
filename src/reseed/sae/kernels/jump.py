"""What JumpReLU and gates make of (token, latent) pairs, with their sums over tokens.

Sums go over the pairs in their order, in float64.
"""

from __future__ import annotations

import numpy as np

from reseed.compiling import njit


@njit(nogil=True, cache=True)
def jump(half, pre, latents, threshold, out, near, fired, near_tokens):  # pragma: no cover
    """out = π where π > θ, else 0 (NaN stays NaN); ``near`` where |π − θ| < ``half``.

    Counts of both, per latent, are added to ``fired`` and ``near_tokens``.
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
def through_jump(grad, values, latents, near, out, into_threshold):  # pragma: no cover
    """out = gradient where the value is above 0; Σ of the gradients near θ, per latent."""
    for p in range(len(grad)):
        out[p] = grad[p] if values[p] > 0 else np.float32(0.0)
        if near[p]:
            into_threshold[latents[p]] += grad[p]


@njit(nogil=True, cache=True)
def gate(shared, latents, b_enc, ratio, b_mag, opened, out, fired):  # pragma: no cover
    """π = shared + b_enc, which is above 0 here, and f = ReLU(ratio · shared + b_mag).

    Counts of f > 0 are added to ``fired``; the sum of π is returned.
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
def through_gate(
    by_value, by_gate, values, shared, latents, ratio, out, into_bias, into_ratio, into_gate
):  # pragma: no cover
    """Gradient of each pair's shared pre-activation, from those of f and of π.

    Sums per latent of what arrives at b_mag, at the ratio and at b_enc are added to the last three.
    """
    for p in range(len(shared)):
        j = latents[p]
        magnitude = by_value[p] if values[p] > 0 else np.float32(0.0)
        into_bias[j] += magnitude
        into_ratio[j] += magnitude * shared[p]
        into_gate[j] += by_gate[p]
        out[p] = by_gate[p] + magnitude * ratio[j]
