"""A batch that several ranks hold, an equal part of it each (data-parallel training).

A loss is then computed by each rank on its part, such that the mean over the ranks is that of the
whole batch, and so is the mean of the gradients. A sum over tokens divided by their number is so by
itself. What hangs on the batch in another way asks here:

    total_variance         of the whole batch, an equal share of it  (`reseed.sae.losses`)
    a mean, squared        `batch_mean`
    the smallest kept      `smallest_of`
    the k·B largest        one cut for all ranks  (`reseed.sae.selection`)

As with autocast, who trains says it once (`batch_shared_by`), and losses need no parameter for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.ranks import ALONE, Ranks

_sharing: ContextVar[Ranks] = ContextVar("sharing", default=ALONE)


@contextmanager
def batch_shared_by(ranks: Ranks) -> Iterator[None]:
    """Within it every batch is one part of that of all ranks."""
    before = _sharing.set(ranks)
    try:
        yield
    finally:
        _sharing.reset(before)


def sharing() -> Ranks:
    """Those that share the batch: this process alone, unless training says otherwise."""
    return _sharing.get()


def batch_mean(mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean over the whole batch, with the gradient of this rank's part.

    For means that enter a loss not linearly: the mean over the ranks of what is made of it then has
    the gradient of the whole.
    """
    ranks = sharing()
    if not ranks.several:
        return mean
    whole = ranks.sum_(mean.detach().clone()) / ranks.count
    return mean + (whole - mean.detach())


def smallest_of(values: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """The smallest in the whole batch; infinite where there is none."""
    own = values.min() if len(values) else values.new_full((), torch.inf)
    return -sharing().largest_(-own)


def shared_variance(x: Float[Tensor, "batch d_in"], own: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """This rank's equal share of Σ‖x − x̄‖² over the whole batch.

    Args:
        own: Σ‖x − x̄‖² of its part around the part's own mean.
    """
    ranks = sharing()
    if not ranks.several:
        return own
    # Σ_r own_r + Σ_r n‖x̄_r − x̄‖², in float64, as the second is a difference of large sums.
    mean = x.detach().double().mean(0)
    sums = torch.cat([mean, own.detach().double()[None], mean.square().sum()[None]])
    sums = ranks.sum_(sums) / ranks.count
    between = len(x) * (sums[-1] - sums[:-2].square().sum())
    return (sums[-2] + between.clamp_min(0)).to(own.dtype)
