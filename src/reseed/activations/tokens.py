"""Tokenised documents, cached on disk.

A text is tokenised once: its `TokenStore`s are memory-mapped files, cached under a digest of
everything that determines them. They are written into a temporary folder first, so that a text that
is refused in the middle leaves nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reseed.activations.text import ResolvedText, TextConfig
from reseed.activations.text_formats import Conversation, TokenIds, clean
from reseed.activations.token_store import WINDOW, TokenStore, overlap
from reseed.errors import ConfigError, ReseedError, shown
from reseed.system.console import counted, cropped, say
from reseed.system.files import atomic_folder, room_for, temporary_folder, wait_for_writer
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
_SHOWN, _SHOWN_WIDTH = 3, 60
"""Number of documents whose beginnings are shown, and the number of columns of each."""
_DIGITS = 32
_TODAY = "26 Jul 2024"
"""The date that a chat template may write; Llama's template writes this one by default."""


def token_stores(
    text: ResolvedText, tokenizer: Any, tokenizer_fingerprint: str, needed: int, vocabulary: int = 0
) -> tuple[TokenStore, TokenStore]:
    """Tokenise a text's training and held-out documents, or read them from the cache.

    Args:
        text: source of the documents.
        tokenizer: the model's tokenizer.
        tokenizer_fingerprint: identifies the tokenizer.
        needed: number of activations that training needs; limits how much of a streamed text is
            read.
        vocabulary: number of token ids of the model, for documents that are token ids.

    Raises:
        ConfigError: a document cannot be read, rendered or used; nothing is left in the cache.
        ReseedError: the files changed after they were hashed; likewise.
    """
    config = text.config
    key: dict[str, Any] = {
        "version": _VERSION,
        "text": text.fingerprint,
        "options": _text_options(config),
        "tokenizer": tokenizer_fingerprint,
        "held_out": config.held_out_fraction,
    }
    if config.content == "messages":
        key["rendered_by"] = hash_chat_template(tokenizer)
    elif config.content == "token ids":
        key["vocabulary"] = vocabulary
    special = special_ids(tokenizer)
    tokenised = partial(_tokenised, text, tokenizer, vocabulary, special)
    if not config.streamed:
        folder = tokenised(key, {"train": None, "held_out": None})
        stores = _read_store(folder, "train", False), _read_store(folder, "held_out", False)
        return _without_overlap(*stores, text, key) if config.held_out_dedup else stores
    # The held-out documents must not depend on the training budget or order, so they are taken
    # from the beginning of the unshuffled text.
    lost = 1 + 2 / config.context_length  # first positions, and a margin of the same size
    enough = {"train": int(needed * lost) + 2 * config.chunk_tokens}
    own = key | {"order_seed": config.packing_seed}
    train = tokenised(own, enough)
    enough = {"held_out": int(config.held_out_tokens * lost) + config.context_length}
    held_out = tokenised(key, enough)
    return _read_store(train, "train", True), _read_store(held_out, "held_out", True)


def _without_overlap(
    train: TokenStore, held_out: TokenStore, text: ResolvedText, key: Mapping[str, Any]
) -> tuple[TokenStore, TokenStore]:
    """Leave out the held-out documents that share a window with a training document."""

    def fill(folder: Path) -> dict[str, int]:
        with _StoreWriter(folder, "held_out") as writer:
            shared = overlap(train, held_out).documents
            for d in np.flatnonzero(~shared):
                writer.add(held_out.tokens[held_out.starts[d] : held_out.starts[d + 1]], 0)
        if not writer.lengths:
            raise ConfigError(
                "{key}=true leaves no held-out document: each of the "
                f"{held_out.num_documents:,} shares {WINDOW} tokens in a row with a training "
                "document",
                "held_out_dedup",
            )
        return {"left_out": int(shared.sum())}

    own = {**key, "held_out_dedup": True}
    folder = _stored(text, own, held_out.special, ("held_out",), fill)
    return train, _read_store(folder, "held_out", False)


