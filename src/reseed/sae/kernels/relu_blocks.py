"""Sums over a batch, and the loss and gradients of a ReLU SAE by products of blocks.

Sums over rows are computed in portions that depend only on the shape. For the loss, blocks of
tokens pass through the SAE one by one, on any thread. The latents of several blocks and their
gradients are stored; then each thread adds them to the weight gradients of some latents. The order
of every sum thus depends only on the shapes, and no full [B, F] matrix is in memory.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.kernels import ReLUGradients, buffers
from reseed.sae.kernels.choice import REORDER
from reseed.sae.pairs import thread_safe_product
from reseed.system.compiling import in_blocks, in_ranges, njit

PART = 64
"""Number of rows per portion; one thread adds them up."""


@njit(nogil=True, cache=True, fastmath=REORDER)
def part_sums(rows, weights, parts, start, stop):  # pragma: no cover
    """Write Σ weight · row for each of the portions ``start`` … ``stop``."""
    width = rows.shape[1]
    for part in range(start, stop):
        parts[part, :] = 0.0
        for i in range(part * PART, min((part + 1) * PART, rows.shape[0])):
            weight = weights[i]
            if weight != 0:
                for c in range(width):
                    parts[part, c] += weight * rows[i, c]


@njit(nogil=True, cache=True, fastmath=REORDER)
def squared_distances(rows, centre, squares, start, stop):  # pragma: no cover
    """Write ‖row − centre‖² of the rows ``start`` … ``stop``."""
    for i in range(start, stop):
        total = np.float32(0.0)
        for c in range(rows.shape[1]):
            away = rows[i, c] - centre[c]
            total += away * away
        squares[i] = total


def column_sums(
    rows: Float[Tensor, "rows d_in"], weights: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, " d_in"]:
    return torch.from_numpy(_column_sums(rows, weights).astype(np.float32))


def _column_sums(rows: Tensor, weights: Tensor | None = None) -> np.ndarray:
    numbers = rows.detach().contiguous().numpy()
    given = np.ones(len(rows), dtype=np.float32) if weights is None else weights.contiguous()
    parts = np.empty((-(-len(rows) // PART), rows.shape[1]), dtype=np.float32)
    in_ranges(
        lambda start, stop: part_sums(numbers, np.asarray(given), parts, start, stop),
        len(parts),
        PART * rows.shape[1],
    )
    return parts.sum(0, dtype=np.float64)


def total_variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    mean = (_column_sums(x) / len(x)).astype(np.float32)
    numbers = x.detach().contiguous().numpy()
    squares = np.empty(len(x), dtype=np.float32)
    in_ranges(
        lambda start, stop: squared_distances(numbers, mean, squares, start, stop),
        len(x),
        x.shape[1],
    )
    return torch.tensor(squares.sum(dtype=np.float64), dtype=torch.float32)


_TILE = 1024  # latents per pass, so that their sums stay in the L1 cache


@njit(nogil=True, cache=True)
def relu_forward(pre, out, sums, fired):  # pragma: no cover
    """Write out = max(pre, 0) (NaN stays NaN), Σ out, and the number of tokens with out > 0."""
    rows, width = pre.shape
    zero, one = np.float32(0.0), np.float32(1.0)
    for left in range(0, width, _TILE):
        right = min(width, left + _TILE)
        sums[left:right] = zero
        fired[left:right] = zero
        for r in range(rows):
            for j in range(left, right):
                value = pre[r, j]
                value = zero if value <= zero else value
                out[r, j] = value
                sums[j] += value
                fired[j] += one if value > zero else zero


@njit(nogil=True, cache=True)
def relu_backward(grad, latents, added, out, sums):  # pragma: no cover
    """Write out = grad + added[latent] where the latent is above 0, else 0, and Σ out."""
    rows, width = grad.shape
    zero = np.float32(0.0)
    for left in range(0, width, _TILE):
        right = min(width, left + _TILE)
        sums[left:right] = zero
        for r in range(rows):
            for j in range(left, right):
                value = grad[r, j] + added[j]
                value = value if latents[r, j] > zero else zero
                out[r, j] = value
                sums[j] += value


BLOCK_ROWS = 256
"""Number of tokens that pass through the SAE together."""
STORED_ROWS = 1024
"""Number of tokens whose latents are stored until they are added to the gradients."""
TILE_LATENTS = 2048
"""Number of latents whose gradients one thread adds up together."""


def relu_blocks(
    x: Float[Tensor, "batch d_in"],
    rows: Float[Tensor, "batch d_in"],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Float[Tensor, " num_latents"],
) -> ReLUGradients:
    """Return the loss terms and gradients; see `reseed.sae.kernels.relu_blocks_loss`."""
    W_enc, b_enc, W_dec, b_dec = (p.detach() for p in parameters)
    batch, width = len(x), len(W_enc)
    size, kept = min(BLOCK_ROWS, batch), min(STORED_ROWS, batch)
    encode = thread_safe_product(size, W_enc, b_enc.contiguous())
    decode = thread_safe_product(size, W_dec.t(), b_dec.contiguous())
    into_latents = thread_safe_product(size, W_dec, W_dec.new_zeros(width))
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
        relu_forward(encode(rows[block]).numpy(), f.numpy(), sums[number], fired[number])
        error = torch.sub(x[block], decode(f), out=errors[block])
        squares[block] = error.square().sum(1)
        torch.mul(error, -2, out=scaled[here])
        arriving = into_latents(scaled[here]).numpy()
        relu_backward(arriving, f.numpy(), added, g.numpy(), for_b_enc[number])

    def add_up(start: int, stop: int) -> None:
        tile, beta = slice(start, stop), 0 if first == 0 else 1
        for grad, left, right in (
            (for_W_dec, latents, scaled),
            (for_W_enc, through, rows[first:last]),
        ):
            part = left[: last - first, tile].t()
            grad[tile].addmm_(part, right[: last - first], beta=beta)

    for first in range(0, batch, STORED_ROWS):
        last = min(batch, first + STORED_ROWS)
        in_blocks(pass_through, last - first, BLOCK_ROWS)
        in_blocks(add_up, width, TILE_LATENTS)
    total = [torch.from_numpy(each.sum(0, dtype=np.float64)) for each in (sums, fired, for_b_enc)]
    return ReLUGradients(
        squared_error=squares.sum(dtype=torch.float64).float(),
        sums=total[0].float(),
        fired=total[1].long(),
        error=errors,
        for_W_enc=for_W_enc,
        for_b_enc=total[2].float(),
        for_W_dec=for_W_dec,
    )
