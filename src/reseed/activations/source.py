"""Interfaces of activation sources: language models on a text, worlds, stored activations.

    SourceConfig (model=)  ──resolve──►  ResolvedSource ──data(dataset=)──►  ResolvedData
                                                                  │ open: weights are loaded
                                                                  ▼
                                                           ActivationSource ──stream──► ChunkStream

Code outside this folder uses only these interfaces and does not depend on the kind of source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.activations.cache import ActivationCache
from reseed.activations.dataset import DatasetConfig
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.stream import ChunkStream
from reseed.activations.synthetic.worlds import Sample, World
from reseed.config import Config
from reseed.errors import ConfigError, ReseedError


@dataclass(frozen=True)
class SourceConfig(Config, ABC, family="model"):
    """Base configuration of the sources, the options of ``model=``."""

    @abstractmethod
    def resolve(self, cache: Path) -> ResolvedSource:
        """Find the source without loading weights.

        Raises:
            ConfigError: the source does not exist or is invalid.
        """

    def stamp(self) -> Hashable:
        """Return a value that changes if the source's files do, so that they are read again."""
        return None


class ResolvedSource(ABC):
    """A language model, a world or stored activations, found but not loaded.

    Attributes:
        config: the configuration, with what depends on the source settled.
        label: short name for folders and tables.
        fingerprint: identifies the source by its content.
        kind: kind of the source, for messages.
    """

    config: SourceConfig
    label: str
    fingerprint: str
    kind: str = "a language model"

    @property
    def num_features(self) -> int | None:
        """Number of known features in the activations; None if they are unknown."""
        return None

    @property
    @abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints that enter a run's signature with the configuration, by name."""

    def with_random_weights(self) -> ResolvedSource:
        """Return the same source with random weights.

        Raises:
            ConfigError: the source has no weights.
        """
        raise ConfigError(
            f"{{key}}=random_weights needs a language model; {self.label} has no weights",
            "surrogate",
        )

    @abstractmethod
    def check(self, hookpoint: Hookpoint) -> None:
        """Raise `ConfigError` if the source has no such layer or module."""

    def site_identity(self, hookpoint: Hookpoint) -> Mapping[str, str]:
        """Return what enters a run's signature about a site, besides its name."""
        return {}

    def check_single_place(self, hookpoint: Hookpoint) -> None:
        """Raise `ConfigError` unless ``hookpoint`` is resid_post.0, for sources without layers."""
        if hookpoint.layer != 0:
            raise ConfigError(
                f"{{key}} must be 0: {self.label} is {self.kind} and has one layer; "
                f"got {hookpoint.layer}",
                "layer",
            )
        if hookpoint.site != "resid_post":
            raise ConfigError(
                f"{{key}} must be resid_post: {self.label} is {self.kind} and has one site; "
                f"got {hookpoint.site}",
                "hookpoint.site",
            )

    @abstractmethod
    def d_in(self, hookpoint: Hookpoint) -> int:
        """Return the width of the activations at ``hookpoint``."""

    @abstractmethod
    def data(self, config: DatasetConfig, cache: Path) -> ResolvedData:
        """Resolve the data set that ``config`` declares for this source.

        Raises:
            ConfigError: the data set does not exist or is not for this kind of source. The error's
                key is relative to ``dataset``.
        """


class ResolvedData(ABC):
    """A data set, found and bound to its source but not opened.

    Attributes:
        config: the declared configuration.
    """

    config: DatasetConfig

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for folders and tables."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Description for use in a sentence, for example ``text docstrings``."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Number of tokens in a sequence; None if the data set has no sequences."""

    @property
    @abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints that enter a run's signature with the configuration, by name."""

    @property
    def order_seed(self) -> int:
        """Seed of the order of the activations."""
        return self.config.order_seed

    @abstractmethod
    def in_order(self, order_seed: int) -> Self:
        """Return the same data in the order of another seed."""

    def at_first_seeds(self) -> Self:
        """Return the data of `DatasetConfig.at_first_seeds`."""
        return self.in_order(self.config.at_first_seeds().order_seed)

    @property
    def depends_on_budget(self) -> bool:
        """True if the budget decides which activations are read, and not only how many."""
        return False

    @property
    def summary(self) -> tuple[str, ...]:
        """Lines that say what the data are, for the user to check before training."""
        return ()

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Memory of the opened source's weights, in bytes."""

    @abstractmethod
    def flops_per_token(self, hookpoints: Sequence[Hookpoint]) -> float:
        """Estimate the number of floating-point operations per activation."""

    @abstractmethod
    def check_budget(self, steps: int, batch_size: int) -> None:
        """Raise `ConfigError`, with the full key, if the data set is known to be too small."""

    @abstractmethod
    def open(
        self, device: torch.device, needed: int, cache: ActivationCache | None = None
    ) -> ActivationSource:
        """Open the source, so that it can compute activations.

        Args:
            device: device of the activations.
            needed: number of activations that training needs; limits how much of a streamed text
                is read.
            cache: stores a language model's activations on disk; others are not cached.
        """


class ActivationSource(ABC):
    """An opened source.

    Attributes:
        device: device of the activations.
        world: the world that generates the activations; None for other sources.
    """

    device: torch.device
    world: World | None = None

    @abstractmethod
    def stream(self, hookpoints: Sequence[Hookpoint]) -> ChunkStream:
        """Return the stream of training activations."""

    @abstractmethod
    def held_out(
        self, hookpoints: Sequence[Hookpoint], tokens: int
    ) -> Iterator[dict[Hookpoint, Float[Tensor, "activations d_in"]]]:
        """Yield the first ``tokens`` held-out activations in pieces."""

    @property
    def summary(self) -> tuple[str, ...]:
        """Lines that say what the data are, if that is known only now that they are read."""
        return ()

    def record(self) -> dict[str, Any]:
        """Return numbers of the data for the record of a run; they are not part of its identity."""
        return {}

    @property
    def held_out_available(self) -> int | None:
        """Number of held-out activations, or None if there is no limit."""
        return None

    def held_out_samples(self, tokens: int) -> Iterator[Sample]:
        """Yield the same ``tokens`` as `held_out`, with their true features.

        Raises:
            ReseedError: the source is not a world.
        """
        raise ReseedError("only the activations of a world have known features")

    def check_length(
        self, stream: ChunkStream, wanted: Sequence[tuple[int, int]], label: str
    ) -> None:
        """Raise `ConfigError` if the data set is too small.

        For a streamed text, whose length is known only after reading, no earlier check exists.

        Args:
            stream: the training activations.
            wanted: batch size and number of batches of each run.
            label: name of the data set.
        """
        check_held_out(self, stream.config.held_out_tokens, "dataset.held_out_tokens")
        for batch_size, number in wanted:
            there = stream.num_batches(batch_size)
            if there is not None and there < number:
                raise ConfigError(
                    f"{{key}} (={number * batch_size:,}) must not exceed the activations of "
                    f"{label}: {there * batch_size:,}",
                    "training.tokens",
                )


def check_held_out(source: ActivationSource, tokens: int, key: str = "tokens") -> None:
    """Raise `ConfigError`, with ``key``, if the source has fewer held-out activations."""
    there = source.held_out_available
    if there is not None and there < tokens:
        raise ConfigError(
            f"{{key}} (={tokens:,}) must not exceed the held-out activations: {there:,}",
            key,
        )
