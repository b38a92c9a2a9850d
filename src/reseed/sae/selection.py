"""Which k latents are the largest, for every token, without a [B, F] tensor in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.sae.product import block_rows, float32_product
from reseed.sae.screen import screen_pays, screened_select
from reseed.sae.tournament import largest


@torch.no_grad()
def select(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    descending: bool = False,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest pre-activations W_enc x + b_enc of every row, and their latents.

    Args:
        descending: the largest first (costs a little); otherwise in no particular order.
    """
    if screen_pays(rows, W_enc):
        return screened_select(rows, W_enc, b_enc, k, descending)
    values = rows.new_empty(len(rows), k)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    size = block_rows(rows, len(W_enc))
    product = float32_product(min(size, len(rows)), W_enc, b_enc, repeats=len(rows) // size)
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        values[block], indices[block] = largest(product(rows[block]), k, descending)
    return values, indices
