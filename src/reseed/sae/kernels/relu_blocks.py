"""Loss and gradients of a ReLU SAE by products of blocks; takes and returns tensors.

Blocks of tokens pass through the SAE one by one, on any thread. The latents and their gradients of
several blocks are stored; then each thread adds them to the weight gradients of some latents. The
order of every sum thus depends only on the shapes, and no full [B, F] matrix is in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.sae.kernels import buffers, rectify
from reseed.sae.kernels.active import row_product
from reseed.sae.kernels.threads import in_blocks

BLOCK_ROWS = 256
"""Tokens that pass through the SAE together."""
KEPT_ROWS = 1024
"""Tokens whose latents are stored until they are added to the gradients."""
TILE_LATENTS = 2048
"""Latents whose gradients one thread adds up together."""


class Gradients(NamedTuple):
    """Loss terms and gradients, as sums over the batch (not means)."""

    squared_error: Float[Tensor, ""]
    sums: Float[Tensor, " num_latents"]
    """Σ f_j."""
    fired: Int[Tensor, " num_latents"]
    error: Float[Tensor, "batch d_in"]
    for_W_enc: Float[Tensor, "num_latents d_in"]
    for_b_enc: Float[Tensor, " num_latents"]
    for_W_dec: Float[Tensor, "num_latents d_in"]
    """Through the reconstruction."""


def relu_blocks(
    x: Float[Tensor, "batch d_in"],
    rows: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Float[Tensor, " num_latents"],
) -> Gradients:
    """Return the terms and gradients of Σ‖e‖² + Σ weight_j f_j with f = ReLU(W_enc · row + b_enc).

    Args:
        rows: the encoder's inputs: x, or x − b_dec.
        parameters: W_enc, b_enc, W_dec, b_dec.
    """
    W_enc, b_enc, W_dec, b_dec = (p.detach() for p in parameters)
    batch, width = len(x), len(W_enc)
    size, kept = min(BLOCK_ROWS, batch), min(KEPT_ROWS, batch)
    encode, decode = row_product(size, W_enc, b_enc), row_product(size, W_dec.t(), b_dec)
    into_latents = row_product(size, W_dec, None)
    for_W_enc, for_W_dec = buffers.empty_like(W_enc), buffers.empty_like(W_dec)
    latents, through = buffers.empty((kept, width)), buffers.empty((kept, width))
    errors, squares = buffers.empty_like(x), torch.empty(batch)
    scaled = torch.empty(kept, x.shape[1])  # −2e
    blocks = -(-batch // BLOCK_ROWS)
    sums, fired, for_b_enc = (np.empty((blocks, width), dtype=np.float32) for _ in range(3))
    added = weights.contiguous().numpy()

    def pass_through(start: int, stop: int) -> None:
        here, block = slice(start, stop), slice(first + start, first + stop)
        number = (first + start) // BLOCK_ROWS
        f, g = latents[here], through[here]
        rectify.rectify(encode(rows[block]).numpy(), f.numpy(), sums[number], fired[number])
        error = torch.sub(x[block], decode(f), out=errors[block])
        squares[block] = error.square().sum(1)
        torch.mul(error, -2, out=scaled[here])
        arriving = into_latents(scaled[here]).numpy()
        rectify.through(arriving, f.numpy(), added, g.numpy(), for_b_enc[number])

    def add_up(start: int, stop: int) -> None:
        tile, beta = slice(start, stop), 0 if first == 0 else 1
        for grad, left, right in (
            (for_W_dec, latents, scaled),
            (for_W_enc, through, rows[first:last]),
        ):
            part = left[: last - first, tile].t()
            grad[tile].addmm_(part, right[: last - first], beta=beta)

    for first in range(0, batch, KEPT_ROWS):
        last = min(batch, first + KEPT_ROWS)
        in_blocks(pass_through, last - first, BLOCK_ROWS)
        in_blocks(add_up, width, TILE_LATENTS)
    total = [torch.from_numpy(each.sum(0, dtype=np.float64)) for each in (sums, fired, for_b_enc)]
    return Gradients(
        squared_error=squares.sum(dtype=torch.float64).float(),
        sums=total[0].float(),
        fired=total[1].long(),
        error=errors,
        for_W_enc=for_W_enc,
        for_b_enc=total[2].float(),
        for_W_dec=for_W_dec,
    )
