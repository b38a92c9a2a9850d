"""Activations of a language model on a text, chunk by chunk.

chunk(c) = run the model on the sequences that hold activations [c·M, (c+1)·M) of the ordered text,
           and put each activation in the row that the chunk's permutation assigns to it

M chunk_tokens · B batch · D d_in · L context_length
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.chunk_cache import ChunkCache
from reseed.activations.dataset import STRIPES
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.stream import EpochStream
from reseed.activations.text import TextConfig
from reseed.activations.token_store import Packing, TokenStore
from reseed.distributed.process_group import ALONE, ProcessGroup

VERSION = 1
"""Increase it if a change of the code changes a chunk's activations; old chunks are then unused."""


class ActivationStream(EpochStream):
    """The endless or finite sequence of chunks of one model's activations on one text.

    Args:
        model: the language model.
        store: the training documents.
        config: packing, order, chunk size, repetition.
        hookpoints: where activations are read, all in one forward pass.
        chunk_cache: the cached chunks of the training documents; None: no cache.
        needed: number of activations to choose with ``config.subset_seed`` (`Packing`).
    """

    config: TextConfig

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore,
        config: TextConfig,
        hookpoints: Sequence[Hookpoint],
        chunk_cache: ChunkCache | None = None,
        needed: int | None = None,
    ) -> None:
        super().__init__(config, config.repeat, hookpoints, model.device)
        self.model = model
        self.store = store
        self.chunk_cache = chunk_cache
        self._packing = Packing(store, config, needed=needed)

    @cached_property
    def num_activations(self) -> int:
        """Number of activations per epoch; for a repeated text, a lower bound for every epoch."""
        first = self._epoch(0)
        return first.guaranteed_activations if self.config.repeat else first.num_activations

    def _compute_chunk(self, c: int) -> dict[Hookpoint, Tensor]:
        epoch, first, rows = self.extent(c)
        window = TokenWindow.of(self._epoch(epoch), first, first + rows * STRIPES)

        def computed(hookpoints: Sequence[Hookpoint]) -> dict[Hookpoint, Tensor]:
            place = self._places(c, rows, slice(0, STRIPES))
            return window.read_by(
                self.model, hookpoints, place, self._check_wanted, self._compute_ranks
            )

        if self.chunk_cache is None:
            found = computed(self.hookpoints)
        else:
            found = self.chunk_cache.get(
                c, window.digest, self.hookpoints, computed, self.device, self._compute_ranks
            )
        return {h: x.view(STRIPES, rows, -1) for h, x in found.items()}

    def _compute_own_stripes(self, c: int) -> dict[Hookpoint, Tensor]:
        """Run the model on this rank's stripes only, unless the cache has the chunk."""
        if self.stripes == slice(0, STRIPES):
            return self._compute_chunk(c)
        epoch, first, rows = self.extent(c)
        packing = self._epoch(epoch)
        found = None
        if self.chunk_cache is not None:
            whole = TokenWindow.of(packing, first, first + rows * STRIPES)
            found = self.chunk_cache.find(c, whole.digest, self.hookpoints, self.device)
        if found is not None:
            return {h: x.view(STRIPES, rows, -1)[self.stripes].clone() for h, x in found.items()}
        begin, end = first + self.stripes.start * rows, first + self.stripes.stop * rows
        place = self._places(c, rows, self.stripes)
        found = TokenWindow.of(packing, begin, end).read_by(
            self.model, self.hookpoints, place, self._check_wanted
        )
        return {h: x.view(-1, rows, x.shape[-1]) for h, x in found.items()}

    def _places(self, c: int, rows: int, stripes: slice) -> Tensor:
        """Return the row of each activation of ``stripes``, in reading order, counted in them."""
        order = self._permutation(c, rows)[stripes.start * rows : stripes.stop * rows]
        order = order - stripes.start * rows
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        return place

    def _epoch(self, epoch: int) -> Packing:
        if epoch != self._packing.epoch:
            self._packing = replace(self._packing, epoch=epoch)
        return self._packing


