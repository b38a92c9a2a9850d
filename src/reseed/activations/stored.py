"""Stored activations of any model as a source (``model=activations``): files, memory-mapped.

The shards are one array of rows in the order of their names. It is divided into units: a sequence,
or a block of 64 rows if the files have no sequences, because neighbouring rows often come from one
input. A hash of a unit's number decides whether it is held out, so that shards can be appended
without moving a row from one part to the other. The order seed permutes the units of an epoch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.cache import ActivationCache
from reseed.activations.chunk_cache import DTYPES, data_of
from reseed.activations.dataset import STRIPES, DatasetConfig, batches_available
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.source import ActivationSource, ResolvedData, ResolvedSource, SourceConfig
from reseed.activations.stored_files import (
    check_finite,
    check_kind,
    described,
    find_files,
    held_out_units,
    map_files,
)
from reseed.activations.stream import EpochStream
from reseed.config import digest, setting
from reseed.errors import ConfigError, ReseedError
from reseed.system.console import say
from reseed.system.files import user_path
from reseed.system.integrity import DamagedFileError, read_record, stamp, write_record

_UNIT = 64
"""Number of rows of a unit if the files have no sequences."""
_PIECE = 1 << 22
"""Number of bytes that are hashed or copied at once."""
_SMALL = 100_000_000
"""Above this number of bytes, the fingerprint is stored in the folder of derived data."""
_HELD_OUT_BLOCK = 4_096
"""Number of held-out activations that are read at once."""


@dataclass(frozen=True, kw_only=True)
class StoredActivationsConfig(SourceConfig, name="activations"):
    """Activations in files. They are identified by their content, so no field is signed."""

    path: str = setting(signed=False)
    tensor: str | None = setting(None, signed=False)
    field: str | None = setting(None, signed=False)
    label: str | None = setting(None, signed=False)
    origin: str = setting("files", choices=("files", "memory"), signed=False)
    """``memory``: the file is a copy of activations that `reseed.compose` was given."""

    def stamp(self) -> Hashable:
        with suppress(ReseedError):
            return stamp(find_files(user_path(self.path))[0])
        return None

    def resolve(self, cache: Path) -> ResolvedActivations:
        """Map the files, and check and hash their content.

        Raises:
            ConfigError: a file cannot be read or does not fit the others, or an activation is not
                finite.
        """
        path = user_path(self.path)
        if self.origin == "memory" and not path.exists():
            raise ConfigError(
                f"{{key}}: the copy of the activations from memory, {path}, is gone: call "
                "reseed.compose(..., activations=...) with the same activations again",
                "path",
            )
        files, passed_over = find_files(path)
        label = self.label or (path.resolve().name if path.is_dir() else path.stem) or self.name
        if passed_over:
            few = ", ".join(passed_over[:5]) + (" ..." if len(passed_over) > 5 else "")
            say(f"{label}: {len(files):,} shards; passed over: {few}")
        found = map_files(files, self.tensor, self.field, cache)
        mapped = tuple(file for file, _ in found)
        stamped = stamp(mapped)
        shards = Shards.of((str(f), x) for f, (_, x) in zip(files, found, strict=True))
        origin = [stamped, self.tensor, self.field]
        fingerprint = _fingerprint(shards, origin, label, cache)
        return ResolvedActivations(self, label, fingerprint, shards, mapped, stamped)


@dataclass(frozen=True)
class StoredConfig(DatasetConfig, name="stored"):
    """Order and split of stored activations."""

    belongs = "is for model=activations"

    repeat: bool = False
    """True: read fewer activations than the budget again, in another order; false: fail."""
    held_out_fraction: float = setting(0.05, above=0, below=1)
    """Share of the units, chosen by a hash of their number, on which no SAE is trained."""


@dataclass(frozen=True, eq=False)
class Shards:
    """Activations in several tensors, mostly memory-mapped, as one array of rows.

    Attributes:
        names: name of each shard, for messages.
        tensors: [rows, d_in], or [sequences, positions, d_in].
    """

    names: tuple[str, ...]
    tensors: tuple[Float[Tensor, "*items d_in"], ...]

    @classmethod
    def of(cls, found: Iterable[tuple[str, Tensor]]) -> Shards:
        """Check dtypes and shapes; empty shards are left out.

        Raises:
            ConfigError: a shard has no activations or differs from the others, or all are empty.
        """
        kept: list[tuple[str, Tensor]] = []
        for name, x in found:
            check_kind(name, x)
            if not x.numel():
                continue
            kept.append((name, x.detach()))
            first, like = kept[0]
            if x.shape[1:] != like.shape[1:] or x.dtype != like.dtype:
                raise ConfigError(
                    "{key}: all shards must have one dtype, and one shape but for the first "
                    f"dimension: {first} is {described(like)}, {name} is {described(x)}",
                    "path",
                )
        if not kept:
            raise ConfigError("{key} must hold activations; all shards are empty", "path")
        return cls(tuple(name for name, _ in kept), tuple(x for _, x in kept))

    @property
    def d_in(self) -> int:
        return self.tensors[0].shape[-1]

    @property
    def positions(self) -> int:
        """Number of positions of a sequence; 1 if the shards have none."""
        return self.tensors[0].shape[1] if self.tensors[0].ndim == 3 else 1

    @cached_property
    def bounds(self) -> list[int]:
        """First row of each shard, and the number of all rows."""
        return [*accumulate((x.shape[:-1].numel() for x in self.tensors), initial=0)]

    @property
    def num_rows(self) -> int:
        return self.bounds[-1]

    @property
    def unit(self) -> int:
        """Number of rows of a unit; the last one may have fewer."""
        return self.positions if self.tensors[0].ndim == 3 else _UNIT

    def read(self, first: int, last: int) -> Float[Tensor, "rows d_in"]:
        """Return rows ``first`` to ``last`` (exclusive): whole sequences, if there are some."""
        each, shard, parts = self.positions, bisect_right(self.bounds, first) - 1, []
        while first < last:
            begin, end = self.bounds[shard], min(last, self.bounds[shard + 1])
            items = self.tensors[shard][(first - begin) // each : (end - begin) // each]
            parts.append(items.reshape(-1, self.d_in))
            first, shard = end, shard + 1
        return torch.cat(parts)

    def blocks(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield pieces on the CPU: the shard's name, the first item, the items."""
        for name, x in zip(self.names, self.tensors, strict=True):
            size = max(1, _PIECE // (x[0].numel() * x.element_size()))
            for first in range(0, len(x), size):
                yield name, first, x[first : first + size].cpu().contiguous()

    def fingerprint(self) -> str:
        """Return the SHA-256 over dtype, shape of an item, and rows.

        It depends neither on names and format of the files nor on their number.

        Raises:
            ConfigError: an activation is not finite in float32; the message has file and row.
        """
        x = self.tensors[0]
        sha = hashlib.sha256(repr((DTYPES[x.dtype], list(x.shape[1:]))).encode())
        for name, first, block in self.blocks():
            check_finite(name, first, block)
            sha.update(data_of(block))
        return sha.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class ResolvedActivations(ResolvedSource):
    """Checked activations in mapped files."""

    config: StoredActivationsConfig
    label: str
    fingerprint: str
    shards: Shards
    files: tuple[Path, ...]
    stamped: Hashable
    kind = "a set of stored activations"

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"activations": self.fingerprint}

    def check(self, hookpoint: Hookpoint) -> None:
        """Raise `ConfigError` unless ``hookpoint`` is resid_post.0."""
        self.check_single_place(hookpoint)

    def d_in(self, hookpoint: Hookpoint) -> int:
        return self.shards.d_in

    def data(self, config: DatasetConfig, cache: Path) -> StoredData:
        if not isinstance(config, StoredConfig):
            raise ConfigError(
                f"{{key}}={config.name} {config.belongs}, but model={self.label} is {self.kind}: "
                "set dataset=stored"
            )
        return StoredData(self, config)


