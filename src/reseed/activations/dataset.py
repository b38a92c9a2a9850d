"""Configuration common to all data sets (``dataset=``), and how chunks are divided into batches.

A data set is read in chunks. The activations of a chunk are dealt into 8 stripes, and a batch takes
the same number of tokens from every stripe (`stream`). This module does not import torch, so that
commands that only read the configuration start quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool

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


def held_out_units(count: int, fraction: float) -> Bool[np.ndarray, " count"]:
    """Return a mask of about this fraction of the units, by a hash of each unit's number.

    The hash is the output function of SplitMix64 (Steele et al. 2014).
    """
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) < np.uint64(fraction * 2**64)
