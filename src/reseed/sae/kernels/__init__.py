"""Compiled loops (numba) for a training step of an SAE on the CPU, in float32.

This module is their whole interface: functions from tensors to tensors. A caller asks `supports`
first, and has a plain PyTorch path for other devices and dtypes and for when the loops are off: by
the environment (``RESEED_KERNELS=0``), by `override_enabled`, or because numba is not installed.
Both paths give the same result up to the order of their sums. One thread takes each sum, in an
order that only the shapes decide, so results repeat bit for bit for any number of threads.

    encode and select   `topk_per_row`, `topk_in_batch`, `active_pairs`
    loss and gradient   by pairs: `group_pairs`, `jump`, `gate`; by blocks: `relu_blocks_loss`
    sums                `column_sums`, `total_variance`
    update              `adam_step`
    memory              `empty_like`

The loops are in the other modules of this package, which no module outside it imports. `_loops`
imports them on first use, because numba is optional and takes a second to load.

    buffers     reuse of an earlier step's memory for large results
    choice      the k largest of a row, and vectorised comparisons
    screening   exact top k through a rough product, on each block while it is in the cache
    select      the k largest of every row or of a batch; pre-activations above a floor
    pairs       sums over (token, latent) pairs: decoder, error, gradients; JumpReLU and gates
    relu_blocks ReLU's loss and gradients by products of blocks; sums over a batch
    update      clipping, projection, Adam and renormalisation, row by row
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.sae.kernels.buffers import empty_like as empty_like

VARIABLE = "RESEED_KERNELS"

_switch: bool | None = None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def enabled() -> bool:
    """Return True if kernels are in use."""
    if _switch is not None:
        return _switch
    return os.environ.get(VARIABLE, "1") != "0" and _installed()


@contextmanager
def override_enabled(on: bool) -> Iterator[None]:
    """Turn kernels on or off inside the context, overriding the environment."""
    global _switch
    before, _switch = _switch, on
    try:
        yield
    finally:
        _switch = before


def supports(*tensors: Tensor) -> bool:
    """Return True if kernels are on and support these: float32 on the CPU, without autocast."""
    if torch.is_autocast_enabled("cpu"):
        return False
    return enabled() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


@cache
def _loops(module: str) -> Any:
    """Import a module of this package, and numba with it."""
    return importlib.import_module(f"{__name__}.{module}")


# Encode and select

Pairs = tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]
"""Values, tokens and latents of a flat list of pairs, sorted by token and then by latent."""


def topk_per_row(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    descending: bool,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k largest pre-activations W_enc x + b_enc of every row, and their latents."""
    return _loops("select").select(rows, W_enc, b_enc, k, descending)


def topk_in_batch(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    count: int,
) -> Pairs | None:
    """Return the ``count`` largest positive pre-activations of the batch; None if rough products
    do not decide it."""
    return _loops("select").select_in_batch(rows, W_enc, b_enc, count)


def active_pairs(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    floors: Float[Tensor, " num_latents"],
) -> Pairs | None:
    """Return the pre-activations W_enc x + b_enc that are above their latent's floor, or NaN.

    Return None if they are so many that products of blocks are faster than sums over pairs. Only
    the values decide this.
    """
    return _loops("select").active_pairs(rows, W_enc, b_enc, floors)


# Loss and gradient over pairs


class GroupedPairs(Protocol):
    """The (token, latent) pairs of a batch, sorted by token, and sums over them."""

    def fired(self, weights: Float[Tensor, "*pairs"]) -> Int[Tensor, " num_latents"]:
        """Return the number of pairs of each latent with a weight above 0."""
        ...

    def per_token(
        self, weights: Float[Tensor, "*pairs"], W: Float[Tensor, "num_latents d_in"]
    ) -> Float[Tensor, "batch d_in"]:
        """Return for each token Σ over its latents of weight × row of W."""
        ...

    def inner_products(
        self, rows: Float[Tensor, "batch d_in"], W: Float[Tensor, "num_latents d_in"]
    ) -> Float[Tensor, " pairs"]:
        """Return for each pair the token's row · the latent's row of W."""
        ...

    def per_latent(
        self,
        weights: Float[Tensor, "*pairs"],
        rows: Float[Tensor, "batch d_in"],
        factor: float = 1.0,
    ) -> tuple[Float[Tensor, "num_latents d_in"], Float[Tensor, " num_latents"]]:
        """Return for each latent factor × Σ over its tokens of weight × row, and of the weight."""
        ...

    def error(
        self,
        weights: Float[Tensor, "*pairs"],
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "num_latents d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, " pairs"], Float[Tensor, ""]]:
        """Return e = x − (Σ weight × row of W + b_dec), each pair's e · row of W, and Σ‖e‖²."""
        ...


def group_pairs(
    indices: Int[Tensor, "*pairs"], owners: Tensor | None, batch: int, num_latents: int
) -> GroupedPairs:
    """Prepare pairs for sums.

    Args:
        indices: latent of each pair: a table [B, k], or a flat list.
        owners: token of each pair of a flat list, ascending; None for a table.
        batch: number of tokens.
    """
    return _loops("pairs").Grouped(indices, owners, batch, num_latents)


def jump(
    pre: Float[Tensor, " pairs"],
    latents: Int[Tensor, " pairs"],
    threshold: Float[Tensor, " num_latents"],
    width: float,
) -> tuple[
    Float[Tensor, " pairs"],
    Bool[Tensor, " pairs"],
    Int[Tensor, " num_latents"],
    Int[Tensor, " num_latents"],
]:
    """Apply JumpReLU: π where π > θ, else 0 (NaN stays NaN).

    Returns:
        The values; whether |π − θ| < width/2; and per latent the numbers of pairs above θ and near.
    """
    values, near = torch.empty_like(pre), torch.empty(len(pre), dtype=torch.bool)
    fired, near_tokens = (torch.zeros(len(threshold), dtype=torch.int64) for _ in range(2))
    tensors = (pre, latents, threshold.contiguous(), values, near, fired, near_tokens)
    _loops("pairs").jump(np.float32(width / 2), *(t.numpy() for t in tensors))
    return values, near, fired, near_tokens


def jump_backward(
    grad: Float[Tensor, " pairs"],
    values: Float[Tensor, " pairs"],
    latents: Int[Tensor, " pairs"],
    near: Bool[Tensor, " pairs"],
    num_latents: int,
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " num_latents"]]:
    """Return the gradient where the value is > 0, else 0; and, per latent in float64, the sum of
    the gradients near θ."""
    out, into_threshold = torch.empty_like(grad), torch.zeros(num_latents, dtype=torch.float64)
    tensors = (grad, values, latents, near, out, into_threshold)
    _loops("pairs").jump_backward(*(t.numpy() for t in tensors))
    return out, into_threshold


