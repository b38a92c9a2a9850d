"""The largest pre-activations of a whole batch; takes and returns tensors.

The method is that of `reseed.sae.kernels.screening` with one bound for all rows. The first block
gives a guess g of the bound; every row contributes the candidates that may reach g. The result is
exact if at least ``count`` of them do reach g.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.sae.kernels import screening
from reseed.sae.kernels.select import BLOCK_ROWS, rough_product, screen_pays
from reseed.sae.kernels.threads import in_blocks, in_ranges

_GUESS = 1.25
"""Expected number per row above g, in units of k."""
_MOST = 16
"""Limit on candidates per row, on average over a block, in units of k; above it, no result."""

Pairs = tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]
_Block = tuple[np.ndarray, np.ndarray, np.ndarray, bool]


def select_in_batch(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    count: int,
) -> Pairs | None:
    """Return values, rows, latents of the ``count`` largest positive ones, by row and latent.

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
    """Choose exactly among the candidates that may reach the guess."""
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
