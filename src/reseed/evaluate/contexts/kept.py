"""The K firings of highest rank of every latent, in memory that does not grow with the text.

F latents, K firings stored for each, W tokens of a window; n candidates
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.evaluate.contexts.firings import Firings

_NONE = torch.iinfo(torch.int64).min
"""The rank of an empty slot."""
_POSITIONS = (1 << 32) - 1


def by_activation(firings: Firings) -> Int[Tensor, " n"]:
    """Rank larger activations higher, then earlier positions. No two of a latent are equal."""
    return _rank(firings.value, firings.position)


def _rank(value: Float[Tensor, "*n"], position: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Rank activations ≥ 0: their bits, read as integers, sort like the floats."""
    return (value.contiguous().view(torch.int32).long() << 32) + (_POSITIONS - position)


def by_lot(firings: Firings, seed: int) -> Int[Tensor, " n"]:
    """Rank firings by a hash of seed, latent and position: the K highest of a latent are a uniform
    draw of its firings. No two of a latent are equal, as `_mixed` is one to one."""
    of_latent = _mixed(firings.latent + _mixed(torch.tensor(seed, device=firings.latent.device)))
    return _mixed(firings.position ^ of_latent)


def _mixed(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Apply the finaliser of SplitMix64 (Steele, Lea & Flood 2014): one to one, and each input bit
    changes half of the output bits."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """Shift right, as an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Kept:
    """The K highest firings of each latent, unordered, with their windows.

    Args:
        num_latents: F.
        size: K.
        reach: tokens of a window on either side.
        device: device of the firings.

    Attributes:
        rank: rank of each firing; `_NONE` in an empty slot.
        position: position of its token.
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
        """Return the number of firings stored for each latent."""
        return (self.rank[latents] != _NONE).sum(1)

    @property
    def value(self) -> Float[Tensor, "F K"]:
        """Activation on the firing token itself; 0 in an empty slot."""
        return self.window[:, :, self.reach]

    def in_order(self, latents: slice) -> Int[Tensor, "some K"]:
        """Return the slots of some latents by activation, the largest first."""
        rank = _rank(self.value[latents], self.position[latents])
        return rank.argsort(dim=1, descending=True)

    def reaching(self, rank: Int[Tensor, " n"], latent: Int[Tensor, " n"]) -> Int[Tensor, " some"]:
        """Return the firings of a block that outrank the lowest stored one of their latent."""
        return (rank > self._least[latent]).nonzero()[:, 0]

    def offer(self, firings: Firings, chosen: Int[Tensor, " n"], rank: Int[Tensor, " n"]) -> None:
        """Store the firings that rank high enough, in place of the lowest.

        Args:
            chosen: indices of the offered firings, ascending.
            rank: their ranks.
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
        # Each latent frees as many slots as it has new firings; both lists are sorted by latent.
        free_row, place = (~stays[:, :size]).nonzero(as_tuple=True)
        new_row, column = stays[:, size:].nonzero(as_tuple=True)
        real = offered[new_row, column] != _NONE
        latent, place = latents[free_row[real]], place[real]
        come = (starts[new_row] + column)[real]
        self.rank[latent, place] = rank[come]
        self.position[latent, place] = firings.position[chosen[come]]
        self.window[latent, place] = firings.windows(chosen[come], self.reach)
        self._least[latents] = self.rank[latents].amin(1)
