"""One step of Adam, row by row: a row stays in the cache from the gradient to the norm.

`reseed.train.optim.base` defines the order of clipping, projection, update and renormalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reseed.sae.kernels.choice import REORDER
from reseed.system.compiling import in_ranges, njit

_TINY = np.float32(np.finfo(np.float32).tiny)


@njit(nogil=True, cache=True, fastmath=REORDER)
def _parallel(grad, weight, i):  # pragma: no cover
    total = np.float32(0.0)
    for c in range(weight.shape[1]):
        total += grad[i, c] * weight[i, c]
    return total


@njit(nogil=True, cache=True, fastmath=REORDER)
def squared_norms(grad, weight, project, squares, start, stop):  # pragma: no cover
    """Write ‖g‖² of every row; with ``project``, g is taken without its component along the
    weight's row."""
    for i in range(start, stop):
        along = _parallel(grad, weight, i) if project else np.float32(0.0)
        total = np.float32(0.0)
        for c in range(grad.shape[1]):
            one = grad[i, c] - along * weight[i, c]
            total += one * one
        squares[i] = total


@njit(nogil=True, cache=True, fastmath=REORDER, error_model="numpy")
def adam(
    weight, grad, first, second, project, renormalise, numbers, start, stop
):  # pragma: no cover
    """Update the rows ``start`` … ``stop`` in place; the gradient is not changed.

    Args:
        first, second: Adam's moments.
        project: remove from each row of the gradient its component along the weight's row.
        renormalise: scale rows to norm 1 at the end; a row of zeros stays.
        numbers: float32 array: clipping factor, 1 − β₁, β₂, 1 − β₂, 1 − lr · decay, lr / (1 − β₁ᵗ),
            √(1 − β₂ᵗ), ε.
    """
    width = weight.shape[1]
    factor, rate1, keep2, rate2 = numbers[0], numbers[1], numbers[2], numbers[3]
    decay, step, correction, eps = numbers[4], numbers[5], numbers[6], numbers[7]
    for i in range(start, stop):
        along = _parallel(grad, weight, i) if project else np.float32(0.0)
        total = np.float32(0.0)
        for c in range(width):
            g = factor * (grad[i, c] - along * weight[i, c])
            m = first[i, c] + rate1 * (g - first[i, c])
            v = keep2 * second[i, c] + rate2 * (g * g)
            first[i, c], second[i, c] = m, v
            w = decay * weight[i, c] - step * m / (np.sqrt(v) / correction + eps)
            weight[i, c] = w
            total += w * w
        if renormalise:
            norm = max(np.sqrt(total), _TINY)
            for c in range(width):
                weight[i, c] /= norm


_COST = 8
"""Cost of the Adam update of one number, in multiplications."""


def compiled_step(
    groups: Sequence[dict[str, Any]],
    states: Sequence[dict[str, Tensor]],
    unit: Sequence[bool],
    max_grad_norm: float | None,
) -> Tensor | None:
    """Take one step; see `reseed.sae.kernels.adam_step`."""
    norm, factor = None, 1.0
    if max_grad_norm is not None:
        squares = sum(_squared_norm(g["params"][0], u) for g, u in zip(groups, unit, strict=True))
        norm = torch.tensor(math.sqrt(squares))  # NaN and infinities pass through
        factor = float((max_grad_norm / (norm + 1e-6)).clamp_max_(1.0))
    for group, state, renormalise in zip(groups, states, unit, strict=True):
        _adam(group, state, renormalise, factor)
    return norm


def _squared_norm(parameter: Tensor, project: bool) -> float:
    grad, weight = _rows(parameter.grad), _rows(parameter)
    squares = np.empty(len(grad), dtype=np.float32)
    in_ranges(
        lambda start, stop: squared_norms(grad, weight, project, squares, start, stop),
        len(grad),
        2 * grad.shape[1],
    )
    return float(squares.sum(dtype=np.float64))


def _adam(
    group: dict[str, Any], state: dict[str, Tensor], renormalise: bool, factor: float
) -> None:
    parameter = group["params"][0]
    state["step"] += 1
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    numbers = (
        factor,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - group["lr"] * group["weight_decay"],
        group["lr"] / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        group["eps"],
    )
    weight, grad = _rows(parameter), _rows(parameter.grad)
    moments = _rows(state["exp_avg"]), _rows(state["exp_avg_sq"])
    with np.errstate(over="ignore"):  # a rate beyond float32 makes the weights fail a later check
        scalars = np.array(numbers, dtype=np.float32)
    given = weight, grad, *moments, renormalise, renormalise, scalars
    in_ranges(lambda start, stop: adam(*given, start, stop), len(weight), _COST * weight.shape[1])


def _rows(tensor: Tensor | None) -> np.ndarray:
    """View a tensor as a contiguous matrix; a vector becomes one row."""
    assert tensor is not None
    tensor = tensor.detach()
    return (tensor if tensor.ndim == 2 else tensor.reshape(1, -1)).numpy()
