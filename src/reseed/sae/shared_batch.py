"""A batch that several ranks share in equal portions (data-parallel training).

Each rank computes the loss on its portion, such that the means over the ranks of loss and gradients
are those of the whole batch. This holds by itself for a mean over tokens. Terms that depend on the
batch in another way use these functions:

    total_variance         an equal share of the whole batch's  (`reseed.sae.losses`)
    a mean, squared        `batch_mean`
    smallest chosen value  `smallest_of`
    the k·B largest        one cut for all ranks  (`reseed.sae.selection`)

Like autocast, training declares it once (`batch_shared_by`); losses need no parameter for it.
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
    """Declare that, inside the context, every batch is one rank's portion of a shared batch."""
    before = _sharing.set(ranks)
    try:
        yield
    finally:
        _sharing.reset(before)


def sharing() -> Ranks:
    """Return the ranks that share the batch: this process alone, unless training declares more."""
    return _sharing.get()


def batch_mean(mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the mean over the whole batch, with the gradient of this rank's portion.

    For means that enter a loss nonlinearly: the gradient, averaged over the ranks, is then that of
    the whole batch.
    """
    ranks = sharing()
    if not ranks.several:
        return mean
    whole = ranks.sum_(mean.detach().clone()) / ranks.count
    return mean + (whole - mean.detach())


def smallest_of(values: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """Return the smallest value of the whole batch; infinity if there is none."""
    own = values.min() if len(values) else values.new_full((), torch.inf)
    return -sharing().largest_(-own)


def shared_variance(x: Float[Tensor, "batch d_in"], own: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return this rank's equal share of Σ‖x − x̄‖² over the whole batch.

    Args:
        own: Σ‖x − x̄‖² of this rank's portion around its own mean.
    """
    ranks = sharing()
    if not ranks.several:
        return own
    # Σ_r own_r + Σ_r n‖x̄_r − x̄‖², in float64 because the second is a difference of large sums.
    mean = x.detach().double().mean(0)
    sums = torch.cat([mean, own.detach().double()[None], mean.square().sum()[None]])
    sums = ranks.sum_(sums) / ranks.count
    between = len(x) * (sums[-1] - sums[:-2].square().sum())
    return (sums[-2] + between.clamp_min(0)).to(own.dtype)
