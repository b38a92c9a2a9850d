"""The largest pre-activations of every row or of a whole batch, and all that are above a floor.

The functions take and return tensors. The latents of a row are selected by
`reseed.sae.kernels.screening` where that is faster, otherwise by the float32 product. For a whole
batch the method is that of `screening` with one bound for all rows. The first block gives a guess g
of the bound; every row contributes the candidates that may reach g. The result is exact if at least
``count`` of them reach g. `active_pairs` returns the active (token, latent) pairs of a batch if
they are few.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.sae.kernels import Pairs, buffers, choice, screening
from reseed.sae.kernels.choice import LANES, compare_gt, first_one, without_first
from reseed.sae.pairs import Product, prepacked_product, thread_safe_product
from reseed.system.compiling import in_blocks, in_ranges, njit

BLOCK_ROWS = 128
"""Number of rows per block; a thread's product stays in its cache until it has been read."""
LEAST_CANDIDATES, MOST_CANDIDATES = 64, 8
"""A row with more candidates than the larger of these two limits (the second in units of k) is
selected by the float32 product."""
MIN_D_IN, MIN_LATENTS, MIN_ROWS = 64, 1024, 256
"""Minimum sizes for the rough product; below them the float32 product is faster."""

Selected = tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]


def select(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    descending: bool,
    screened: bool | None = None,
) -> Selected:
    """Return the k largest pre-activations of every row, and their latents.

    Args:
        screened: whether to use the bfloat16 product; None: use it where it is faster.
    """
    if screened is None:
        screened = screen_pays(rows, W_enc)
    rows, W, b = (each.detach().contiguous() for each in (rows, W_enc, b_enc))
    values, indices = torch.empty(len(rows), k), torch.empty(len(rows), k, dtype=torch.int64)
    if not screened:
        _exact(rows, W, b, k, descending, values, indices)
        return values, indices
    unsure = _screened(rows, W, b, k, descending, values, indices)
    if len(unsure):
        left = torch.from_numpy(unsure)
        some, which = torch.empty(len(left), k), torch.empty(len(left), k, dtype=torch.int64)
        _exact(rows[left], W, b, k, descending, some, which)
        values[left], indices[left] = some, which
    return values, indices


def screen_pays(rows: Tensor, W: Tensor) -> bool:
    """Return True if the bfloat16 product is faster for these shapes on this CPU."""
    num_latents, d_in = W.shape
    large = d_in >= MIN_D_IN and num_latents >= MIN_LATENTS and len(rows) >= MIN_ROWS
    return large and _has_bfloat16()


def _has_bfloat16() -> bool:
    """Return True if this CPU multiplies bfloat16 natively (emulation is slower than float32)."""
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return False


