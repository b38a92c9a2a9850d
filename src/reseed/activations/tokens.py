"""Tokenised documents, packed into sequences.

`TokenStore` holds the tokens of all documents end to end, in a memory-mapped file, with the
documents' boundaries. The order of an epoch is a permutation of the documents: sequence s of epoch
e is positions [s·L, (s+1)·L) of the documents, end to end in that order. A text is tokenised once:
stores are cached under a digest of everything that determines them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from reseed.activations.text import ResolvedText, TextConfig
from reseed.errors import ReseedError
from reseed.system.console import say
from reseed.system.files import atomic_write, room_for, temporary_folder
from reseed.system.integrity import (
    DamagedFileError,
    check_files,
    describe_files,
    read_record,
    write_record,
)

_VERSION = 1
"""Increase it if a change of the code changes the tokens of a text."""
_BATCH = 512


@dataclass(frozen=True, eq=False)  # comparison by identity keeps a store hashable
class TokenStore:
    """The tokens of documents, end to end.

    Attributes:
        tokens: int32 [total].
        starts: int64 [documents + 1], the start of each document, then the end of the last.
        special: sorted ids of the special tokens.
        natural_order: True if epoch 0 reads the documents in stored order (already shuffled).
    """

    tokens: Int[np.ndarray, " total"]
    starts: Int[np.ndarray, " documents_plus_one"]
    special: tuple[int, ...]
    natural_order: bool = False

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    def __len__(self) -> int:
        return int(self.starts[-1])


@dataclass(frozen=True)
class Packing:
    """One order of the documents of a store, cut into sequences of equal length.

    Args:
        store: the tokens.
        config: context length, excluded positions, seed of the order.
        epoch: number of earlier passes over the text; each epoch has its own order.
    """

    store: TokenStore
    config: TextConfig
    epoch: int = 0

    def __post_init__(self) -> None:
        order = self._order()
        lengths = np.diff(self.store.starts)[order]
        object.__setattr__(self, "_documents", order)
        object.__setattr__(self, "_ends", np.cumsum(lengths))
        kept = np.empty(self.num_sequences + 1, dtype=np.int64)
        kept[0] = 0
        step = max(1, 500_000 // self.config.context_length)
        for first in range(0, self.num_sequences, step):
            last = min(first + step, self.num_sequences)
            kept[first + 1 : last + 1] = self.keep(self.sequences(first, last)).sum(1)
        object.__setattr__(self, "_kept", np.cumsum(kept))

    @property
    def num_sequences(self) -> int:
        """Number of whole sequences; leftover tokens at the end are not used."""
        return len(self.store) // self.config.context_length

    @property
    def num_activations(self) -> int:
        """Number of positions that count as activations (`keep`)."""
        return int(self._kept[-1])  # type: ignore[attr-defined]

    def sequences(self, first: int, last: int) -> Int[np.ndarray, "sequences context"]:
        """Return the tokens of sequences ``first`` to ``last`` (exclusive)."""
        length = self.config.context_length
        positions = np.arange(first * length, last * length)
        ends = self._ends  # type: ignore[attr-defined]
        rank = np.searchsorted(ends, positions, side="right")
        order = self._documents  # type: ignore[attr-defined]
        begins = self.store.starts[:-1][order[rank]]
        lengths = self.store.starts[1:][order[rank]] - begins
        inside = positions - (ends[rank] - lengths)
        return self.store.tokens[begins + inside].reshape(last - first, length)

    def keep(self, tokens: Int[np.ndarray, "sequences context"]) -> Bool[np.ndarray, "s c"]:
        """Return a mask of the positions that count as activations.

        By default these are neither first in their sequence nor special tokens.
        """
        kept = np.ones(tokens.shape, dtype=bool)
        if self.config.exclude_first_position:
            kept[:, 0] = False
        if self.config.exclude_special_tokens:
            kept &= ~np.isin(tokens, self.store.special)
        return kept

    @property
    def guaranteed_activations(self) -> int:
        """Lower bound of the number of activations of an epoch, valid for every order."""
        if not self.config.exclude_special_tokens:
            return self.num_activations
        special = int(np.isin(self.store.tokens, self.store.special).sum())
        left_over = len(self.store) % self.config.context_length
        lost = self.num_sequences * self.config.exclude_first_position
        return max(0, len(self.store) - left_over - special - lost)

    def covering(self, first: int, last: int) -> tuple[int, int, int]:
        """Find the sequences that hold activations ``first`` to ``last`` (exclusive), in order.

        Returns:
            the first and the last (exclusive) sequence, and the number of activations of the
            first sequence that come before ``first``.
        """
        kept = self._kept  # type: ignore[attr-defined]
        begin = int(np.searchsorted(kept, first, side="right")) - 1
        end = int(np.searchsorted(kept, last, side="left"))
        return begin, end, first - int(kept[begin])

    def _order(self) -> Int[np.ndarray, " documents"]:
        if self.store.natural_order and self.epoch == 0:
            return np.arange(self.store.num_documents)
        seed = np.random.SeedSequence([self.config.order_seed, self.epoch])
        return np.random.Generator(np.random.PCG64(seed)).permutation(self.store.num_documents)


def token_stores(
    text: ResolvedText, tokenizer: Any, tokenizer_fingerprint: str, needed: int
) -> tuple[TokenStore, TokenStore]:
    """Tokenise a text's training and held-out documents, or read them from the cache.

    Args:
        text: source of the documents.
        tokenizer: the model's tokenizer.
        tokenizer_fingerprint: identifies the tokenizer.
        needed: number of activations that training needs; limits how much of a streamed text is
            read.
    """
    config = text.config
    key: dict[str, Any] = {
        "version": _VERSION,
        "text": text.fingerprint,
        "options": _text_options(config),
        "tokenizer": tokenizer_fingerprint,
        "held_out": config.held_out_fraction,
    }
    if not text.config.streamed:
        folder = _tokenised(text, tokenizer, key, {"train": None, "held_out": None})
        return _read_store(folder, "train", False), _read_store(folder, "held_out", False)
    # The held-out documents must not depend on the training budget or order, so they are taken
    # from the beginning of the unshuffled text.
    lost = 1 + 2 / config.context_length  # first positions, and a margin of the same size
    enough = {"train": int(needed * lost) + 2 * config.chunk_tokens}
    train = _tokenised(text, tokenizer, key | {"order_seed": config.order_seed}, enough)
    enough = {"held_out": int(config.held_out_tokens * lost) + config.context_length}
    held_out = _tokenised(text, tokenizer, key, enough)
    return _read_store(train, "train", True), _read_store(held_out, "held_out", True)


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of special tokens, such as beginning of text, end of text or padding."""
    return tuple(sorted(set(tokenizer.all_special_ids)))


