"""Gathering of the contexts of an SAE's latents from held-out text, and directions of its decoder
rows.

`Firings` are the firings in a block of sequences. A `TopKReservoir` stores the K firings of highest
rank of every latent, in memory that does not grow with the text; a `ContextGatherer` has two, one
ranked by activation and one at random. `lens` and `neighbours` give the tokens that decoder rows
promote and their nearest rows; they hold nothing of size [F, F] or [F, V].

Shapes: F latents, D `d_in`, V tokens of the vocabulary, n firings in a block, m chosen firings,
W = 2·reach + 1 tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from reseed.sae.base import SAE
from reseed.sae.selection import select


@dataclass(frozen=True, eq=False)
class Firings:
    """(latent, token) pairs, sorted by latent, then by token.

    Attributes:
        latent: the latent that fires.
        place: index of the token in the block, counting first and special tokens.
        value: activation, above 0, in float32.
        first: position of the block's first token in the whole text.
        context: number of tokens per sequence; a block consists of whole sequences.
    """

    latent: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    first: int
    context: int

    @classmethod
    def of(
        cls,
        sae: SAE,
        x: Float[Tensor, "sequences context d_in"],
        kept: Bool[Tensor, "sequences context"],
        first: int,
    ) -> Firings:
        """Encode the activations at the kept tokens.

        Args:
            kept: the tokens that the SAE is trained on.
            first: position of the block's first token.
        """
        places = kept.flatten().nonzero()[:, 0].to(sae.W_dec.device)
        rows = x[kept.to(x.device)].to(sae.W_dec.device, sae.W_dec.dtype)
        value, token, latent = sae.encode_sparse(rows).active()
        return cls(latent.long(), places[token], value.float(), first, x.shape[1])

    @property
    def position(self) -> Int[Tensor, " n"]:
        """Position of each token in the whole text."""
        return self.place + self.first

    @property
    def sequence(self) -> Int[Tensor, " n"]:
        """Index in the block of each token's sequence."""
        return self.place // self.context

    def windows(self, chosen: Int[Tensor, " m"], reach: int) -> Float[Tensor, "m W"]:
        """Return the latents' activations around some firings; 0 beyond their sequences.

        Args:
            reach: number of tokens on either side.
        """
        latent, place = self.latent[chosen], self.place[chosen]
        begin = self.sequence[chosen] * self.context
        low = torch.maximum(place - reach, begin)
        high = torch.minimum(place + reach, begin + self.context - 1)
        start = torch.searchsorted(self._order, self._key(latent, low))
        count = torch.searchsorted(self._order, self._key(latent, high), right=True) - start
        row = torch.arange(len(chosen), device=count.device).repeat_interleave(count)
        within = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count)[row]
        found = start[row] + within
        out = self.value.new_zeros(len(chosen), 2 * reach + 1)
        out[row, self.place[found] - place[row] + reach] = self.value[found]
        return out

    @cached_property
    def _order(self) -> Int[Tensor, " n"]:
        return self._key(self.latent, self.place)

    def _key(self, latent: Int[Tensor, " m"], place: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Return sort keys that ascend by latent, then by token."""
        return (latent << 32) + place


_NONE = torch.iinfo(torch.int64).min
"""The rank of an empty slot."""
_POSITIONS = (1 << 32) - 1


def rank_by_activation(firings: Firings) -> Int[Tensor, " n"]:
    """Rank larger activations higher, then earlier positions. Ranks within a latent are unique."""
    return _rank(firings.value, firings.position)


def _rank(value: Float[Tensor, "*n"], position: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Rank activations ≥ 0: their bits, read as integers, sort like the floats."""
    return (value.contiguous().view(torch.int32).long() << 32) + (_POSITIONS - position)


def rank_randomly(firings: Firings, seed: int) -> Int[Tensor, " n"]:
    """Rank firings by a hash of seed, latent and position: the K highest of a latent are a uniform
    draw of its firings. Ranks within a latent are unique, because `_mixed` is one to one."""
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


class TopKReservoir:
    """The K highest firings of each latent, unordered, with their windows.

    Args:
        num_latents: F.
        size: K.
        reach: number of tokens of a window on either side.
        device: device of the firings.

    Attributes:
        rank: rank of each firing; `_NONE` in an empty slot.
        position: position of the token of each firing.
        window: activations around that token.
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

    def counts(self, latents: slice = slice(None)) -> Int[Tensor, " some"]:
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


class ContextGatherer:
    """Contexts and firing counts of an SAE's latents over the blocks added so far.

    Args:
        sae: SAE for raw activations.
        top, reservoir: numbers of contexts stored for each latent: of sequences where it fires
            most, and of firings drawn uniformly.
        reach: number of tokens of a context on either side.
        seed: seed of the draw.

    Attributes:
        firing: number of tokens that each latent fired on.
        total: sum of each latent's activations on these tokens.
    """

    def __init__(self, sae: SAE, top: int, reservoir: int, reach: int, seed: int) -> None:
        device = sae.W_dec.device
        self.sae, self.seed = sae, seed
        self.top = TopKReservoir(sae.num_latents, top, reach, device)
        self.drawn = TopKReservoir(sae.num_latents, reservoir, reach, device)
        self.firing: Int[Tensor, " F"] = torch.zeros(
            sae.num_latents, dtype=torch.int64, device=device
        )
        self.total: Float[Tensor, " F"] = torch.zeros(
            sae.num_latents, dtype=torch.float64, device=device
        )

    def add(
        self,
        x: Float[Tensor, "sequences context d_in"],
        kept: Bool[Tensor, "sequences context"],
        first: int,
    ) -> None:
        """Add whole sequences; see `Firings.of` for the arguments."""
        self.count(Firings.of(self.sae, x, kept, first))

    def count(self, firings: Firings) -> None:
        """Add the firings of a block; blocks may come in any order."""
        latent, size = firings.latent, len(self.firing)
        self.firing += torch.bincount(latent, minlength=size)
        self.total += torch.bincount(latent, firings.value.double(), minlength=size)
        rank = rank_by_activation(firings)
        chosen = self.top.reaching(rank, latent)
        chosen = chosen[_sequence_peaks(rank[chosen], latent[chosen], firings.sequence[chosen])]
        self.top.offer(firings, chosen, rank[chosen])
        rank = rank_randomly(firings, self.seed)
        chosen = self.drawn.reaching(rank, latent)
        self.drawn.offer(firings, chosen, rank[chosen])


def _sequence_peaks(
    rank: Int[Tensor, " n"], latent: Int[Tensor, " n"], sequence: Int[Tensor, " n"]
) -> Int[Tensor, " some"]:
    """Return each latent's highest firing per sequence: a sequence gives one top context."""
    if not len(rank):
        return rank
    _, pair = ((latent << 32) + sequence).unique_consecutive(return_inverse=True)
    best = rank.new_zeros(int(pair[-1]) + 1).scatter_reduce(0, pair, rank, "amax")
    return (rank == best[pair]).nonzero()[:, 0]


_LOGITS = 1 << 25
"""Maximum number of logits in memory at once: 128 MiB."""


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

    Only cosines above 0 count: a row of zeros has no neighbours and is not a neighbour.
    """
    rows = functional.normalize(W_dec.float(), dim=1)
    size = min(count + 1, len(rows))
    cosine, latent = select(rows, rows, rows.new_zeros(len(rows)), size, descending=True)
    own = torch.arange(len(rows), device=latent.device)[:, None]
    cosine = cosine.masked_fill(latent == own, -torch.inf)
    cosine, order = cosine.sort(dim=1, descending=True, stable=True)
    latent = latent.gather(1, order).masked_fill(~(cosine > 0), -1)
    return Ranked(latent[:, :count], cosine[:, :count].clamp(max=1))
