"""Selection of the largest latents per token or per batch, without a [B, F] tensor."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from reseed.distributed.process_group import current_batch_group
from reseed.sae import kernels
from reseed.sae.pairs import pre_activation_blocks

_ARITY = 4
"""Number of elements per group."""


def topk_select(
    rows: Shaped[Tensor, "batch width"], k: int, descending: bool = False
) -> tuple[Shaped[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the result of `torch.topk`, on the CPU by a tournament that compares fewer elements.

    The k largest lie in the k groups with the largest maxima: find those groups (recursively), then
    choose among their elements. A group is strided, so that maxima run over contiguous memory.
    """
    count, width = rows.shape
    groups, rest = divmod(width, _ARITY)
    if rest or groups < 2 * k or rows.device.type != "cpu":
        return rows.topk(k, dim=1, sorted=descending)
    members = rows.view(count, _ARITY, groups)
    _, best = topk_select(members.amax(1), k)
    chosen = members.gather(2, best[:, None].expand(-1, _ARITY, -1)).flatten(1)
    values, place = chosen.topk(k, dim=1, sorted=descending)
    return values, (place // k) * groups + best.gather(1, place % k)


@torch.no_grad()
def select(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
    descending: bool = False,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k largest pre-activations W_enc x + b_enc of every row, and their latents.

    Args:
        descending: sort, the largest first (slightly slower); otherwise the order is arbitrary.
    """
    if kernels.supports(rows, W_enc, b_enc):
        return kernels.topk_per_row(rows, W_enc, b_enc, k, descending)
    values = rows.new_empty(len(rows), k)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    for block, pre in pre_activation_blocks(rows, W_enc, b_enc):
        values[block], indices[block] = topk_select(pre, k, descending)
    return values, indices


@torch.no_grad()
def select_in_groups(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the largest pre-activation in each of k groups of neighbouring latents, and its
    latent."""
    values = rows.new_empty(len(rows), k)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    first = torch.arange(0, len(W_enc), len(W_enc) // k, device=rows.device)
    for block, pre in pre_activation_blocks(rows, W_enc, b_enc):
        largest_of_each = pre.unflatten(1, (k, -1)).max(dim=2)
        values[block], indices[block] = largest_of_each.values, largest_of_each.indices + first
    return values, indices


_FIRST_GUESS = 2
"""Number of candidates that each row first sends to `select_in_batch`, in units of k."""
_FIRST_SHARE = 1.25
"""Number of candidates per row that each rank first sends, in units of k."""


@torch.no_grad()
def select_in_batch(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    k: float,
) -> tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return the k·B (rounded, at least 1) largest positive pre-activations of the batch.

    If several ranks share the batch, the largest are chosen over the whole batch; this rank gets
    those in its own rows.

    Returns:
        Values, rows and latents of the pairs, sorted by row and then by latent.
    """
    ranks = current_batch_group()
    if not ranks.several:
        return _largest_in_batch(rows, W_enc, b_enc, max(1, round(k * len(rows))))
    whole = max(1, round(k * len(rows) * ranks.count))
    wanted = math.ceil(_FIRST_SHARE * whole / ranks.count)
    while True:
        wanted = min(wanted, whole, len(rows) * len(W_enc))
        values, owners, latents = _largest_in_batch(rows, W_enc, b_enc, wanted)
        bound, before, equal = _cut(ranks.gather(values), whole, ranks.index)
        # A rank that sent nothing below the cut may hold more above it.
        short = len(values) == wanted < min(whole, len(rows) * len(W_enc))
        short = short and bool(values.min() > bound)
        if not int(ranks.max_(torch.tensor(int(short), device=rows.device))):
            break
        wanted *= 2
    kept = ~(values <= bound)  # keeps NaN, so that it reaches the loss
    at_bound = (values == bound).nonzero().squeeze(1)
    kept[at_bound[: max(0, equal - before)]] = True
    return values[kept], owners[kept], latents[kept]


def _cut(everyones: list[Tensor], count: int, index: int) -> tuple[Tensor, int, int]:
    """Return the cut: the ``count``-th largest value of all ranks, or 0 if they have fewer values.

    Returns:
        The cut; the number of values equal to the cut on the ranks before ``index``; the number of
        values equal to the cut that are taken over all ranks.
    """
    values = torch.cat(everyones)
    if len(values) <= count:
        return values.new_zeros(()), 0, 0
    bound = values.topk(count, sorted=False).values.amin()
    before = sum(int((each == bound).sum()) for each in everyones[:index])
    return bound, before, count - int((~(values <= bound)).sum())


def _largest_in_batch(
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
    count: int,
) -> tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return the ``count`` largest positive pre-activations of these rows.

    Every row sends its largest few; the ``count``-th largest of them is a lower bound of the
    ``count``-th largest of all. A row that sent nothing below that bound may have more values above
    it, and sends all that reach it. The choice is therefore exact.
    """
    num_latents = len(W_enc)
    if kernels.supports(rows, W_enc, b_enc):
        found = kernels.topk_in_batch(rows, W_enc, b_enc, count)
        if found is not None:
            return found
    width = min(num_latents, math.ceil(_FIRST_GUESS * count / len(rows)))
    values, latents = select(rows, W_enc, b_enc, width)
    keys = latents + num_latents * torch.arange(len(rows), device=rows.device)[:, None]
    if width < num_latents:
        bound = values.flatten().topk(count, sorted=False).values.amin().clamp_min(0)
        lowest = values.amin(1)
        unsure = (lowest > bound).nonzero().squeeze(1)
        if len(unsure):
            more, more_keys = _at_least(bound, rows[unsure], W_enc, b_enc)
            row = unsure[more_keys // num_latents]
            more_keys = row * num_latents + more_keys % num_latents
            sure = ~(lowest > bound)
            values = torch.cat([values[sure].flatten(), more])
            keys = torch.cat([keys[sure].flatten(), more_keys])
    # A value that is computed a second time may round to below the bound; then one is missing.
    values, places = values.flatten().topk(min(count, values.numel()), sorted=False)
    positive = ~(values <= 0)  # keeps NaN, so that it reaches the loss
    keys, order = keys.flatten()[places[positive]].sort()
    return values[positive][order], keys // num_latents, keys % num_latents


def _at_least(
    bound: Float[Tensor, ""],
    rows: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "num_latents d_in"],
    b_enc: Float[Tensor, " num_latents"],
) -> tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return the pre-activations that reach the bound, and their positions: row × F + latent."""
    values, keys = [], []
    for block, pre in pre_activation_blocks(rows, W_enc, b_enc):
        places = (pre.flatten() >= bound).nonzero().squeeze(1)
        values.append(pre.flatten()[places])
        keys.append(places + block.start * len(W_enc))
    return torch.cat(values), torch.cat(keys)
