"""The encoder's matrix product, for blocks of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

CPU_ROWS = 256
"""Rows per block on the CPU, so that a block stays in the cache until it is reduced."""
ACCELERATOR_ELEMENTS = 2**28
"""Pre-activations per block on other devices: 1 GiB in float32, enough to keep them busy."""

Product = Callable[[Tensor], Tensor]
"""A function of rows [block, D] to W x + b [block, F]. The next call may overwrite its result."""


def block_rows(rows: Float[Tensor, "batch d_in"], num_latents: int) -> int:
    """Return the number of rows per block."""
    if rows.device.type == "cpu":
        return CPU_ROWS
    return max(CPU_ROWS, ACCELERATOR_ELEMENTS // num_latents)


def float32_product(size: int, W_enc: Tensor, b_enc: Tensor, repeats: int) -> Product:
    """Return the product W_enc x + b_enc, in the dtype of the weights, for ``repeats`` blocks of
    ``size`` rows."""
    on_cpu = W_enc.device.type == "cpu" and W_enc.dtype == torch.float32
    product = prepacked_product(size, W_enc, b_enc) if on_cpu and repeats >= 2 else None
    if product is not None:
        return product
    buffer = W_enc.new_empty(size, len(W_enc))
    return lambda block: torch.addmm(b_enc, block, W_enc.t(), out=buffer[: len(block)])


def prepacked_product(
    size: int, W_enc: Tensor, b_enc: Tensor, post: str = "none"
) -> Product | None:
    """Return oneDNN's product with the weight packed once for all blocks; None without oneDNN.

    On CPUs where MKL is slow (AMD) this saves a quarter of the time or more. `torch.compile` emits
    these operators for a linear layer with frozen weights. They are not public, so the caller must
    be able to do without them.

    Args:
        post: ``relu`` to clip the result at 0.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(W_enc.detach().contiguous(), size)
        linear = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return None
    return lambda block: linear(block, packed, b_enc, post, [], "")