def hash_chat_template(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's chat template.

    Raises:
        ConfigError: it has none.
    """
    try:
        return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()[:_DIGITS]
    except ValueError:
        raise ConfigError(
            "{key}=true needs a chat template, and the model's tokenizer has none: use the model's "
            "instruct variant, or render the messages yourself and give them as text",
            "chat",
        ) from None


def describe(train: TokenStore, held_out: TokenStore, tokenizer: Any) -> list[str]:
    """Return lines for the user to check a text: its size, and the first documents to train on."""
    documents = train.num_documents + held_out.num_documents
    lines = [
        f"{counted(documents, 'document')}, {len(train) + len(held_out):,} tokens; the first begin"
    ]
    for d in range(min(_SHOWN, train.num_documents)):
        begin = int(train.starts[d])
        ids = train.tokens[begin : min(begin + _SHOWN_WIDTH, int(train.starts[d + 1]))].tolist()
        if ids[:1] and ids[0] in train.special:
            ids = ids[1:]
        lines.append(f'  "{cropped(tokenizer.decode(ids), _SHOWN_WIDTH)}"')
    if held_out.left_out is not None:
        left_out = counted(held_out.left_out, "held-out document")
        why = "it repeats" if held_out.left_out == 1 else "they repeat"
        lines.append(f"  {left_out} left out ({why} training text)")
    return lines


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
        record = read_record(folder / "store.json")
        special = tuple(record["special"])
        starts = np.load(folder / f"{part}-starts.npy", allow_pickle=False)
        size = int(starts[-1])
        tokens = np.memmap(path, np.int32, "r", shape=(size,)) if size else np.zeros(0, np.int32)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ReseedError(
            f"{folder}: cannot read the stored tokens ({error}). Delete the folder; the next run "
            "tokenises the text again"
        ) from error
    return TokenStore(tokens, starts, special, natural_order, record.get("left_out"))


def _tokenised(
    text: ResolvedText,
    tokenizer: Any,
    vocabulary: int,
    special: tuple[int, ...],
    key: Mapping[str, Any],
    enough: Mapping[str, int | None],
) -> Path:
    """Return the folder of the parts that ``enough`` names; tokenise the text if there is none.

    Args:
        enough: for each part the number of activations after which it needs no more documents;
            None: all documents.
    """
    fraction = text.config.held_out_fraction

    def fill(folder: Path) -> dict[str, int]:
        say(f"tokenising {text.label} (once)")
        with ExitStack() as stack:
            parts = {part: stack.enter_context(_StoreWriter(folder, part)) for part in enough}
            whole = _written(text.documents(shuffled="train" in enough), tokenizer)
            for documents in _batches(whole, _BATCH):
                held = ("held_out" if is_held_out(d, fraction) else "train" for d in documents)
                wanted = [(d, p) for d, p in zip(documents, held, strict=True) if p in parts]
                ids = _encode(tokenizer, [d for d, _ in wanted], vocabulary) if wanted else []
                for (_, part), tokens in zip(wanted, ids, strict=True):
                    limit = enough[part]
                    if limit is None or parts[part].activations < limit:
                        parts[part].add(tokens, int(np.isin(tokens, special).sum()))
                if all(n is not None and parts[p].activations >= n for p, n in enough.items()):
                    break
        text.check_unchanged()
        return {}

    return _stored(text, {**key, "enough": dict(enough)}, special, tuple(enough), fill)


def _stored(
    text: ResolvedText,
    key: Mapping[str, Any],
    special: tuple[int, ...],
    parts: Sequence[str],
    fill: Callable[[Path], Mapping[str, int]],
) -> Path:
    """Return the folder of a key; if there is none, let ``fill`` write the parts into a temporary
    folder, which takes its place when it is complete.

    Args:
        fill: returns numbers for the record. If another process has called it, this one waits.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = text.cache / "tokens" / name
    if _is_stored(folder, parts):
        return folder
    waiting = partial(say, f"waiting for another process, which tokenises {text.label}")
    wait_for_writer(folder, waiting)
    if _is_stored(folder, parts, quiet=True):  # by another process, meanwhile
        return folder
    with room_for(folder / f"{parts[0]}.int32"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as temporary:
            numbers = fill(temporary)
            names = [name for part in parts for name in _files(part)]
            files = describe_files(temporary, names)
            store = {"key": dict(key), "special": list(special), "files": files, **numbers}
            write_record(temporary / "store.json", store)
            if not _is_stored(folder, parts, quiet=True):  # by one that began at the same time
                names.append("store.json")
                atomic_folder(
                    folder, lambda new: [os.replace(temporary / n, new / n) for n in names]
                )
    _read_store.cache_clear()
    return folder


def _files(part: str) -> tuple[str, str]:
    return f"{part}.int32", f"{part}-starts.npy"


def _is_stored(folder: Path, parts: Sequence[str], quiet: bool = False) -> bool:
    """Return True if the folder holds the parts, and they are as they were written.

    Args:
        quiet: print no message about damaged files.
    """
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
        if not quiet:
            say(str(error))
        return False
    return True


class _StoreWriter:
    """Writer of one part of a store."""

    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = folder, part
        self.lengths: list[int] = []
        self.activations = 0

    def __enter__(self) -> _StoreWriter:
        self.file = (self.folder / f"{self.part}.int32").open("wb")
        return self

    def add(self, ids: np.ndarray, special: int) -> None:
        self.file.write(ids.tobytes())
        self.lengths.append(len(ids))
        self.activations += len(ids) - special

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        with self.file:
            if error is None:
                self.file.flush()  # fails if the disk is full
                os.fsync(self.file.fileno())
        if error is None:
            starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
            np.save(self.folder / f"{self.part}-starts.npy", starts.astype(np.int64))


def _encode(tokenizer: Any, documents: list[str], vocabulary: int = 0) -> list[np.ndarray]:
    """Return token ids; each document starts with BOS, or with EOS if the tokenizer has no BOS.

    Documents that are token ids are returned as they are.

    Args:
        vocabulary: number of ids that documents of token ids may have.
    """
    if documents and isinstance(documents[0], TokenIds):
        return [_ids_of(document, vocabulary) for document in documents]
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    if documents and isinstance(documents[0], _Rendered):
        options["add_special_tokens"] = False  # the template writes them
    opening = tokenizer.bos_token_id
    if opening is None:
        opening = tokenizer.eos_token_id
    encoded = []
    for ids in tokenizer(documents, **options)["input_ids"]:
        if opening is not None and ids[:1] != [opening]:
            ids = [opening, *ids]
        encoded.append(np.asarray(ids, dtype=np.int32))
    return encoded


def _ids_of(document: Any, vocabulary: int) -> np.ndarray:
    ids = json.loads(document)
    if (largest := max(ids)) >= vocabulary:
        raise ConfigError(
            f"{{key}}: {document.where}: the token id {shown(largest)} is not in the vocabulary of "
            f"the model, 0 to {vocabulary - 1}",
            "token_field",
        )
    return np.asarray(ids, dtype=np.int32)


class _Rendered(str):
    """A text that a chat template wrote, with its special tokens."""


def _written(documents: Iterator[str], tokenizer: Any) -> Iterator[str]:
    """Yield documents with messages rendered, as they are tokenised and divided into training and
    held-out documents: two lists of messages can be one text."""
    for document in documents:
        if isinstance(document, Conversation):
            document = _Rendered(_rendered(tokenizer, document))
            if not document.strip():
                continue
        yield document


def _rendered(tokenizer: Any, document: Any) -> str:
    """Return the text that the chat template makes of a document's messages."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:  # the date would change the documents every day
        template = f"{{%- macro strftime_now(format) -%}}{_TODAY}{{%- endmacro -%}}{template}"
    try:
        return clean(
            tokenizer.apply_chat_template(
                json.loads(document), chat_template=template, tokenize=False
            )
        )
    except Exception as error:  # a template can raise anything
        raise ConfigError(
            f"{{key}}: {document.where}: the chat template of the tokenizer refuses the messages: "
            f"{str(error)[:200]!r}",
            "chat",
        ) from error


def _batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(items, size)):
        yield batch