def _exact(
    rows: Tensor, W: Tensor, b: Tensor, k: int, descending: bool, values: Tensor, indices: Tensor
) -> None:
    """Select by the float32 product."""
    product = thread_safe_product(BLOCK_ROWS, W, b, repeats=len(rows) // BLOCK_ROWS)
    out = values.numpy(), indices.numpy()

    def task(start: int, stop: int) -> None:
        pre = product(rows[start:stop]).contiguous().numpy()
        values, indices = out[0][start:stop], out[1][start:stop]
        choice.choose(pre, k, values, indices, 0, stop - start, descending)

    in_blocks(task, len(rows), BLOCK_ROWS)


def _screened(
    rows: Tensor, W: Tensor, b: Tensor, k: int, descending: bool, values: Tensor, indices: Tensor
) -> Int[np.ndarray, " left"]:
    """Select by the bfloat16 product, and return the indices of the rows that it cannot decide."""
    product, rough, error = rough_product(rows, W, b)
    unsure = np.empty(len(rows), dtype=np.bool_)
    given = rows.numpy(), W.numpy(), b.numpy()
    most = min(len(W), max(LEAST_CANDIDATES, MOST_CANDIDATES * k))
    out = values.numpy(), indices.numpy(), unsure, descending

    def task(start: int, stop: int) -> None:
        bits = product(rough[start:stop]).view(torch.int16).numpy()
        screening.screen(bits, error, start, *given, k, most, *out)

    in_blocks(task, len(rows), BLOCK_ROWS)
    return np.flatnonzero(unsure)


def rough_product(
    rows: Tensor, W: Tensor, b: Tensor
) -> tuple[Product, Tensor, Float[np.ndarray, " batch"]]:
    """Return the product ReLU(W x + b) in bfloat16, the rounded rows, and ε of each row."""
    rough_rows, norm_x, lost_x = _rounded(rows)
    rough_W, norms_W, losts_W = _rounded(W)
    rough_b = b.bfloat16()
    norm_W, lost_W = norms_W.max(), losts_W.max()
    gamma = 2 * (rows.shape[1] + 2) * 2.0**-24
    bias = float((b - rough_b).abs().max() + gamma * b.abs().max())
    error = norm_x * lost_W + lost_x * (norm_W + lost_W)
    error += gamma * (norm_x + lost_x) * (norm_W + lost_W)
    product: Callable[[Tensor], Tensor] | None
    product = prepacked_product(BLOCK_ROWS, rough_W, rough_b, "relu")
    if product is None:
        product = lambda block: torch.nn.functional.linear(block, rough_W, rough_b).relu_()  # noqa: E731
    return product, rough_rows, (1.01 * (error + bias)).astype(np.float32)


def _rounded(exact: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return the matrix in bfloat16, its rows' norms, and the norms of the rounding residuals."""
    rough = buffers.empty(tuple(exact.shape), torch.int16)
    norms, lost = np.empty(len(exact), dtype=np.float32), np.empty(len(exact), dtype=np.float32)
    numbers, bits = exact.numpy(), rough.numpy().view(np.uint16)
    in_ranges(
        lambda start, stop: screening.rounded(numbers, bits, norms, lost, start, stop),
        len(exact),
        exact.shape[1],
    )
    return rough.view(torch.bfloat16), norms.astype(np.float64), lost.astype(np.float64)


_GUESS = 1.25
"""Expected number of pre-activations per row above g, in units of k."""
_MOST = 16
"""Maximum number of candidates per row, as a mean over a block, in units of k; with more of them
there is no result."""

_Block = tuple[np.ndarray, np.ndarray, np.ndarray, bool]


def select_in_batch(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    count: int,
) -> Pairs | None:
    """Return values, rows and latents of the ``count`` largest positive pre-activations, sorted by
    row and latent.

    Return None if rough products do not decide: the guess was too high, or the error too large.
    """
    if not screen_pays(rows, W_enc):
        return None
    rows, W, b = (each.detach().contiguous() for each in (rows, W_enc, b_enc))
    product, rough, error = rough_product(rows, W, b)
    if not np.isfinite(error).all():
        return None
    first = product(rough[:BLOCK_ROWS]).view(torch.int16).numpy()
    share = count / len(rows) * len(first)
    rank = round(_GUESS * share + 4 * share**0.5 + 4)  # blocks rarely vary by more than this
    if not 1 <= rank <= first.size:
        return None
    _, guess = screening.kth_rough(first.reshape(-1), rank)
    cut = screening.cuts(guess, error)
    most = int(_MOST * count / len(rows) * BLOCK_ROWS) + BLOCK_ROWS
    blocks: dict[int, _Block] = {0: screening.gather(first, cut, 0, most)}

    def task(start: int, stop: int) -> None:
        start, stop = start + BLOCK_ROWS, stop + BLOCK_ROWS
        bits = product(rough[start:stop]).view(torch.int16).numpy()
        blocks[start] = screening.gather(bits, cut, start, most)

    in_blocks(task, len(rows) - len(first), BLOCK_ROWS)
    if guess <= 0 or any(too_many for *_, too_many in blocks.values()):
        return None
    parts = zip(*(blocks[start][:3] for start in sorted(blocks)), strict=True)
    owners, latents, bits = (np.concatenate(each) for each in parts)
    if len(bits) < count:
        return None
    return _largest(rows, W, b, count, error, guess, owners, latents, bits)


def _largest(
    rows: Tensor,
    W: Tensor,
    b: Tensor,
    count: int,
    error: np.ndarray,
    guess: float,
    owners: np.ndarray,
    latents: np.ndarray,
    bits: np.ndarray,
) -> Pairs | None:
    """Choose by exact values among the candidates that may reach the guess."""
    scores = np.empty(len(bits), dtype=np.float32)
    given = rows.numpy(), W.numpy(), b.numpy(), owners, latents

    def compute(wanted: np.ndarray) -> None:
        in_ranges(
            lambda start, stop: screening.score_pairs(*given, wanted, scores, start, stop),
            len(scores),
            W.shape[1],
        )

    early = bits >= screening.kth_rough(bits, count)[0]
    compute(early)
    reached = screening.kth_score(scores[early], count)
    if not reached >= guess:
        return None
    late = ~early & (bits >= screening.cuts(reached, error)[owners])
    compute(late)
    places = np.flatnonzero(early | late)
    found = scores[places]
    bound = screening.kth_score(found, count)
    above = found > bound
    equal = np.flatnonzero(found == bound)[: count - int(above.sum())]
    above[equal] = True
    places = places[above]
    return tuple(torch.from_numpy(each[places]) for each in (scores, owners, latents))  # pyright: ignore


@njit(nogil=True, cache=True)
def collect(pre, floors, first, most):  # pragma: no cover
    """Return row, latent and value of each number of a block above its latent's floor (or NaN).

    Args:
        first: index of the block's first row in the batch.
        most: maximum number of pairs.

    Returns:
        Three arrays of length ``most``, sorted by row and latent, and the number of used entries;
        −1 if there are more than ``most`` pairs.
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
"""Maximum share of active pairs; above it, dense products are faster than sums over pairs."""
SCREENED, WIDE = 0.02, 128
"""Maximum share of active pairs and minimum d_in for which a rough product with an exact recheck is
faster."""
_UNEVEN = 2
"""Maximum number of pairs in a block, relative to an equal share of the pairs."""

_PairBlock = tuple[np.ndarray, np.ndarray, np.ndarray]


def active_pairs(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    floors: Float[Tensor, " num_latents"],
) -> Pairs | None:
    """Return the pre-activations above their floor, or None if their share is above `DENSEST`.

    The search stops after the first block if the share there is above `DENSEST` already.
    """
    batch, num_latents = len(rows), len(W_enc)
    product = thread_safe_product(BLOCK_ROWS, W_enc.detach(), b_enc.detach().contiguous())
    bounds = floors.detach().contiguous().numpy()
    blocks: dict[int, _PairBlock | None] = {}

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
    """Compute `active_pairs` by a bfloat16 product whose candidates are rechecked in float32.

    The product is relative to the floors, and shifted up by more than its error bound, so that its
    ReLU clips no pair. Return None if this method is not applicable.
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
