"""Directions of decoder rows: the tokens they promote, and their nearest rows.

F latents, D `d_in`, V tokens; nothing of size [F, F] or [F, V] is held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from reseed.sae.selection import select

_LOGITS = 1 << 25
"""Logits in memory at once: 128 MiB."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """The first n entries of a ranked list for each latent.

    Attributes:
        index: token or latent; −1 if the list is shorter.
        value: logit or cosine, in order.
    """

    index: Int[Tensor, "F n"]
    value: Float[Tensor, "F n"]

    @classmethod
    def empty(cls, num_latents: int) -> Ranked:
        """Return empty lists."""
        return cls(torch.zeros(num_latents, 0, dtype=torch.int64), torch.zeros(num_latents, 0))


@torch.no_grad()
def lens(
    W_dec: Float[Tensor, "F D"], unembedding: Float[Tensor, "V D"], count: int
) -> tuple[Ranked, Ranked]:
    """Return the tokens that each latent promotes most, and those that it suppresses most."""
    count = min(count, len(unembedding))
    matrix = unembedding.to(W_dec.device).t()
    found: tuple[list, list] = ([], [])
    for rows in W_dec.float().split(max(1, _LOGITS // len(unembedding))):
        logits = rows @ matrix
        for part, largest in zip(found, (True, False), strict=True):
            part.append(logits.topk(count, dim=1, largest=largest))
    promoted, suppressed = (
        Ranked(torch.cat([p.indices for p in part]), torch.cat([p.values for p in part]))
        for part in found
    )
    return promoted, suppressed


@torch.no_grad()
def neighbours(W_dec: Float[Tensor, "F D"], count: int) -> Ranked:
    """Return the other latents whose decoder rows have the largest cosine with each latent's.

    Only cosines above 0 count: a row of zeros has no neighbours and is none.
    """
    rows = functional.normalize(W_dec.float(), dim=1)
    size = min(count + 1, len(rows))
    cosine, latent = select(rows, rows, rows.new_zeros(len(rows)), size, descending=True)
    own = torch.arange(len(rows), device=latent.device)[:, None]
    cosine = cosine.masked_fill(latent == own, -torch.inf)
    cosine, order = cosine.sort(dim=1, descending=True, stable=True)
    latent = latent.gather(1, order).masked_fill(~(cosine > 0), -1)
    return Ranked(latent[:, :count], cosine[:, :count].clamp(max=1))
