"""Worlds: synthetic activations made of known features.

    x = aG + groups      G dictionary [N, D], unit rows · a sparse [tokens, N]

The sparse a is stored as (token, feature, value), and x is a sum of rows of G; no dense product
over all features is computed. Random numbers are generated in blocks of a fixed size, on the CPU,
so that a sample is a pure function of the generator's seed, and memory does not grow with
tokens · N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reseed.activations.stream import generator
from reseed.activations.synthetic.settings import (
    WorldSettings,
    correlation_root,
    firing_given_parent,
    levels_of,
    parents_of,
)

_BLOCK = 1 << 22
"""Number of random values (tokens · features) generated at once. A change of it changes the sample
of a seed."""
_DICTIONARY, _GROUPS, _FACTORS = 0x776F726C64, 0x776F726C65, 0x776F726C66


@dataclass(frozen=True, eq=False)
class Sample:
    """Activations of a world with their true features, on the CPU.

    Attributes:
        x: activations.
        token, feature, value: nonzero feature activations, sorted by token, then feature.
        group_active: True where a group fires.
    """

    x: Float[Tensor, "tokens d_in"]
    token: Int[Tensor, " active"]
    feature: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    group_active: Bool[Tensor, "tokens groups"]

    def first(self, tokens: int) -> Sample:
        """Return the sample's first ``tokens`` tokens."""
        end = int(torch.searchsorted(self.token, tokens))
        return Sample(
            self.x[:tokens],
            self.token[:end],
            self.feature[:end],
            self.value[:end],
            self.group_active[:tokens],
        )

    @classmethod
    def joined(cls, samples: Sequence[Sample]) -> Sample:
        """Concatenate several samples."""
        token, before = [], 0
        for sample in samples:
            token.append(sample.token + before)
            before += len(sample.x)
        return cls(
            torch.cat([s.x for s in samples]),
            torch.cat(token),
            torch.cat([s.feature for s in samples]),
            torch.cat([s.value for s in samples]),
            torch.cat([s.group_active for s in samples]),
        )


