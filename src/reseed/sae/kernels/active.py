"""The active (token, latent) pairs of a batch, if they are few; takes and returns tensors."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reseed.sae.kernels import Pairs, screening
from reseed.sae.kernels.select import BLOCK_ROWS, rough_product, screen_pays
from reseed.sae.kernels.simd import LANES, compare_gt, first_one, without_first
from reseed.sae.products import thread_safe_product
from reseed.system.compiling import in_blocks, in_ranges, njit


@njit(nogil=True, cache=True)
def collect(pre, floors, first, most):  # pragma: no cover
    """Return row, latent and value of each number of a block above its latent's floor (or NaN).

    Args:
        first: index of the block's first row in the batch.
        most: largest number of pairs.

    Returns:
        Three arrays of length ``most``, sorted by row and latent, and how many entries are used; −1
        if there are more than ``most``.
    """
    rows, width = pre.shape
    owners = np.empty(most, dtype=np.int64)
    latents = np.empty(most, dtype=np.int64)
    values = np.empty(most, dtype=np.float32)
    whole = width // LANES * LANES
    count = 0
    for r in range(rows):
        row = pre[r]
        for start in range(0, whole, LANES):
            bits = compare_gt(row, start, floors)  # pyright: ignore
            while bits != 0:
                if count == most:
                    return owners, latents, values, -1
                j = start + first_one(bits)
                bits = without_first(bits)
                owners[count], latents[count], values[count] = first + r, j, row[j]
                count += 1
        for j in range(whole, width):
            if not row[j] <= floors[j]:
                if count == most:
                    return owners, latents, values, -1
                owners[count], latents[count], values[count] = first + r, j, row[j]
                count += 1
    return owners, latents, values, count


DENSEST = 1 / 8
"""Above this share of active pairs, dense products are faster than sums over pairs."""
SCREENED, WIDE = 0.02, 128
"""Up to this share of pairs, and from this d_in on, a rough product and a recheck are faster."""
_UNEVEN = 2
"""A block may have this many times its share of the pairs."""

_Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def active_pairs(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    floors: Float[Tensor, " num_latents"],
) -> Pairs | None:
    """Return the pre-activations above their floor, or None if their share is above `DENSEST`.

    It stops after the first block if the share is above `DENSEST` there already.
    """
    batch, num_latents = len(rows), len(W_enc)
    product = thread_safe_product(BLOCK_ROWS, W_enc.detach(), b_enc.detach().contiguous())
    bounds = floors.detach().contiguous().numpy()
    blocks: dict[int, _Block | None] = {}

    def task(start: int, stop: int) -> None:
        if None in blocks.values():
            return
        share = DENSEST * (1 if start == 0 else _UNEVEN)
        most = 1 + int(share * (stop - start) * num_latents)
        pre = product(rows[start:stop]).numpy()
        owners, latents, values, count = collect(pre, bounds, start, most)
        found = owners[:count].copy(), latents[:count].copy(), values[:count].copy()
        blocks[start] = found if count >= 0 else None

    in_blocks(task, min(batch, BLOCK_ROWS), BLOCK_ROWS)
    if blocks[0] is None:
        return None
    if len(blocks[0][0]) <= SCREENED * BLOCK_ROWS * num_latents and W_enc.shape[1] >= WIDE:
        found = screened(rows, W_enc, b_enc, floors)
        if found is not None:
            return found
    in_blocks(
        lambda start, stop: task(start + BLOCK_ROWS, stop + BLOCK_ROWS),
        max(0, batch - BLOCK_ROWS),
        BLOCK_ROWS,
    )
    parts = [blocks[start] for start in sorted(blocks)]
    found = [part for part in parts if part is not None]
    pairs = sum(len(owners) for owners, *_ in found)
    if len(found) < len(parts) or pairs > 1 + DENSEST * batch * num_latents:
        return None
    owners, latents, values = (np.concatenate(each) for each in zip(*found, strict=True))
    return torch.from_numpy(values), torch.from_numpy(owners), torch.from_numpy(latents)


def screened(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    floors: Float[Tensor, " num_latents"],
) -> Pairs | None:
    """Return `active_pairs` by a bfloat16 product whose candidates are rechecked in float32.

    The product is relative to the floors, and shifted up by more than its error bound, so that its
    ReLU clips no pair. Return None if this method does not apply.
    """
    if not screen_pays(rows, W_enc):
        return None
    rows, W, b, floors = (each.detach().contiguous() for each in (rows, W_enc, b_enc, floors))
    above = b - floors
    largest = rows.norm(dim=1).max() * W.norm(dim=1).max()
    shift = 1.1 * float(2.0**-8 * largest + 2.0**-8 * above.abs().max()) + 1e-20
    product, rough, error = rough_product(rows, W, above + shift)
    if not (error < 0.99 * shift).all():  # NaN too
        return None
    cut = screening.cuts(np.float32(shift), error)
    most = 1 + int(_UNEVEN * 2 * SCREENED * BLOCK_ROWS * len(W))
    blocks: dict[int, tuple[np.ndarray, np.ndarray] | None] = {}

    def task(start: int, stop: int) -> None:
        if None not in blocks.values():
            bits = product(rough[start:stop]).view(torch.int16).numpy()
            owners, latents, _, too_many = screening.gather(bits, cut, start, most)
            blocks[start] = None if too_many else (owners.copy(), latents.copy())

    in_blocks(task, len(rows), BLOCK_ROWS)
    parts = [blocks[start] for start in sorted(blocks)]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    owners, latents = (np.concatenate(each) for each in zip(*found, strict=True))
    scores = np.empty(len(owners), dtype=np.float32)
    wanted = np.ones(len(owners), dtype=np.bool_)
    given = rows.numpy(), W.numpy(), b.numpy(), owners, latents, wanted, scores
    in_ranges(
        lambda start, stop: screening.score_pairs(*given, start, stop), len(scores), W.shape[1]
    )
    kept = np.flatnonzero(~(scores <= floors.numpy()[latents]))
    values, owners, latents = (torch.from_numpy(each[kept]) for each in (scores, owners, latents))
    return values, owners, latents
