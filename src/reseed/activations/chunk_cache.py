"""Chunks in the activation cache: read from disk if present, else computed and stored.

A chunk is a safetensors file with a checksum over its address and its content. The address is a
digest of everything that determines the chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reseed.activations.cache import ActivationCache, CacheEntry
from reseed.activations.hookpoints import Hookpoint
from reseed.config import digest
from reseed.distributed.process_group import ALONE, ProcessGroup
from reseed.system.console import say

_NAME = "activations"
_LONGEST_HEADER = 1 << 20
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""The dtypes that activations may have, with their names in safetensors."""
_DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_MARGIN = 512
"""Maximum number of bytes that a file has besides the activations."""


class ChunkCache:
    """Cache entries of the training or the held-out documents, one entry per hookpoint.

    Files hold the model's output unchanged, in the model's precision and the order of the chunk.

    Args:
        cache: the cache folder.
        key: everything that determines the activations, except the hookpoint.
        readable: name of the entries, containing ``{hookpoint}``.
    """

    def __init__(self, cache: ActivationCache, key: Mapping[str, Any], readable: str) -> None:
        self.cache, self.key, self.readable = cache, dict(key), readable
        self._entries: dict[Hookpoint, CacheEntry | None] = {}

    def get(
        self,
        c: int,
        tokens: str,
        hookpoints: Sequence[Hookpoint],
        compute: Callable[[Sequence[Hookpoint]], dict[Hookpoint, Tensor]],
        device: torch.device,
        ranks: ProcessGroup = ALONE,
    ) -> dict[Hookpoint, Tensor]:
        """Return chunk ``c`` at each of the hookpoints.

        Args:
            tokens: digest of the tokens that the model reads for the chunk.
            compute: computes the chunk at the hookpoints that the cache lacks.
            device: device of the result.
            ranks: processes that compute the chunk together if any of them does not find it.
        """
        found: dict[Hookpoint, Tensor] = {}
        for hookpoint in hookpoints:
            x = self._read(hookpoint, c, tokens)
            if x is not None:
                found[hookpoint] = x.to(device)
        lacking = torch.tensor([hookpoint not in found for hookpoint in hookpoints]).int()
        lacks = ranks.max_(lacking.to(ranks.device)).tolist()
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
        except (DamagedChunkError, OSError) as error:
            say(f"a chunk of the activation cache is computed again: {path}: {error}")
            entry.discard(path)
            return None

    def _write(self, hookpoint: Hookpoint, c: int, tokens: str, x: Tensor) -> None:
        entry = self._entry(hookpoint)
        if entry is not None:
            address = self._address(hookpoint, c, tokens)
            size = x.numel() * x.element_size() + _MARGIN
            entry.write(entry.file(c, address), size, lambda path: write_chunk(path, x, address))

    def _entry(self, hookpoint: Hookpoint) -> CacheEntry | None:
        if hookpoint not in self._entries:
            name = self.readable.replace("{hookpoint}", str(hookpoint))
            self._entries[hookpoint] = self.cache.entry(self._key(hookpoint), name)
        return self._entries[hookpoint]

    def _key(self, hookpoint: Hookpoint) -> dict[str, Any]:
        return {**self.key, "hookpoint": hookpoint.key}

    def _address(self, hookpoint: Hookpoint, c: int, tokens: str) -> str:
        return digest([self._key(hookpoint), c, tokens], 64)


class DamagedChunkError(Exception):
    """Error about a chunk file that is truncated, corrupted, or holds another chunk."""


def write_chunk(path: Path, x: Tensor, address: str) -> None:
    """Write ``x``, in its own precision, as the chunk with this address.

    The file is overwritten in place and not truncated first, so that its space stays reserved. It
    is not fsynced: the checksum detects a file that a power cut left incomplete.

    Args:
        path: an existing file, at least as long as the content.
    """
    x = x.detach().cpu().contiguous()
    header = file_header(x.dtype, x.shape, {"address": address, "sha256": _checksum(x, address)})
    with path.open("r+b") as file:
        file.write(header)
        file.write(data_of(x))
        file.truncate()


def read_chunk(path: Path, address: str) -> Tensor:
    """Read the chunk with this address.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedChunkError: the file is truncated, corrupted, or holds another chunk.
    """
    with path.open("rb") as file:
        begun = file.read(8)
        length = int.from_bytes(begun, "little")
        if len(begun) < 8 or not 2 <= length <= _LONGEST_HEADER:
            raise DamagedChunkError("it has no header")
        try:
            header = json.loads(file.read(length))
            metadata, about = header["__metadata__"], header[_NAME]
            shape, dtype = [int(n) for n in about["shape"]], _DTYPES_BY_NAME[about["dtype"]]
            begin, end = (int(n) for n in about["data_offsets"])
            address_there, checksum = metadata["address"], metadata["sha256"]
        except (ValueError, KeyError, TypeError):
            raise DamagedChunkError("its header cannot be read") from None
        if address_there != address:
            raise DamagedChunkError("it holds other activations than its name says")
        size = path.stat().st_size - 8 - length
        if begin != 0 or min(shape, default=0) < 0 or end != size:
            raise DamagedChunkError("its length is wrong")
        # A corrupt shape must not allocate more memory than the file holds.
        if torch.Size(shape).numel() * dtype.itemsize != size:
            raise DamagedChunkError("its header cannot be read")
        x = torch.empty(shape, dtype=dtype)
        if file.readinto(data_of(x)) != size:
            raise DamagedChunkError("its length is wrong")
    if _checksum(x, address) != checksum:
        raise DamagedChunkError("its checksum is wrong")
    return x


def _checksum(x: Tensor, address: str) -> str:
    sha = hashlib.sha256(json.dumps([address, str(x.dtype), list(x.shape)]).encode())
    sha.update(data_of(x))
    return sha.hexdigest()


def file_header(
    dtype: torch.dtype, shape: Sequence[int], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes of a .safetensors file of activations before the activations."""
    size = torch.Size(shape).numel() * dtype.itemsize
    about = {_NAME: {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}}
    text = json.dumps({"__metadata__": metadata, **about} if metadata else about).encode()
    text += b" " * (-len(text) % 8)  # aligns the activations
    return len(text).to_bytes(8, "little") + text


def data_of(x: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU."""
    return x.reshape(-1).view(torch.uint8).numpy().data
