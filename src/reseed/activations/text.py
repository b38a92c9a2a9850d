"""Texts: the documents of a data set, identified by their content."""

from __future__ import annotations

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from reseed.activations.dataset import DatasetConfig
from reseed.activations.docstrings import docstring_documents
from reseed.activations.text_files import checked_encoding, find_files, hash_texts
from reseed.activations.text_formats import (
    RowFormat,
    clean,
    document_of,
    file_documents,
    list_names,
)
from reseed.config import setting
from reseed.errors import ConfigError, ReseedError, did_you_mean

_DIGITS = 32
"""Number of hex characters of a text's fingerprint."""


@dataclass(frozen=True)
class TextConfig(DatasetConfig, ABC):
    """Base configuration of texts: how documents become sequences.

    A kind of text yields its `documents`; it may `resolve` in a way that reads less.
    """

    context_length: int = setting(256, at_least=2)
    """Number of tokens in a sequence."""
    exclude_first_position: bool = True
    """Leave out each sequence's first position, whose activation differs from all others."""
    exclude_special_tokens: bool = True
    repeat: bool = False
    """True: read a text that is shorter than the budget again, in another order; false: fail."""
    held_out_fraction: float = setting(0.05, above=0, below=1)
    """Share of the documents, chosen by their hash, on which no SAE is trained."""
    held_out_dedup: bool = setting(False, neutral=False)
    """Leave out held-out documents of which a window of 13 tokens is in a training document."""
    subset_seed: int | None = setting(None, at_least=0, neutral=None)
    """Seed of the choice of sequences for a budget below one epoch, which then does not depend on
    ``order_seed``; null: the first sequences in the order of ``order_seed`` (`tokens.Packing`)."""

    def validate(self) -> None:
        super().validate()
        if self.streamed and self.held_out_dedup:
            raise ConfigError(
                "{key}=true needs the whole text: the held-out documents must not depend on how "
                "much of a streamed text is read. Set dataset.streaming=false",
                "held_out_dedup",
            )

    def at_first_seeds(self) -> Self:
        first = None if self.subset_seed is None else 0
        return replace(super().at_first_seeds(), subset_seed=first)

    def without_subset(self) -> Self:
        return replace(self, subset_seed=None)

    @property
    def content(self) -> str:
        """Kind of the documents: ``text``, ``messages`` or ``token ids`` (`RowFormat.content`)."""
        return "text"

    @property
    def packing_seed(self) -> int:
        """Seed of the order in which documents are packed into sequences."""
        return self.order_seed if self.subset_seed is None else self.subset_seed

    @property
    def streamed(self) -> bool:
        """True if only the beginning of the text is read, in an already shuffled order."""
        return False

    @abstractmethod
    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        """Yield all documents, in the same order each time.

        Args:
            text: the resolved text: its fingerprint, and a folder for derived data.
            shuffled: for a streamed text, shuffle by the order seed instead of reading in order.
        """

    def resolve(self, cache: Path) -> ResolvedText:
        """Find the text and identify it by its content; by default, by a hash of all documents.

        Raises:
            ConfigError: a file is unreadable, empty or missing, or the hub is unreachable. The
                error's key is relative to ``dataset``.
        """
        found = ResolvedText(self, "", self.name, cache, stamp=self.stamp())
        sha = hashlib.sha256()
        for document in _checked(self.documents(found, shuffled=False), self.name):
            sha.update(hashlib.sha256(document.encode()).digest())
        return replace(found, fingerprint=sha.hexdigest()[:_DIGITS])


@dataclass(frozen=True)
class ResolvedText:
    """A text, found but not tokenised.

    Attributes:
        config: the declared configuration.
        fingerprint: identifies the documents and their natural order.
        label: short name for folders and tables.
        cache: folder for derived data.
        origin: lines that say which files are read, and which are not.
        stamp: `TextConfig.stamp` before the fingerprint was computed; None: unknown.
    """

    config: TextConfig
    fingerprint: str
    label: str
    cache: Path
    origin: tuple[str, ...] = ()
    stamp: Hashable = field(default=None, compare=False)

    def check_unchanged(self) -> None:
        """Raise `ReseedError` if the files are not those that the fingerprint identifies."""
        if self.stamp is not None and self.config.stamp() != self.stamp:
            raise ReseedError(
                f"the files of the text {self.label} changed while they were read: run the command "
                "again when they are complete"
            )

    def documents(self, shuffled: bool = True) -> Iterator[str]:
        """Yield the documents that are not blank.

        Args:
            shuffled: as in `TextConfig.documents`.
        """
        documents = self.config.documents(self, shuffled)
        return (d for d in _checked(documents, self.label) if d.strip())


