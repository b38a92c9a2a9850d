"""Texts: the documents of a data set, identified by their content."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reseed.activations.dataset import DatasetConfig
from reseed.activations.docstrings import docstring_documents
from reseed.config import setting
from reseed.errors import ConfigError, is_unicode
from reseed.system.files import user_path

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
        found = ResolvedText(self, "", self.name, cache)
        sha = hashlib.sha256()
        for document in self.documents(found, shuffled=False):
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
    """

    config: TextConfig
    fingerprint: str
    label: str
    cache: Path

    def documents(self, shuffled: bool = True) -> Iterator[str]:
        """Yield the documents that are not blank.

        Args:
            shuffled: as in `TextConfig.documents`.
        """
        documents = self.config.documents(self, shuffled)
        return (d for d in _checked(documents, f"the text {self.label}") if d.strip())


@dataclass(frozen=True)
class DocstringsConfig(TextConfig, name="docstrings"):
    """The docstrings of the packages that reseed depends on."""

    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        yield from docstring_documents(text.cache)


@dataclass(frozen=True, kw_only=True)
class TextFilesConfig(TextConfig, name="text_files"):
    """Local files of plain text (.txt, .md), .jsonl or .parquet, given as file, folder or list."""

    path: str | tuple[str, ...] = setting(signed=False)
    separator: str | None = "<|endoftext|>"
    """Separator of the documents in a plain text file; null: each file is a document."""
    field: str = "text"
    """Key (jsonl) or column (parquet) that holds the text."""

    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        for path in text_paths(self):
            yield from _file_documents(path, self)

    def resolve(self, cache: Path) -> ResolvedText:
        paths = text_paths(self)
        sha = hashlib.sha256()
        for path in paths:
            _check_readable(path, self)
            # The format is hashed, because the same bytes give other documents in another format.
            sha.update(_READERS[path.suffix].__name__.encode())
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        label = paths[0].stem if len(paths) == 1 else paths[0].parent.name
        return ResolvedText(self, sha.hexdigest()[:_DIGITS], label, cache)


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


def text_paths(config: TextFilesConfig) -> list[Path]:
    """Return the files that ``config.path`` names, with folders expanded in sorted order."""
    named = [config.path] if isinstance(config.path, str) else list(config.path)
    paths: list[Path] = []
    for name in named:
        path = user_path(name)
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.suffix in _READERS and p.is_file()]
            if not found:
                raise ConfigError(
                    f"{{key}}: no {', '.join(sorted(_READERS))} file in the folder {path}", "path"
                )
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise ConfigError(f"{{key}} must be an existing file or folder; got {path}", "path")
    if not paths:
        raise ConfigError("{key} must name at least one file", "path")
    return paths


def _check_readable(path: Path, config: TextFilesConfig) -> None:
    """Raise `ConfigError` if a file has no readable document."""
    if path.suffix not in _READERS:
        raise ConfigError(
            f"{{key}}: cannot read {path.name}; the formats are {', '.join(sorted(_READERS))}",
            "path",
        )
    first = next((d for d in _file_documents(path, config) if d.strip()), None)
    if first is None:
        raise ConfigError(f"{{key}}: the text in {path} is empty", "path")


def _file_documents(path: Path, config: TextFilesConfig) -> Iterator[str]:
    """Yield the documents of a file.

    Raises:
        ConfigError: the file cannot be read to its end, or a document is no text.
    """
    try:
        yield from _checked(_READERS[path.suffix](path, config), str(path))
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # of pyarrow, too
        raise ConfigError(f"{{key}}: cannot read {path}: {error}", "path") from error


def _checked(documents: Iterator[str], where: str) -> Iterator[str]:
    """Yield the documents; raise `ConfigError` for one that is not Unicode text."""
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str) or not is_unicode(document):
            got = "lone surrogates" if isinstance(document, str) else type(document).__name__
            raise ConfigError(f"{{key}}: document {number} of {where} is not text: {got}", "path")
        yield document


def _plain(path: Path, config: TextFilesConfig) -> Iterator[str]:
    """Yield a plain text's documents, line by line so that memory does not grow with the file."""
    separator = config.separator
    with path.open(encoding="utf-8") as file:
        if not separator:
            yield file.read()
            return
        held: list[str] = []
        for line in file:
            while separator in line:
                before, _, line = line.partition(separator)
                yield "".join([*held, before]).strip("\n")
                held = []
            held.append(line)
        yield "".join(held).strip("\n")


def _jsonl(path: Path, config: TextFilesConfig) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _field_of(json.loads(line), config.field, f"{path.name}, line {number}")


def _parquet(path: Path, config: TextFilesConfig) -> Iterator[str]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path)
    if config.field not in table.schema_arrow.names:
        raise ConfigError(
            f"{{key}} must be a column of {path.name}: {', '.join(table.schema_arrow.names)}; "
            f"got {config.field}",
            "field",
        )
    for batch in table.iter_batches(columns=[config.field]):
        yield from ("" if text is None else text for text in batch.column(0).to_pylist())


_READERS = {".txt": _plain, ".md": _plain, ".jsonl": _jsonl, ".parquet": _parquet}


def _field_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ConfigError(f"{{key}}: {where} has no text under `{field}`", "field")
    return row[field]


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
        rows = rows.shuffle(seed=config.order_seed, buffer_size=config.shuffle_buffer)
    for row in rows:
        yield _field_of(row, config.field, config.repository)
