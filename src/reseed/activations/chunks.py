"""Activations of a language model on a text, chunk by chunk.

chunk(c) = run the model on the sequences that hold activations [c·M, (c+1)·M) of the text in
           its order, gather the activations, then deal and permute them as every stream does

M chunk_tokens · B batch · D d_in · L context_length
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.stream import STRIPES, ChunkStream, Position, batches_available
from reseed.activations.text import TextConfig
from reseed.activations.tokens import Packing, TokenStore


class ActivationStream(ChunkStream):
    """The endless or finite sequence of chunks of one text through one model.

    Args:
        model: the loaded language model.
        store: the training documents.
        config: packing, order, chunk size, repetition.
        hookpoints: where activations are read, all in one pass.
    """

    config: TextConfig

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore,
        config: TextConfig,
        hookpoints: Sequence[Hookpoint],
    ) -> None:
        super().__init__(config, hookpoints, model.device)
        self.model = model
        self.store = store
        self._packing = Packing(store, config)

    @cached_property
    def num_activations(self) -> int:
        """Activations in one reading of the text, the same for every epoch of a repeated one."""
        first = Packing(self.store, self.config)
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

    def _ordered(self, c: int) -> dict[Hookpoint, Tensor]:
        epoch, within = divmod(c, self._chunks_per_epoch)
        first = within * self.config.chunk_tokens
        last = first + self.rows(c) * STRIPES
        return gather(self.model, self._epoch(epoch), first, last, self.hookpoints)

    @property
    def _chunks_per_epoch(self) -> int:
        return -(-self.num_activations // self.config.chunk_tokens)

    def _batches_per_epoch(self, batch_size: int) -> int:
        return batches_available(self.num_activations, self.config, batch_size)

    def _epoch(self, epoch: int) -> Packing:
        if epoch != self._packing.epoch:
            self._packing = Packing(self.store, self.config, epoch)
        return self._packing


def gather(
    model: LanguageModel, packing: Packing, first: int, last: int, hookpoints: Sequence[Hookpoint]
) -> dict[Hookpoint, Float[Tensor, "activations d_in"]]:
    """Activations ``first`` to ``last`` (exclusive) of a packed text, in reading order."""
    begin, end, skip = packing.covering(first, last)
    sequences = packing.sequences(begin, end)
    kept = packing.keep(sequences)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    out: dict[Hookpoint, Tensor] = {}
    filled, row, wanted = -skip, 0, last - first
    for found in model.activations(tokens, hookpoints):
        batch = next(iter(found.values())).shape[0]
        mask = torch.from_numpy(kept[row : row + batch])
        # One buffer for the whole chunk, filled batch by batch: a list to concatenate would need
        # the memory twice.
        low, high = filled, filled + int(mask.sum())
        part = slice(max(low, 0), min(high, wanted))
        for hookpoint, x in found.items():
            rows = x[mask.to(x.device)]
            buffer = out.setdefault(
                hookpoint, torch.empty(wanted, rows.shape[1], dtype=rows.dtype, device=rows.device)
            )
            buffer[part] = rows[part.start - low : part.stop - low]
        filled, row = high, row + batch
    if filled < wanted:
        raise ValueError(
            f"activations {first} to {last} asked for; the text ends at {first + filled}"
        )
    return out


def held_out_chunks(
    model: LanguageModel,
    store: TokenStore,
    config: TextConfig,
    hookpoints: Sequence[Hookpoint],
    tokens: int,
) -> Iterator[dict[Hookpoint, Float[Tensor, "activations d_in"]]]:
    """The first ``tokens`` activations of the held-out documents, in pieces of a chunk's size."""
    packing = held_out_packing(store, config)
    for first in range(0, tokens, config.chunk_tokens):
        last = min(first + config.chunk_tokens, tokens)
        yield gather(model, packing, first, last, hookpoints)


def held_out_packing(store: TokenStore, config: TextConfig) -> Packing:
    """Held-out documents in an order that no seed of the experiment moves."""
    from dataclasses import replace

    return Packing(store, replace(config, order_seed=0))