def _checked(documents: Iterator[str], label: str) -> Iterator[str]:
    """Yield the documents without lone surrogates; raise `ConfigError` for one that is no text."""
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            got = type(document).__name__
            raise ConfigError(
                f"{{key}}: document {number} of the text {label} is not text: {got}", "path"
            )
        yield clean(document)


@dataclass(frozen=True)
class DocstringsConfig(TextConfig, name="docstrings"):
    """The docstrings of the packages that reseed depends on."""

    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        yield from docstring_documents(text.cache)


@dataclass(frozen=True, kw_only=True)
class TextFilesConfig(TextConfig, name="text_files"):
    """Local files, given as file, folder or list (`text_files`)."""

    path: str | tuple[str, ...] = setting(signed=False)
    separator: str | None = "<|endoftext|>"
    """Separator of the documents in a plain text file; null: each file is a document."""
    field: str = "text"
    """Key (jsonl) or column (csv, parquet, saved data set) that holds the text."""
    encoding: str = setting("utf-8", neutral="utf-8")
    """Encoding of plain text, jsonl and csv."""
    chat: bool = setting(False, neutral=False)
    """The field holds messages, which the tokenizer's chat template makes a text of."""
    token_field: str | None = setting(None, neutral=None)
    """Key or column that holds token ids, which are read instead of a text."""

    def validate(self) -> None:
        super().validate()
        object.__setattr__(self, "encoding", checked_encoding(self.encoding))
        if self.chat and self.token_field is not None:
            raise ConfigError(
                f"{{key}} (={self.token_field}) is for documents that are tokens already, "
                "dataset.chat=true for messages: set only one",
                "token_field",
            )

    @property
    def content(self) -> str:
        return "messages" if self.chat else "text" if self.token_field is None else "token ids"

    @property
    def _rows(self) -> RowFormat:
        field = self.field if self.token_field is None else self.token_field
        return RowFormat(self.separator, field, self.encoding, self.content)

    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        for path in find_files(self.path).paths:
            yield from file_documents(path, self._rows)

    def stamp(self) -> Hashable:
        return find_files(self.path).stamp

    def resolve(self, cache: Path) -> ResolvedText:
        found = find_files(self.path)
        stamp, origin = found.stamp, tuple(found.description)
        fingerprint = hash_texts(found.paths, self.separator)[:_DIGITS]
        text = ResolvedText(self, fingerprint, found.label, cache, origin, stamp)
        if next(text.documents(), None) is None:
            where = str(found.paths[0]) if len(found.paths) == 1 else f"{len(found.paths)} files"
            raise ConfigError(f"{{key}}: the text in {where} is empty", "path")
        return text


@dataclass(frozen=True, kw_only=True)
class HubTextConfig(TextConfig, name="hub"):
    """A data set of the Hugging Face hub."""

    repository: str = setting()
    subset: str | None = None
    split: str = "train"
    revision: str = setting("main", signed=False)
    field: str = "text"
    streaming: bool = True
    """Read only as much as the budget needs, shuffled by shards and within a buffer."""
    shuffle_buffer: int = setting(10_000, at_least=1)

    @property
    def streamed(self) -> bool:
        return self.streaming

    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        yield from _hub_documents(self, text.fingerprint, shuffled)

    def resolve(self, cache: Path) -> ResolvedText:
        label = self.repository.rpartition("/")[2].lower()
        return ResolvedText(self, f"{self.repository}@{_dataset_commit(self)}", label, cache)


def _dataset_commit(config: HubTextConfig) -> str:
    from huggingface_hub import HfApi

    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("{key}: hub data sets need the package `datasets`", "repository")
    try:
        sha = HfApi().dataset_info(config.repository, revision=config.revision, timeout=20).sha
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{{key}}: cannot find the data set {config.repository} (revision {config.revision}) "
            f"on the hub: {first}",
            "repository",
        ) from error
    return str(sha)


def _hub_documents(config: HubTextConfig, fingerprint: str, shuffled: bool) -> Iterator[str]:
    """Yield the documents at the pinned commit; streaming can shuffle shards and in a buffer."""
    from datasets import load_dataset

    rows: Any = load_dataset(
        config.repository,
        config.subset,
        split=config.split,
        revision=fingerprint.rpartition("@")[2],
        streaming=config.streaming,
    )
    if config.streaming and shuffled:
        rows = rows.shuffle(seed=config.packing_seed, buffer_size=config.shuffle_buffer)
    for row in rows:
        if config.field not in row:
            raise ConfigError(
                f"{{key}} must be a column of {config.repository}: {list_names(row)}; got "
                f"{config.field}.{did_you_mean(config.field, row)}",
                "field",
            )
        document = document_of(row[config.field], config.repository, RowFormat(field=config.field))
        if document is not None:
            yield document