def is_held_out(document: str, fraction: float) -> bool:
    """Return True if a document's hash makes it held-out, whatever the order and the budget."""
    value = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")
    return value < fraction * 2**64


def _text_options(config: TextConfig) -> dict[str, Any]:
    """Return the options that, with the fingerprint, determine the documents: those of the kind."""
    common = {field.name for field in fields(TextConfig)}
    own = {name: value for name, value in config.signed().items() if name not in common}
    if type(config).__module__ == TextConfig.__module__:
        # The keys of these kinds are those of version 0.1, so that its caches stay valid.
        own = {name: value for name, value in own.items() if name not in ("type", "repository")}
    return own


@lru_cache(maxsize=8)
def _read_store(folder: Path, part: str, natural_order: bool) -> TokenStore:
    path = folder / f"{part}.int32"
    try:
        special = tuple(read_record(folder / "store.json")["special"])
        starts = np.load(folder / f"{part}-starts.npy", allow_pickle=False)
        size = int(starts[-1])
        tokens = np.memmap(path, np.int32, "r", shape=(size,)) if size else np.zeros(0, np.int32)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ReseedError(
            f"{folder}: cannot read the stored tokens ({error}). Delete the folder; the next run "
            "tokenises the text again"
        ) from error
    return TokenStore(tokens, starts, special, natural_order)


