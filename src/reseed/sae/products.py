"""Matrix products of an encoder or decoder with blocks of rows: no [B, F] tensor is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

CPU_ROWS = 256
"""Rows per block on the CPU, so that a block stays in the cache until it is reduced."""
ACCELERATOR_ELEMENTS = 2**28
"""Pre-activations per block on other devices: 1 GiB in float32, enough to keep them busy."""

Product = Callable[[Tensor], Tensor]
"""A function of rows [block, D] to W x + b [block, F]."""


def block_rows(rows: Float[Tensor, "batch d_in"], num_latents: int) -> int:
    """Return the number of rows per block."""
    if rows.device.type == "cpu":
        return CPU_ROWS
    return max(CPU_ROWS, ACCELERATOR_ELEMENTS // num_latents)


def pre_activation_blocks(
    rows: Float[Tensor, "batch d_in"], W_enc: Tensor, b_enc: Tensor
) -> Iterator[tuple[slice, Float[Tensor, "block num_latents"]]]:
    """Yield each block of the batch and its W_enc x + b_enc, which the next block overwrites."""
    size = block_rows(rows, len(W_enc))
    product = float32_product(min(size, len(rows)), W_enc, b_enc, repeats=len(rows) // size)
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        yield block, product(rows[block])


def float32_product(size: int, W: Tensor, b: Tensor, repeats: int) -> Product:
    """Return the product W x + b, in the dtype of the weights, for ``repeats`` blocks of ``size``
    rows. The next call may overwrite its result."""
    on_cpu = W.device.type == "cpu" and W.dtype == torch.float32
    product = prepacked_product(size, W, b) if on_cpu and repeats >= 2 else None
    if product is not None:
        return product
    buffer = W.new_empty(size, len(W))
    return lambda block: torch.addmm(b, block, W.t(), out=buffer[: len(block)])


def thread_safe_product(size: int, W: Tensor, b: Tensor, repeats: int = 2) -> Product:
    """Return `float32_product` for threads that call it at the same time."""
    product = prepacked_product(size, W, b) if repeats >= 2 else None
    return product or (lambda block: torch.addmm(b, block, W.t()))


def prepacked_product(size: int, W: Tensor, b: Tensor, post: str = "none") -> Product | None:
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
        packed = torch.ops.mkldnn._reorder_linear_weight(W.detach().contiguous(), size)
        linear = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return None
    return lambda block: linear(block, packed, b, post, [], "")