def gate(
    shared: Float[Tensor, " pairs"],
    latents: Int[Tensor, " pairs"],
    b_enc: Float[Tensor, " num_latents"],
    ratio: Float[Tensor, " num_latents"],
    b_mag: Float[Tensor, " num_latents"],
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"], Int[Tensor, " num_latents"], float]:
    """Compute both paths of a gated SAE for pairs whose gate is open.

    Returns:
        π = shared + b_enc; f = ReLU(ratio · shared + b_mag); per latent the number of f > 0; Σ π.
    """
    opened, values = torch.empty_like(shared), torch.empty_like(shared)
    fired = torch.zeros(len(b_enc), dtype=torch.int64)
    given = (shared, latents, *(p.detach().contiguous() for p in (b_enc, ratio, b_mag)))
    total = _loops("pairs").gate(*(t.numpy() for t in (*given, opened, values, fired)))
    return opened, values, fired, total


def gate_backward(
    by_value: Float[Tensor, " pairs"],
    by_gate: Float[Tensor, " pairs"],
    values: Float[Tensor, " pairs"],
    shared: Float[Tensor, " pairs"],
    latents: Int[Tensor, " pairs"],
    ratio: Float[Tensor, " num_latents"],
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, "3 num_latents"]]:
    """Return the gradient of ``shared`` from those of f and π; and, per latent in float64, the
    gradients of b_mag, of the ratio and of b_enc."""
    grad, sums = torch.empty_like(shared), torch.zeros(3, len(ratio), dtype=torch.float64)
    given = (by_value, by_gate, values, shared, latents, ratio, grad, *sums)
    _loops("pairs").gate_backward(*(t.numpy() for t in given))
    return grad, sums


# Loss and gradient by blocks


class ReLUGradients(NamedTuple):
    """Loss terms and gradients of a ReLU SAE, as sums over the batch (not means)."""

    squared_error: Float[Tensor, ""]
    sums: Float[Tensor, " num_latents"]
    """Σ f_j."""
    fired: Int[Tensor, " num_latents"]
    error: Float[Tensor, "batch d_in"]
    for_W_enc: Float[Tensor, "num_latents d_in"]
    for_b_enc: Float[Tensor, " num_latents"]
    for_W_dec: Float[Tensor, "num_latents d_in"]
    """Through the reconstruction."""


def relu_blocks_loss(
    x: Float[Tensor, "batch d_in"],
    rows: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Float[Tensor, " num_latents"],
) -> ReLUGradients:
    """Return the terms and gradients of Σ‖e‖² + Σ weight_j f_j with f = ReLU(W_enc · row + b_enc).

    Args:
        rows: the encoder's inputs: x, or x − b_dec.
        parameters: W_enc, b_enc, W_dec, b_dec.
    """
    return _loops("relu_blocks").relu_blocks(x, rows, parameters, weights)


# Sums


def column_sums(
    rows: Float[Tensor, "rows d_in"], weights: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, " d_in"]:
    """Return Σ weight × row; weights default to 1."""
    return _loops("relu_blocks").column_sums(rows, weights)


def total_variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Return Σ‖x − x̄‖²."""
    return _loops("relu_blocks").total_variance(x)


# Update


def adam_step(
    groups: Sequence[dict[str, Any]],
    states: Sequence[dict[str, Tensor]],
    unit: Sequence[bool],
    max_grad_norm: float | None,
) -> Tensor | None:
    """Take one step of Adam for every group, each with one parameter; gradients do not change.

    Args:
        states: Adam's state of each group.
        unit: for each group, whether its parameter's rows are held at norm 1.
        max_grad_norm: None does not clip.

    Returns:
        the global norm of the gradients, projected where rows have norm 1; None without clipping.
    """
    return _loops("update").compiled_step(groups, states, unit, max_grad_norm)