def _tokenised(
    text: ResolvedText, tokenizer: Any, key: dict[str, Any], enough: Mapping[str, int | None]
) -> Path:
    """Return the folder of the parts that ``enough`` names; tokenise the text if there is none.

    Args:
        enough: for each part the number of activations after which it needs no more documents;
            None: all documents.
    """
    key = key | {"enough": dict(enough)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = text.cache / "tokens" / name
    if _is_stored(folder, tuple(enough)):
        return folder
    say(f"tokenising {text.label} (once)")
    with room_for(folder / "store.json"):
        folder.mkdir(parents=True, exist_ok=True)
    special, fraction = special_ids(tokenizer), text.config.held_out_fraction
    with ExitStack() as stack:
        parts = {part: stack.enter_context(_StoreWriter(folder, part)) for part in enough}
        for documents in _batches(text.documents(shuffled="train" in enough), _BATCH):
            chosen = [(d, "held_out" if is_held_out(d, fraction) else "train") for d in documents]
            wanted = [(d, part) for d, part in chosen if part in parts]
            ids = _encode(tokenizer, [d for d, _ in wanted]) if wanted else []
            for (_, part), tokens in zip(wanted, ids, strict=True):
                limit = enough[part]
                if limit is None or parts[part].activations < limit:
                    parts[part].add(tokens, int(np.isin(tokens, special).sum()))
            if all(n is not None and parts[p].activations >= n for p, n in enough.items()):
                break
    _read_store.cache_clear()
    files = describe_files(folder, (name for part in enough for name in _files(part)))
    store = {"key": key, "special": list(special), "files": files}
    write_record(folder / "store.json", store)
    return folder


def _files(part: str) -> tuple[str, str]:
    return f"{part}.int32", f"{part}-starts.npy"


def _is_stored(folder: Path, parts: Sequence[str]) -> bool:
    """Return True if the folder holds the parts, and they are as they were written."""
    try:
        record = read_record(folder / "store.json")
        names = [name for part in parts for name in _files(part)]
        if "files" not in record:  # of version 0.1: hashed now, as it is
            record["files"] = describe_files(folder, names)
            with suppress(OSError):  # a cache that only others may write
                write_record(folder / "store.json", record)
        if lacking := [name for name in names if name not in record["files"]]:
            raise DamagedFileError(folder / lacking[0], "it is missing")
        check_files(folder, record["files"])
    except FileNotFoundError:
        return False
    except DamagedFileError as error:
        say(str(error))
        return False
    return True


class _StoreWriter:
    """Writer of one store; renames its temporary file after everything is written."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = folder, part
        self.lengths: list[int] = []
        self.activations = 0

    def __enter__(self) -> _StoreWriter:
        path = self.folder / f"{self.part}.int32"
        with room_for(path), ExitStack() as stack:
            self.temporary = stack.enter_context(temporary_folder(path)) / path.name
            self.file = self.temporary.open("wb")
            self.cleanup = stack.pop_all()
        return self

    def add(self, ids: np.ndarray, special: int) -> None:
        with room_for(self.folder / f"{self.part}.int32"):
            self.file.write(ids.tobytes())
        self.lengths.append(len(ids))
        self.activations += len(ids) - special

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        path = self.folder / f"{self.part}.int32"
        try:
            with room_for(path):
                self.file.close()  # flushes, which fails if the disk is full
                if error is None:
                    with self.temporary.open("rb") as file:
                        os.fsync(file.fileno())
                    os.replace(self.temporary, path)
        finally:
            self.cleanup.close()
        if error is not None:
            return
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        atomic_write(self.folder / f"{self.part}-starts.npy", lambda path: np.save(path, starts))


def _encode(tokenizer: Any, documents: list[str]) -> list[np.ndarray]:
    """Return token ids; each document starts with BOS, or with EOS if the tokenizer has no BOS."""
    opening = tokenizer.bos_token_id
    if opening is None:
        opening = tokenizer.eos_token_id
    encoded = []
    for ids in tokenizer(documents, return_attention_mask=False, verbose=False)["input_ids"]:
        if opening is not None and ids[:1] != [opening]:
            ids = [opening, *ids]
        encoded.append(np.asarray(ids, dtype=np.int32))
    return encoded


def _batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(items, size)):
        yield batch
