"""Cached chunks: read from disk if present, else computed and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reseed.activations.cache import ActivationCache, Entry
from reseed.activations.chunk_file import Damaged, read_chunk, write_chunk
from reseed.activations.hookpoint import Hookpoint
from reseed.config import digest
from reseed.console import say
from reseed.ranks import ALONE, Ranks

_MARGIN = 512
"""Upper bound of a file's bytes besides the activations."""


class Shelf:
    """The cache entries of one part of a text, one entry per hookpoint.

    Files hold the model's output bit by bit in its own precision, in the order of the chunk.

    Args:
        cache: the cache folder.
        key: everything that decides the activations, except the hookpoint.
        readable: name of the entries, containing ``{hookpoint}``.
    """

    def __init__(self, cache: ActivationCache, key: Mapping[str, Any], readable: str) -> None:
        self.cache, self.key, self.readable = cache, dict(key), readable
        self._entries: dict[Hookpoint, Entry | None] = {}

    def get(
        self,
        c: int,
        tokens: str,
        hookpoints: Sequence[Hookpoint],
        compute: Callable[[Sequence[Hookpoint]], dict[Hookpoint, Tensor]],
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> dict[Hookpoint, Tensor]:
        """Return chunk ``c`` at each of the hookpoints.

        Args:
            tokens: digest of the tokens that the model reads for the chunk.
            compute: computes the chunk at given hookpoints; called for those not in the cache.
            device: device of the result.
            ranks: processes that compute the chunk together if any of them does not find it.
        """
        found: dict[Hookpoint, Tensor] = {}
        for hookpoint in hookpoints:
            x = self._read(hookpoint, c, tokens)
            if x is not None:
                found[hookpoint] = x.to(device)
        lacking = torch.tensor([hookpoint not in found for hookpoint in hookpoints]).int()
        lacks = ranks.largest_(lacking.to(ranks.device)).tolist()
        missing = [h for h, lacked in zip(hookpoints, lacks, strict=True) if lacked]
        if missing:
            for hookpoint, x in compute(missing).items():
                if ranks.leads:
                    self._write(hookpoint, c, tokens, x)
                found[hookpoint] = x
        return {hookpoint: found[hookpoint] for hookpoint in hookpoints}

    def find(
        self, c: int, tokens: str, hookpoints: Sequence[Hookpoint], device: torch.device
    ) -> dict[Hookpoint, Tensor] | None:
        """Return chunk ``c`` if the cache has it at all hookpoints, else None."""
        found: dict[Hookpoint, Tensor] = {}
        for hookpoint in hookpoints:
            x = self._read(hookpoint, c, tokens)
            if x is None:
                return None
            found[hookpoint] = x.to(device)
        return found

    def _read(self, hookpoint: Hookpoint, c: int, tokens: str) -> Tensor | None:
        entry = self._entry(hookpoint)
        if entry is None:
            return None
        address = self._address(hookpoint, c, tokens)
        path = entry.file(c, address)
        try:
            return read_chunk(path, address)
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            say(f"a chunk of the activation cache is computed anew: {path}: {error}")
            entry.discard(path)
            return None

    def _write(self, hookpoint: Hookpoint, c: int, tokens: str, x: Tensor) -> None:
        entry = self._entry(hookpoint)
        if entry is not None:
            address = self._address(hookpoint, c, tokens)
            size = x.numel() * x.element_size() + _MARGIN
            entry.write(entry.file(c, address), size, lambda path: write_chunk(path, x, address))

    def _entry(self, hookpoint: Hookpoint) -> Entry | None:
        if hookpoint not in self._entries:
            name = self.readable.replace("{hookpoint}", str(hookpoint))
            self._entries[hookpoint] = self.cache.entry(self._key(hookpoint), name)
        return self._entries[hookpoint]

    def _key(self, hookpoint: Hookpoint) -> dict[str, Any]:
        return {**self.key, "hookpoint": [hookpoint.site, hookpoint.layer, hookpoint.module]}

    def _address(self, hookpoint: Hookpoint, c: int, tokens: str) -> str:
        return digest([self._key(hookpoint), c, tokens], 64)
