"""A world as a source of activations, in place of a language model (``model=world_*``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from reseed.activations.cache import ActivationCache
from reseed.activations.dataset import STRIPES, DatasetConfig
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.source import ActivationSource, ResolvedData, ResolvedSource, SourceConfig
from reseed.activations.stream import ChunkStream, deal_stripes, generator
from reseed.activations.synthetic.settings import WorldSettings, firing_given_parent
from reseed.activations.synthetic.worlds import Sample, World
from reseed.config import digest
from reseed.errors import ConfigError

_TRAINING, _HELD_OUT = 0x746F6B656E, 0x746F6B656F  # first word of the seeds of each split
_HELD_OUT_BLOCK = 4_096
"""Number of held-out tokens sampled at once. It is fixed, so that a long sample begins with a short
one."""
_NORMAL = 30.0
"""Approximate number of operations per sample of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig(WorldSettings, SourceConfig, name="world"):
    """A world of known features, as an option of ``model=``."""

    def resolve(self, cache: Path) -> ResolvedWorld:
        return ResolvedWorld(self, self.label, digest(self.signed(), 32))


@dataclass(frozen=True)
class GeneratedConfig(DatasetConfig, name="generated"):
    """The endless activations of a world."""

    belongs = "is for model=world_*"


@dataclass(frozen=True)
class ResolvedWorld(ResolvedSource):
    """A validated world, fully determined by its configuration."""

    config: WorldConfig
    label: str
    fingerprint: str
    kind = "a world"

    @property
    def num_features(self) -> int:
        return self.config.num_features

    @property
    def fingerprints(self) -> dict[str, str]:
        return {}  # the configuration is already part of the signature

    def check(self, hookpoint: Hookpoint) -> None:
        """Raise `ConfigError` unless ``hookpoint`` is the world's only one, resid_post.0."""
        self.check_single_place(hookpoint)

    def d_in(self, hookpoint: Hookpoint) -> int:
        return self.config.d_in

    def data(self, config: DatasetConfig, cache: Path) -> ResolvedData:
        if not isinstance(config, GeneratedConfig):
            raise ConfigError(
                f"{{key}}={config.name} {config.belongs}, but model={self.label} is a world and "
                "generates its own activations: set dataset=generated"
            )
        return ResolvedWorldData(self.config, config)


@dataclass(frozen=True)
class ResolvedWorldData(ResolvedData):
    """A world, with the order and the chunk size of its activations."""

    world: WorldConfig
    config: GeneratedConfig

    @property
    def label(self) -> str:
        return "generated"

    @property
    def description(self) -> str:
        return "generated activations"

    @property
    def context_length(self) -> None:
        return None

    @property
    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def in_order(self, order_seed: int) -> Self:
        return replace(self, config=replace(self.config, order_seed=order_seed))

    @property
    def weight_bytes(self) -> int:
        rows = self.world.num_features + self.world.groups * self.world.group_rank
        return 4 * rows * self.world.d_in

    def flops_per_token(self, hookpoints: Sequence[Hookpoint]) -> float:
        """Count a normal sample and the factors of each feature, and the rows of firing ones."""
        config = self.world
        active = float(firing_given_parent(config).sum()) + config.groups * config.group_rank
        drawn = config.num_features * (_NORMAL + 2.0 * config.copula_rank)
        return drawn + 2.0 * active * config.d_in

    def check_budget(self, steps: int, batch_size: int) -> None:
        """Accept every budget: a world is endless."""

    def open(
        self, device: torch.device, needed: int, cache: ActivationCache | None = None
    ) -> WorldSource:
        return WorldSource(World(self.world), self.config, device)


class WorldSource(ActivationSource):
    """Activations sampled from a world.

    Training chunks are seeded by (world's seed, order seed, c), held-out tokens by the world's seed
    alone.
    """

    world: World

    def __init__(self, world: World, config: GeneratedConfig, device: torch.device) -> None:
        self.world, self.config, self.device = world, config, device

    def stream(self, hookpoints: Sequence[Hookpoint]) -> WorldStream:
        return WorldStream(self.world, self.config, hookpoints, self.device)

    def held_out(
        self, hookpoints: Sequence[Hookpoint], tokens: int
    ) -> Iterator[dict[Hookpoint, Tensor]]:
        for sample in self.held_out_samples(tokens):
            x = sample.x.to(self.device)
            yield dict.fromkeys(hookpoints, x)

    def held_out_samples(self, tokens: int) -> Iterator[Sample]:
        for first in range(0, tokens, _HELD_OUT_BLOCK):
            random = generator(_HELD_OUT, self.world.config.seed, first // _HELD_OUT_BLOCK)
            yield self.world.sample(_HELD_OUT_BLOCK, random).first(tokens - first)


class WorldStream(ChunkStream):
    """An endless stream; chunk c is an independent sample."""

    def __init__(
        self,
        world: World,
        config: GeneratedConfig,
        hookpoints: Sequence[Hookpoint],
        device: torch.device,
    ) -> None:
        super().__init__(config, hookpoints, device)
        self.world = world

    def _compute_chunk(self, c: int) -> dict[Hookpoint, Tensor]:
        random = generator(_TRAINING, self.world.config.seed, self.config.order_seed, c)
        x = self.world.sample(self.config.chunk_tokens, random).x.to(self.device)
        order = self._permutation(c, self.config.chunk_tokens // STRIPES)
        return dict.fromkeys(self.hookpoints, deal_stripes(x, order))