class World:
    """The known features that a configuration declares.

    Attributes:
        config: the declared configuration.
        dictionary: a row of norm 1 per feature.
        groups: an orthonormal basis of each group's subspace.
    """

    def __init__(self, config: WorldSettings) -> None:
        self.config = config
        self.dictionary: Float[Tensor, "features d_in"] = _directions(config)
        self.groups: Float[Tensor, "groups rank d_in"] = _orthonormal(
            config.groups, config.group_rank, config.d_in, generator(_GROUPS, config.seed)
        ).float()
        probability = torch.from_numpy(firing_given_parent(config))
        self._threshold = torch.special.ndtri(probability).float()
        parent = parents_of(config)
        self._parent = torch.from_numpy(parent)
        self._levels = [torch.from_numpy(level) for level in levels_of(parent)]
        correlated, root = correlation_root(config)
        self._correlated, self._root = torch.from_numpy(correlated), torch.from_numpy(root).float()
        self._factors, self._own = _factors(config)

    def sample(self, tokens: int, generator: torch.Generator) -> Sample:
        """Sample independent tokens.

        Args:
            generator: CPU generator, the only source of randomness.
        """
        block = max(1, _BLOCK // self.config.num_features)
        sizes = [min(block, tokens - first) for first in range(0, tokens, block)]
        return Sample.joined([self._block(size, generator) for size in sizes or [0]])

    def _block(self, tokens: int, random: torch.Generator) -> Sample:
        fire = self._fire(tokens, random)
        token, feature = fire.nonzero(as_tuple=True)
        value = self._magnitudes(len(token), random)
        there = value > 0  # magnitudes sampled below 0 are set to 0
        token, feature, value = token[there], feature[there], value[there]
        counts = torch.bincount(token, minlength=tokens)
        begins = counts.cumsum(0) - counts
        x = F.embedding_bag(feature, self.dictionary, begins, mode="sum", per_sample_weights=value)
        return Sample(x, token, feature, value, self._add_groups(x, random))

    def _fire(self, tokens: int, random: torch.Generator) -> Bool[Tensor, "tokens features"]:
        """Sample a mask of the features that fire."""
        z = torch.randn(tokens, self.config.num_features, generator=random)
        if len(self._correlated):
            z[:, self._correlated] = z[:, self._correlated] @ self._root.T
        if self.config.copula_rank:
            common = torch.randn(tokens, self.config.copula_rank, generator=random)
            z.mul_(self._own).addmm_(common, self._factors.T)
        fire = z < self._threshold
        for level in self._levels:
            self._follow_parents(fire, level, random)
        return fire

    def _follow_parents(self, fire: Tensor, level: Tensor, random: torch.Generator) -> None:
        """Clear, in place, children whose parent does not fire; keep one of exclusive siblings."""
        token, place = fire[:, level].nonzero(as_tuple=True)
        feature = level[place]
        on = fire[token, self._parent[feature]]
        token, feature = token[on], feature[on]
        if self.config.mutually_exclusive_children:
            family = token * self.config.num_features + self._parent[feature]
            kept = _draw_one_per_family(family, random)
            token, feature = token[kept], feature[kept]
        fire[:, level] = False
        fire[token, feature] = True

    def _magnitudes(self, count: int, random: torch.Generator) -> Float[Tensor, " count"]:
        noise = torch.randn(count, generator=random)
        return (self.config.magnitude_mean + self.config.magnitude_std * noise).relu()

    def _add_groups(self, x: Tensor, random: torch.Generator) -> Bool[Tensor, "tokens groups"]:
        """Add the contributions of firing groups to ``x`` in place; return which groups fire."""
        drawn = torch.rand(len(x), self.config.groups, generator=random)
        active = drawn < self.config.group_probability
        for number, basis in enumerate(self.groups):
            rows = active[:, number].nonzero()[:, 0]
            direction = torch.randn(len(rows), self.config.group_rank, generator=random)
            direction = F.normalize(direction, dim=1)
            magnitude = self._magnitudes(len(rows), random)
            x[rows] += magnitude[:, None] * direction @ basis
            active[rows, number] = magnitude > 0
        return active


def _draw_one_per_family(
    family: Int[Tensor, " some"], random: torch.Generator
) -> Int[Tensor, " kept"]:
    """Return the index of one element of each family, chosen uniformly."""
    order = torch.rand(len(family), generator=random).argsort(stable=True)
    order = order[family[order].argsort(stable=True)]
    ordered = family[order]
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return order[last]


def _directions(config: WorldSettings) -> Float[Tensor, "features d_in"]:
    random = generator(_DICTIONARY, config.seed)
    if config.dictionary == "orthogonal":
        return _orthonormal(1, config.num_features, config.d_in, random)[0].float()
    rows = torch.randn(config.num_features, config.d_in, generator=random, dtype=torch.float64)
    return F.normalize(rows, dim=1).float()


def _orthonormal(
    count: int, rank: int, d_in: int, random: torch.Generator
) -> Float[Tensor, "count rank d_in"]:
    """Sample uniformly distributed orthonormal rows, in float64."""
    columns = torch.randn(count, d_in, rank, generator=random, dtype=torch.float64)
    if not count:
        return columns.mT
    q, r = torch.linalg.qr(columns)
    # If the diagonal of r is positive, the factorisation is unique and q is uniform.
    return (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).mT.contiguous()


def _factors(config: WorldSettings) -> tuple[Float[Tensor, "features rank"], Float[Tensor, " f"]]:
    """Return each feature's weights of the common factors and of its own noise, of norm 1."""
    random = generator(_FACTORS, config.seed)
    shape = (config.num_features, config.copula_rank)
    weights = config.copula_scale * torch.randn(*shape, generator=random, dtype=torch.float64)
    own = (1 + weights.square().sum(1)).rsqrt()
    return (weights * own[:, None]).float(), own.float()
