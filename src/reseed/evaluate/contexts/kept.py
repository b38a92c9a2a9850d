"""Of every latent the few firings of highest rank, whatever the number that pass by.

F latents, K firings kept of each, W tokens of a window; n candidates
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.evaluate.contexts.firings import Firings

_NONE = torch.iinfo(torch.int64).min
"""The rank of a place that nothing has taken yet."""
_POSITIONS = (1 << 32) - 1


def by_activation(firings: Firings) -> Int[Tensor, " n"]:
    """The more a latent fires the higher, then the earlier. No two of a latent are equal."""
    return _rank(firings.value, firings.position)


def _rank(value: Float[Tensor, "*n"], position: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Of activations ≥ 0, whose bits, read as integers, are in the order of the floats."""
    return (value.contiguous().view(torch.int32).long() << 32) + (_POSITIONS - position)


def by_lot(firings: Firings, seed: int) -> Int[Tensor, " n"]:
    """A random number that seed, latent and position decide: the K highest of a latent are K of
    its firings, drawn uniformly. No two of a latent are equal, as `_mixed` is one to one."""
    of_latent = _mixed(firings.latent + _mixed(torch.tensor(seed, device=firings.latent.device)))
    return _mixed(firings.position ^ of_latent)


def _mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The end of SplitMix64 (Steele, Lea & Flood 2014): one to one, and every bit of the input
    moves half of the output's."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """To the right, as of a number without sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Kept:
    """The K highest firings of each latent, in no order, with their windows.

    Args:
        num_latents: F.
        size: K.
        reach: tokens of a window on either side.
        device: where the firings are.

    Attributes:
        rank: of each, `_NONE` where there are fewer.
        position: of its token.
        window: activations around it.
    """

    rank: Int[Tensor, "F K"]
    position: Int[Tensor, "F K"]
    window: Float[Tensor, "F K W"]

    def __init__(self, num_latents: int, size: int, reach: int, device: torch.device) -> None:
        self.reach = reach
        self.rank = torch.full((num_latents, size), _NONE, device=device)
        self.position = torch.zeros_like(self.rank)
        self.window = torch.zeros(num_latents, size, 2 * reach + 1, device=device)
        self._least = torch.full((num_latents,), _NONE, device=device)

    def there(self, latents: slice = slice(None)) -> Int[Tensor, " some"]:
        """How many are kept of each latent."""
        return (self.rank[latents] != _NONE).sum(1)

    @property
    def value(self) -> Float[Tensor, "F K"]:
        """Activation on the token itself; 0 where nothing is kept."""
        return self.window[:, :, self.reach]

    def in_order(self, latents: slice) -> Int[Tensor, "some K"]:
        """Of some latents the places of what is kept, by activation, the largest first."""
        rank = _rank(self.value[latents], self.position[latents])
        return rank.argsort(dim=1, descending=True)

    def reaching(self, rank: Int[Tensor, " n"], latent: Int[Tensor, " n"]) -> Int[Tensor, " some"]:
        """Which of the firings of a block outrank the least that is kept."""
        return (rank > self._least[latent]).nonzero()[:, 0]

    def offer(self, firings: Firings, chosen: Int[Tensor, " n"], rank: Int[Tensor, " n"]) -> None:
        """Keep those of some firings that are high enough, in the place of the lowest.

        Args:
            chosen: which firings, ascending.
            rank: theirs.
        """
        if not len(chosen):
            return
        order = rank.argsort(descending=True)
        order = order[firings.latent[chosen[order]].argsort(stable=True)]
        chosen, rank = chosen[order], rank[order]
        latents, counts = firings.latent[chosen].unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        row = torch.arange(len(latents), device=rank.device).repeat_interleave(counts)
        column = torch.arange(len(rank), device=rank.device) - starts[row]
        size = self.rank.shape[1]
        inside = column < size
        offered = rank.new_full((len(latents), min(size, int(counts.max()))), _NONE)
        offered[row[inside], column[inside]] = rank[inside]
        best = torch.cat([self.rank[latents], offered], 1).topk(size, dim=1, sorted=False).indices
        places = len(latents), size + offered.shape[1]
        stays = torch.zeros(places, dtype=torch.bool, device=rank.device).scatter_(1, best, True)
        # As many places of a latent are free as it has newcomers: both are listed latent by latent.
        free_row, place = (~stays[:, :size]).nonzero(as_tuple=True)
        new_row, column = stays[:, size:].nonzero(as_tuple=True)
        real = offered[new_row, column] != _NONE
        latent, place = latents[free_row[real]], place[real]
        come = (starts[new_row] + column)[real]
        self.rank[latent, place] = rank[come]
        self.position[latent, place] = firings.position[chosen[come]]
        self.window[latent, place] = firings.windows(chosen[come], self.reach)
        self._least[latents] = self.rank[latents].amin(1)
