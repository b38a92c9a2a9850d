"""JumpReLU and gates on (token, latent) pairs, with their sums over tokens.

Sums run over the pairs in order, in float64.
"""

from __future__ import annotations

import numpy as np

from reseed.compiling import njit


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
def through_jump(grad, values, latents, near, out, into_threshold):  # pragma: no cover
    """Write out = gradient where the value is > 0, else 0; sum the gradients near θ by latent."""
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
def through_gate(
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
