"""Activations of a language model on a text, chunk by chunk.

chunk(c) = run the model on the sequences that hold activations [c·M, (c+1)·M) of the text in
           its order, and put each activation where the chunk's permutation wants it

M chunk_tokens · B batch · D d_in · L context_length
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.shelf import Shelf
from reseed.activations.stream import STRIPES, ChunkStream, Position, batches_available
from reseed.activations.text import TextConfig
from reseed.activations.tokens import Packing, TokenStore

VERSION = 1
"""Raised when code changes the activations of a chunk: those on disk are then not found."""


class ActivationStream(ChunkStream):
    """The endless or finite sequence of chunks of one text through one model.

    Args:
        model: the language model.
        store: the training documents.
        config: packing, order, chunk size, repetition.
        hookpoints: where activations are read, all in one pass.
        shelf: where chunks are kept on disk.
    """

    config: TextConfig

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore,
        config: TextConfig,
        hookpoints: Sequence[Hookpoint],
        shelf: Shelf | None = None,
    ) -> None:
        super().__init__(config, hookpoints, model.device)
        self.model = model
        self.store = store
        self.shelf = shelf
        self._packing = Packing(store, config)

    @cached_property
    def num_activations(self) -> int:
        """Activations in one reading of the text, the same for every epoch of a repeated one."""
        first = self._epoch(0)
        return first.guaranteed_activations if self.config.repeat else first.num_activations

    def num_batches(self, batch_size: int) -> int | None:
        """Batches that the text gives, or None where it is repeated for ever."""
        return None if self.config.repeat else self._batches_per_epoch(batch_size)

    def position(self, step: int, batch_size: int) -> Position:
        """Where batch ``step`` (0-based) begins."""
        epoch, step = divmod(step, self._batches_per_epoch(batch_size))
        within = super().position(step, batch_size)
        return Position(epoch * self._chunks_per_epoch + within.chunk, within.row)

    def rows(self, c: int) -> int:
        """Activations in each stripe of chunk ``c``: fewer in the last one of an epoch."""
        first = c % self._chunks_per_epoch * self.config.chunk_tokens
        return min(self.config.chunk_tokens, self.num_activations - first) // STRIPES

    def steps_before(self, c: int, batch_size: int) -> int:
        """Batches before the first one of chunk ``c``."""
        epoch, within = divmod(c, self._chunks_per_epoch)
        return epoch * self._batches_per_epoch(batch_size) + super().steps_before(
            within, batch_size
        )

    def _dealt(self, c: int) -> dict[Hookpoint, Tensor]:
        epoch, first, rows = self._extent(c)
        passage = Passage.of(self._epoch(epoch), first, first + rows * STRIPES)

        def computed(hookpoints: Sequence[Hookpoint]) -> dict[Hookpoint, Tensor]:
            order = self._permutation(c, rows)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
            return passage.read_by(self.model, hookpoints, place, self._check_wanted)

        if self.shelf is None:
            found = computed(self.hookpoints)
        else:
            found = self.shelf.get(c, passage.digest, self.hookpoints, computed, self.device)
        return {h: x.view(STRIPES, rows, -1) for h, x in found.items()}

    def _extent(self, c: int) -> tuple[int, int, int]:
        """Epoch, first activation within it, and rows in a stripe of chunk ``c``."""
        epoch, within = divmod(c, self._chunks_per_epoch)
        first = within * self.config.chunk_tokens
        return epoch, first, self.rows(c)

    @property
    def _chunks_per_epoch(self) -> int:
        return -(-self.num_activations // self.config.chunk_tokens)

    def _batches_per_epoch(self, batch_size: int) -> int:
        return batches_available(self.num_activations, self.config, batch_size)

    def _epoch(self, epoch: int) -> Packing:
        if epoch != self._packing.epoch:
            self._packing = Packing(self.store, self.config, epoch)
        return self._packing


@dataclass(frozen=True)
class Passage:
    """Consecutive activations of a packed text, as the sequences that hold them.

    Attributes:
        sequences: what the model reads.
        kept: which positions count as activations.
        skip: activations of the first sequence that come before the passage.
        wanted: activations in the passage.
    """

    sequences: Int[np.ndarray, "sequences context"]
    kept: Bool[np.ndarray, "sequences context"]
    skip: int
    wanted: int

    @classmethod
    def of(cls, packing: Packing, first: int, last: int) -> Passage:
        """Activations ``first`` to ``last`` (exclusive).

        Raises:
            ValueError: the text ends before.
        """
        begin, end, skip = packing.covering(first, last)
        sequences = packing.sequences(begin, end)
        kept = packing.keep(sequences)
        there = int(kept.sum()) - skip
        if there < last - first:
            raise ValueError(
                f"activations {first} to {last} asked for; the text ends at {first + there}"
            )
        return cls(sequences, kept, skip, last - first)

    @property
    def digest(self) -> str:
        """SHA-256 over the tokens and over which of their activations are meant."""
        sha = hashlib.sha256(repr((self.sequences.shape, self.skip, self.wanted)).encode())
        sha.update(np.ascontiguousarray(self.sequences, dtype="<i8").data)
        sha.update(np.packbits(self.kept).data)
        return sha.hexdigest()

    def read_by(
        self,
        model: LanguageModel,
        hookpoints: Sequence[Hookpoint],
        place: Tensor | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> dict[Hookpoint, Float[Tensor, "activations d_in"]]:
        """Its activations.

        Args:
            place: row of the result that each of them shall have; by default in reading order.
            between: called before each forward pass.
        """
        tokens = torch.from_numpy(self.sequences.astype(np.int64, copy=False))
        rows = self._rows(place).to(model.device)
        out: dict[Hookpoint, Tensor] = {}
        begin = 0
        between()
        for found in model.activations(tokens, hookpoints):
            end = begin + next(iter(found.values())).shape[:2].numel()
            for hookpoint, x in found.items():
                buffer = out.get(hookpoint)
                if buffer is None:
                    buffer = torch.empty(
                        self.wanted + 1, x.shape[-1], dtype=x.dtype, device=x.device
                    )
                    out[hookpoint] = buffer
                # One copy, from where the model left it to where it stays.
                buffer.index_copy_(0, rows[begin:end], x.flatten(0, 1))
            begin = end
            between()
        return {hookpoint: buffer[: self.wanted] for hookpoint, buffer in out.items()}

    def _rows(self, place: Tensor | None) -> Int[Tensor, " positions"]:
        """Where the activation of each position goes; those not meant go to one row at the end."""
        number = np.cumsum(self.kept.reshape(-1)) - 1 - self.skip
        meant = self.kept.reshape(-1) & (number >= 0) & (number < self.wanted)
        rows = np.full(len(number), self.wanted, dtype=np.int64)
        rows[meant] = np.arange(self.wanted) if place is None else place.numpy()
        return torch.from_numpy(rows)


def held_out_chunks(
    model: LanguageModel,
    store: TokenStore,
    config: TextConfig,
    hookpoints: Sequence[Hookpoint],
    tokens: int,
    shelf: Shelf | None = None,
) -> Iterator[dict[Hookpoint, Float[Tensor, "activations d_in"]]]:
    """The first ``tokens`` activations of the held-out documents, in pieces of a chunk's size."""
    packing = held_out_packing(store, config)
    hookpoints = tuple(dict.fromkeys(hookpoints))
    for c, first in enumerate(range(0, tokens, config.chunk_tokens)):
        last = min(first + config.chunk_tokens, tokens)
        passage = Passage.of(packing, first, last)
        if shelf is None:
            yield passage.read_by(model, hookpoints)
        else:
            computed = partial(passage.read_by, model)
            yield shelf.get(c, passage.digest, hookpoints, computed, model.device)


def held_out_packing(store: TokenStore, config: TextConfig) -> Packing:
    """Held-out documents in an order that no seed of the experiment moves."""
    return Packing(store, replace(config, order_seed=0))