@dataclass(frozen=True)
class TokenWindow:
    """A range of consecutive activations of a packed text, with the sequences that hold them.

    Attributes:
        sequences: the tokens that the model reads.
        kept: mask of the positions that count as activations.
        skip: number of activations of the first sequence that come before the window.
        num_activations: number of activations in the window.
    """

    sequences: Int[np.ndarray, "sequences context"]
    kept: Bool[np.ndarray, "sequences context"]
    skip: int
    num_activations: int

    @classmethod
    def of(cls, packing: Packing, first: int, last: int) -> TokenWindow:
        """Return the window of activations ``first`` to ``last`` (exclusive).

        Raises:
            ValueError: the text ends before ``last``.
        """
        begin, end, skip = packing.covering(first, last)
        sequences = packing.sequences(begin, end)
        kept = packing.keep(sequences)
        there = int(kept.sum()) - skip
        if there < last - first:
            raise ValueError(
                f"activations {first} to {last} were requested; the text ends at {first + there}"
            )
        return cls(sequences, kept, skip, last - first)

    @property
    def digest(self) -> str:
        """SHA-256 over the tokens and the selection of their activations."""
        sha = hashlib.sha256(repr((self.sequences.shape, self.skip, self.num_activations)).encode())
        sha.update(np.ascontiguousarray(self.sequences, dtype="<i8").data)
        sha.update(np.packbits(self.kept).data)
        return sha.hexdigest()

    def read_by(
        self,
        model: LanguageModel,
        hookpoints: Sequence[Hookpoint],
        place: Tensor | None = None,
        between: Callable[[], None] = lambda: None,
        ranks: ProcessGroup = ALONE,
    ) -> dict[Hookpoint, Float[Tensor, "activations d_in"]]:
        """Run ``model`` on the window and return its activations.

        Args:
            place: row of each activation in the result; by default in reading order.
            between: called before each forward pass and after the last.
            ranks: processes that share the forward passes. Each returns all activations, the same
                as a single process would.
        """
        tokens = torch.from_numpy(self.sequences.astype(np.int64, copy=False))
        buffers = _RowBuffers(self._rows(place).to(model.device), self.num_activations)
        shares = _shares(len(tokens), model.batch_sequences, ranks.count)
        begin = shares[ranks.index].start * tokens.shape[1]
        read: list[dict[Hookpoint, Tensor]] = []
        between()
        for found in model.activations(tokens[shares[ranks.index]], hookpoints):
            buffers.put(found, begin)
            begin += next(iter(found.values())).shape[:2].numel()
            if ranks.several:
                read.append(found)
            between()
        for source, share in enumerate(shares) if ranks.several else ():
            for hookpoint in dict.fromkeys(hookpoints) if share.stop > share.start else ():
                positions = (share.stop - share.start) * tokens.shape[1]
                if source == ranks.index:
                    x = torch.cat([found[hookpoint].flatten(0, 1) for found in read])
                else:
                    width = model.resolved.d_in(hookpoint)
                    x = torch.empty(positions, width, dtype=model.dtype, device=model.device)
                ranks.broadcast_(x, source, between)
                if source != ranks.index:
                    buffers.put({hookpoint: x}, share.start * tokens.shape[1])
        return buffers.done

    def _rows(self, place: Tensor | None) -> Int[Tensor, " positions"]:
        """Return the row of each position's activation; excluded positions share one last row."""
        number = np.cumsum(self.kept.reshape(-1)) - 1 - self.skip
        inside = self.kept.reshape(-1) & (number >= 0) & (number < self.num_activations)
        rows = np.full(len(number), self.num_activations, dtype=np.int64)
        rows[inside] = np.arange(self.num_activations) if place is None else place.numpy()
        return torch.from_numpy(rows)


class _RowBuffers:
    """Buffers that collect activations at their rows.

    Args:
        rows: row of each position that the model reads; `num_rows` for excluded positions.
        num_rows: number of rows.
    """

    def __init__(self, rows: Int[Tensor, " positions"], num_rows: int) -> None:
        self.rows, self.num_rows = rows, num_rows
        self._out: dict[Hookpoint, Tensor] = {}

    def put(self, found: Mapping[Hookpoint, Tensor], begin: int) -> None:
        """Store the activations of consecutive positions from ``begin`` on."""
        for hookpoint, x in found.items():
            x = x.flatten(0, -2)
            if hookpoint not in self._out:
                self._out[hookpoint] = x.new_empty(self.num_rows + 1, x.shape[-1])
            # This copies each activation only once, directly from the model's output.
            self._out[hookpoint].index_copy_(0, self.rows[begin : begin + len(x)], x)

    @property
    def done(self) -> dict[Hookpoint, Float[Tensor, "activations d_in"]]:
        return {hookpoint: buffer[: self.num_rows] for hookpoint, buffer in self._out.items()}


def _shares(sequences: int, at_once: int, count: int) -> list[slice]:
    """Split the sequences among ranks at the batch boundaries of a single process."""
    passes = -(-sequences // at_once)
    bounds = [min(passes * r // count * at_once, sequences) for r in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def held_out_chunks(
    model: LanguageModel,
    store: TokenStore,
    config: TextConfig,
    hookpoints: Sequence[Hookpoint],
    tokens: int,
    chunk_cache: ChunkCache | None = None,
) -> Iterator[dict[Hookpoint, Float[Tensor, "activations d_in"]]]:
    """Yield the first ``tokens`` activations of the held-out documents, one chunk at a time."""
    packing = held_out_packing(store, config)
    hookpoints = tuple(dict.fromkeys(hookpoints))
    for c, first in enumerate(range(0, tokens, config.chunk_tokens)):
        last = min(first + config.chunk_tokens, tokens)
        window = TokenWindow.of(packing, first, last)
        if chunk_cache is None:
            yield window.read_by(model, hookpoints)
        else:
            computed = partial(window.read_by, model)
            yield chunk_cache.get(c, window.digest, hookpoints, computed, model.device)


def held_out_packing(store: TokenStore, config: TextConfig) -> Packing:
    """Return the held-out documents in an order independent of the experiment's seeds."""
    return Packing(store, replace(config, order_seed=0, subset_seed=None))
