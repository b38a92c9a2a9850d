"""Configuration common to all data sets (``dataset=``), and how chunks are divided into batches.

A data set is read in chunks. The activations of a chunk are dealt into 8 stripes, and a batch takes
the same number of tokens from every stripe (`stream`). This module does not import torch, so that
commands that only read the configuration start quickly.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from reseed.config import Config, setting
from reseed.errors import ConfigError

STRIPES = 8
"""Number of stripes of a chunk; a batch takes the same number of tokens from each."""


@dataclass(frozen=True)
class DatasetConfig(Config, family="dataset"):
    """Base configuration of data sets: order and chunk size."""

    belongs: ClassVar[str] = "is a text"
    """End of a sentence about the data set, for messages: what it is, or which models it is for."""
    order_seed: int = setting(0, at_least=0)
    """Seed that sets only the order of documents and tokens."""
    chunk_tokens: int = setting(65_536, at_least=STRIPES)
    """Number of activations that are computed and shuffled together."""
    held_out_tokens: int = setting(65_536, at_least=1)
    """Number of held-out activations on which every run is measured."""

    def validate(self) -> None:
        if self.chunk_tokens % STRIPES:
            raise ConfigError(
                f"{{key}} must be a multiple of {STRIPES}; got {self.chunk_tokens}", "chunk_tokens"
            )

    def stamp(self) -> Hashable:
        """Return a value that changes if the data set's files do, so that they are read again.

        Raises:
            ConfigError: a file is missing.
        """
        return None

    def at_first_seeds(self) -> Self:
        """Return the configuration with each of its seeds at the first value."""
        return replace(self, order_seed=0)

    def without_subset(self) -> Self:
        """Return the configuration that reads the data from the beginning of their order, without
        a subset of their own for each budget."""
        return self


@dataclass(frozen=True, order=True)
class Position:
    """The start of a batch in the stream: a chunk, and a row of each of its stripes.

    Positions of batches of different sizes are comparable.
    """

    chunk: int
    row: int


def check_batch_size(config: DatasetConfig, batch_size: int) -> None:
    """Raise `ConfigError` if batches do not tile a chunk."""
    if batch_size % STRIPES or config.chunk_tokens % batch_size:
        raise ConfigError(
            f"{{key}} must be a multiple of {STRIPES} that divides dataset.chunk_tokens "
            f"(={config.chunk_tokens}); got {batch_size}",
            "training.batch_size",
        )


def batches_available(activations: int, config: DatasetConfig, batch_size: int) -> int:
    """Return the number of whole batches in one epoch of ``activations``."""
    full, rest = divmod(activations, config.chunk_tokens)
    last = (rest // STRIPES) // (batch_size // STRIPES)
    return full * (config.chunk_tokens // batch_size) + last