@dataclass(frozen=True, eq=False)
class StoredData(ResolvedData):
    """Stored activations, with their order and split."""

    found: ResolvedActivations
    config: StoredConfig

    @property
    def label(self) -> str:
        return "stored"

    @property
    def description(self) -> str:
        return f"{self.found.shards.num_rows:,} stored activations"

    @property
    def context_length(self) -> None:
        return None

    @property
    def fingerprints(self) -> dict[str, str]:
        return {}  # those of the source say all

    def in_order(self, order_seed: int) -> Self:
        return replace(self, config=replace(self.config, order_seed=order_seed))

    @property
    def weight_bytes(self) -> int:
        return 0

    def flops_per_token(self, hookpoints: Sequence[Hookpoint]) -> float:
        return 0.0

    def rows(self, held_out: bool, seed: int, epoch: int = 0) -> OrderedRows:
        """Return the rows of one part, in the order of a seed."""
        return OrderedRows(self.found.shards, self._held_out == held_out, seed, epoch)

    @cached_property
    def _held_out(self) -> Bool[np.ndarray, " units"]:
        shards = self.found.shards
        return held_out_units(-(-shards.num_rows // shards.unit), self.config.held_out_fraction)

    def check_budget(self, steps: int, batch_size: int) -> None:
        """Raise `ConfigError` if there are too few activations for training or held out."""
        wanted, held_out_wanted = steps * batch_size, self.config.held_out_tokens
        train, held_out = len(self.rows(False, 0)), len(self.rows(True, 0))
        batches = batches_available(train, self.config, batch_size)
        enough = batches >= steps or (self.config.repeat and batches > 0)
        name = f"{self.found.label} ({self.found.shards.num_rows:,} in all)"
        if not enough:
            raise ConfigError(
                f"{{key}} (={wanted:,}) must not exceed the training activations of {name}: "
                f"{batches * batch_size:,}. Lower it, add some, or set dataset.repeat=true.",
                "training.tokens",
            )
        if held_out < held_out_wanted:
            raise ConfigError(
                f"{{key}} (={held_out_wanted:,}) must not exceed the held-out activations of "
                f"{name}: {held_out:,}. Lower it, add some, or raise dataset.held_out_fraction.",
                "dataset.held_out_tokens",
            )

    def open(
        self, device: torch.device, needed: int, cache: ActivationCache | None = None
    ) -> StoredSource:
        if stamp(self.found.files) != self.found.stamped:
            raise ReseedError(f"the files of {self.found.label} have changed, or are gone, since "
                              "they were checked: run the command again")  # fmt: skip
        return StoredSource(self, device)


class OrderedRows:
    """The rows of some units, in the order of a seed and an epoch.

    Args:
        chosen: mask of the units.
    """

    def __init__(
        self, shards: Shards, chosen: Bool[np.ndarray, " units"], seed: int, epoch: int
    ) -> None:
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        self.shards, self.epoch = shards, epoch
        self._begins = random.permutation(np.flatnonzero(chosen)) * shards.unit
        self._lengths = np.minimum(shards.unit, shards.num_rows - self._begins)
        self._ends: Int[np.ndarray, " units"] = np.cumsum(self._lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, first: int, last: int) -> Float[Tensor, "rows d_in"]:
        """Return rows ``first`` to ``last`` (exclusive); float64 becomes float32."""
        a, b = np.searchsorted(self._ends, [first, last - 1], side="right")
        begins, lengths = self._begins[a : b + 1].tolist(), self._lengths[a : b + 1].tolist()
        each = [self.shards.read(x, x + n) for x, n in zip(begins, lengths, strict=True)]
        skip = first - int(self._ends[a]) + lengths[0]
        x = torch.cat(each)[skip : skip + last - first]
        return x.float() if x.dtype == torch.float64 else x


class StoredSource(ActivationSource):
    """Opened activations."""

    def __init__(self, data: StoredData, device: torch.device) -> None:
        self.stored, self.device = data, device
        self._held_out = data.rows(True, seed=0)

    def stream(self, hookpoints: Sequence[Hookpoint]) -> StoredStream:
        return StoredStream(self.stored, hookpoints, self.device)

    def held_out(
        self, hookpoints: Sequence[Hookpoint], tokens: int
    ) -> Iterator[dict[Hookpoint, Tensor]]:
        for first in range(0, tokens, _HELD_OUT_BLOCK):
            x = self._held_out.read(first, min(first + _HELD_OUT_BLOCK, tokens))
            yield dict.fromkeys(hookpoints, x.to(self.device))

    @property
    def held_out_available(self) -> int:
        return len(self._held_out)


class StoredStream(EpochStream):
    """Chunks of the training rows, in the order of the order seed."""

    def __init__(
        self, data: StoredData, hookpoints: Sequence[Hookpoint], device: torch.device
    ) -> None:
        super().__init__(data.config, data.config.repeat, hookpoints, device)
        self._data = data
        self._rows = data.rows(False, data.config.order_seed)

    @property
    def num_activations(self) -> int:
        return len(self._rows)

    def _compute_chunk(self, c: int) -> dict[Hookpoint, Tensor]:
        return self._read(c, slice(0, STRIPES))

    def _compute_own_stripes(self, c: int) -> dict[Hookpoint, Tensor]:
        return self._read(c, self.stripes)

    def _read(self, c: int, stripes: slice) -> dict[Hookpoint, Tensor]:
        epoch, first, rows = self.extent(c)
        if epoch != self._rows.epoch:
            self._rows = self._data.rows(False, self.config.order_seed, epoch)
        begin, end = stripes.start * rows, stripes.stop * rows
        x = self._rows.read(first + begin, first + end).to(self.device)
        order = self._permutation(c, rows)[begin:end] - begin
        x = x[order.to(self.device)].view(-1, rows, x.shape[-1])
        return dict.fromkeys(self.hookpoints, x)


def _fingerprint(shards: Shards, origin: list[Any], label: str, cache: Path) -> str:
    """Return the fingerprint; that of large files is remembered, with the check of their values."""
    if sum(x.numel() * x.element_size() for x in shards.tensors) <= _SMALL:
        return shards.fingerprint()
    remembered = cache / "fingerprints" / f"{digest(origin, 32)}.json"
    with suppress(FileNotFoundError, DamagedFileError):
        return read_record(remembered)["sha256"]
    say(f"checking the activations of {label} (once)")
    write_record(remembered, {"sha256": (found := shards.fingerprint()), "finite": True})
    return found
