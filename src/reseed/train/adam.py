"""A step of Adam by compiled loops, row by row, in the order that ``optim.py`` defines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reseed.sae.kernels import update
from reseed.sae.kernels.threads import in_ranges

_COST = 8
"""Cost of one number's Adam update, in multiplications."""


def compiled_step(
    groups: Sequence[dict[str, Any]],
    states: Sequence[dict[str, Tensor]],
    unit: Sequence[bool],
    max_grad_norm: float | None,
) -> Tensor | None:
    """Take one step of every group, each with one parameter; gradients are left unchanged.

    Args:
        states: Adam's state of each group.
        unit: for each group, whether its parameter's rows are held at norm 1.
        max_grad_norm: None does not clip.

    Returns:
        the global norm of the gradients, projected where rows have norm 1; None without clipping.
    """
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
        lambda start, stop: update.squared_norms(grad, weight, project, squares, start, stop),
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
    with np.errstate(over="ignore"):  # a rate beyond float32 fails the run's own finiteness check
        scalars = np.array(numbers, dtype=np.float32)
    given = weight, grad, *moments, renormalise, renormalise, scalars
    in_ranges(
        lambda start, stop: update.adam(*given, start, stop), len(weight), _COST * weight.shape[1]
    )


def _rows(tensor: Tensor | None) -> np.ndarray:
    """View a tensor as a contiguous matrix; a vector becomes one row."""
    assert tensor is not None
    tensor = tensor.detach()
    return (tensor if tensor.ndim == 2 else tensor.reshape(1, -1)).numpy()
