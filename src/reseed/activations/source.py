"""What activations come from: a language model that reads a text, or a world of known features.

    SourceConfig (model=)  ──resolve──►  ResolvedSource ──data(dataset=)──►  ResolvedData
                                                                  │ open: weights are loaded
                                                                  ▼
                                                           ActivationSource ──stream──► ChunkStream

Everything outside this folder sees these classes alone, and never asks which kind it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.stream import ChunkStream, DatasetConfig
from reseed.config import Config, ConfigError, ReseedError

if TYPE_CHECKING:
    from reseed.activations.cache import ActivationCache
    from reseed.activations.worlds import Sample, World


@dataclass(frozen=True)
class SourceConfig(Config, ABC, family="model"):
    """What ``model=`` may name; members are language models and worlds."""

    @abstractmethod
    def resolve(self, cache: Path) -> ResolvedSource:
        """Find it, without loading weights.

        Raises:
            ConfigError: it is not there, or not what it should be.
        """


class ResolvedSource(ABC):
    """A language model or a world, found but not loaded.

    Attributes:
        label: short name for folders and tables.
        fingerprint: identifies it by its content.
    """

    label: str
    fingerprint: str

    @property
    def num_features(self) -> int | None:
        """How many features are known to make its activations; None where none are."""
        return None

    @property
    @abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """What enters a run's signature beside what was declared, by name."""

    def with_random_weights(self) -> ResolvedSource:
        """The same source with weights that were never trained.

        Raises:
            ConfigError: it has no weights.
        """
        raise ConfigError(
            f"{{key}}=random_weights needs a language model; {self.label} has no weights",
            "surrogate",
        )

    @abstractmethod
    def check(self, hookpoint: Hookpoint) -> None:
        """Raise `ConfigError` where it has no such layer or module."""

    @abstractmethod
    def d_in(self, hookpoint: Hookpoint) -> int:
        """Width of the activations at ``hookpoint``."""

    @abstractmethod
    def data(self, config: DatasetConfig, cache: Path) -> ResolvedData:
        """The data set that ``config`` declares, as this source takes it.

        Raises:
            ConfigError: with a key relative to ``dataset``; it is not there, or not for this kind
                of source.
        """


class ResolvedData(ABC):
    """A data set found and bound to its source, not opened.

    Attributes:
        config: what was declared.
    """

    config: DatasetConfig

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for folders and tables."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What it is, for a sentence: ``text docstrings``."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Tokens in a sequence; None where there are no sequences."""

    @property
    @abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """What enters a run's signature beside what was declared, by name."""

    @property
    def order_seed(self) -> int:
        """Seed of the order of its activations."""
        return self.config.order_seed

    @abstractmethod
    def in_order(self, order_seed: int) -> Self:
        """The same data in the order of another seed."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """What its source keeps in memory once it is opened."""

    @abstractmethod
    def flops_per_token(self, hookpoints: Sequence[Hookpoint]) -> float:
        """Floating-point operations that an activation costs, about."""

    @abstractmethod
    def check_budget(self, steps: int, batch_size: int) -> None:
        """Raise `ConfigError`, with the full key, where there is known to be too little."""

    @abstractmethod
    def open(
        self, device: torch.device, needed: int, cache: ActivationCache | None = None
    ) -> ActivationSource:
        """Find what is needed to compute activations.

        Args:
            device: where they will be.
            needed: activations that training needs; a streamed text is read no further.
            cache: keeps those of a language model on disk; draws are not worth it.
        """


class ActivationSource(ABC):
    """An opened source.

    Attributes:
        device: where the activations are.
        world: the features that the activations are made of, where they are known.
    """

    device: torch.device
    world: World | None = None

    @abstractmethod
    def stream(self, hookpoints: Sequence[Hookpoint]) -> ChunkStream:
        """The activations to train on."""

    @abstractmethod
    def held_out(
        self, hookpoints: Sequence[Hookpoint], tokens: int
    ) -> Iterator[dict[Hookpoint, Float[Tensor, "activations d_in"]]]:
        """The first ``tokens`` activations that no SAE is trained on, in pieces."""

    @property
    def held_out_available(self) -> int | None:
        """Held-out activations that there are, or None where they never end."""
        return None

    def held_out_samples(self, tokens: int) -> Iterator[Sample]:
        """The same ``tokens`` as `held_out`, with the features that they are made of.

        Raises:
            ReseedError: the source is no world.
        """
        raise ReseedError("only the activations of a world have known features")

    def check_length(
        self, stream: ChunkStream, wanted: Sequence[tuple[int, int]], label: str
    ) -> None:
        """Raise `ConfigError` where there is too little: streamed texts show it only now.

        Args:
            stream: the activations to train on.
            wanted: batch size and number of batches of each run.
            label: name of the data set.
        """
        held_out, measured = stream.config.held_out_tokens, self.held_out_available
        if measured is not None and measured < held_out:
            raise ConfigError(
                f"{{key}} (={held_out:,}) must not exceed the activations of the held-out "
                f"documents: {measured:,}",
                "dataset.held_out_tokens",
            )
        for batch_size, number in wanted:
            there = stream.num_batches(batch_size)
            if there is not None and there < number:
                raise ConfigError(
                    f"{{key}} (={number * batch_size:,}) must not exceed the activations of "
                    f"{label}: {there * batch_size:,}",
                    "training.tokens",
                )


def check_held_out(source: ActivationSource, tokens: int) -> None:
    """Raise `ConfigError`, with the key ``tokens``, where a source has fewer held-out ones."""
    there = source.held_out_available
    if there is not None and there < tokens:
        raise ConfigError(
            f"{{key}} (={tokens:,}) must not exceed the activations of the held-out documents: "
            f"{there:,}",
            "tokens",
        )
