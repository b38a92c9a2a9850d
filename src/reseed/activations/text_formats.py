"""Local files of documents: their formats, and the check of every row.

    .txt .md       plain text, divided by a separator          each also compressed: .gz, .zst
    .jsonl .csv    a row has the text in one of its fields
    .parquet       likewise, in a column
    a folder of `datasets.save_to_disk`: Arrow files, read without the package `datasets`

A row is read by a rule that is the same in all formats, or refused with its file and line (or row).
A missing value (null) is no document, a byte order mark at the beginning of a file is dropped, and
lone surrogates become U+FFFD.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from reseed.errors import ConfigError, did_you_mean, is_unicode
from reseed.system.console import counted

_MARK = "\ufeff"
"""The byte order mark, which some editors write at the beginning of a file."""
UNDECODABLE = "reseed.undecodable"
codecs.register_error(UNDECODABLE, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]
_LARGEST_WINDOW = 2**31  # of zstd --long=31
_BATCH = 512  # rows of parquet in memory at once, which may be long
INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class RowFormat:
    """The options that say where in a file the documents are.

    Attributes:
        separator: separator of the documents of plain text; None: each file is a document.
        field: key or column of the documents.
        encoding: encoding of plain text, JSON lines and CSV.
        content: the kind of document: ``text``, ``messages`` of a chat, or ``token ids``.
    """

    separator: str | None = None
    field: str = "text"
    encoding: str = "utf-8"
    content: str = "text"


class Row(str):
    """A document that is not text, as JSON, so that it can be hashed like one.

    Attributes:
        where: the file and row, for messages.
    """

    where: str

    def __new__(cls, value: Any, where: str) -> Row:
        made = super().__new__(cls, json.dumps(value))
        made.where = where
        return made


class Conversation(Row):
    """A list of messages: dicts of ``role`` and ``content``."""


class TokenIds(Row):
    """A list of token ids."""


def document_of(value: Any, where: str, rows: RowFormat) -> str | None:
    """Return the document that a row holds, or None if it holds none.

    Args:
        value: the value of the row's field.
        where: the place, for messages.

    Raises:
        ConfigError: the value is not of the kind that ``rows.content`` says.
    """
    if value is None:
        return None
    if rows.content == "text" and isinstance(value, str):
        return clean(value)
    if rows.content == "token ids" and isinstance(value, list | tuple):
        if all(type(token) is int and token >= 0 for token in value):
            return TokenIds(value, where) if value else None
        raise _wrong(where, rows, "must hold token ids, integers from 0; not all of them are")
    if rows.content == "messages" and isinstance(value, list | tuple):
        messages = [_message(item, where, rows) for item in value]
        return Conversation(messages, where) if messages else None
    wanted = "text" if rows.content == "text" else f"a list of {rows.content}"
    raise _wrong(where, rows, f"must hold {wanted}; it holds {_kind(value)}")


def _message(item: Any, where: str, rows: RowFormat) -> dict[str, str]:
    keys = ("role", "content")
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
        rule = "must hold messages, each with text under `role` and `content`; one has not"
        raise _wrong(where, rows, rule)
    return {key: clean(item[key]) for key in keys}


def _wrong(where: str, rows: RowFormat, rule: str) -> ConfigError:
    key = "token_field" if rows.content == "token ids" else "field"
    return ConfigError(f"{{key}}: {where}: `{rows.field}` {rule}", key)


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int | float: "a number", str: "text", bytes: "bytes",
             list | tuple: "a list", dict: "a mapping"}  # fmt: skip
    found = (name for kind, name in kinds.items() if isinstance(value, kind))
    return next(found, f"a {type(value).__name__}")


def clean(text: str) -> str:
    """Return a text with lone surrogates, which no encoding has, replaced by U+FFFD."""
    if text.isascii() or is_unicode(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Formats: each reader yields (value of the field, number of the line or row).

Rows = Iterator[tuple[Any, int]]


def _plain(path: Path, rows: RowFormat) -> Rows:
    """Yield a plain text's documents, line by line so that memory does not grow with the file."""
    if rows.content != "text":
        option = "token_field" if rows.content == "token ids" else "chat"
        raise ConfigError(
            f"{{key}} needs rows with fields (.jsonl, .parquet or a folder of "
            f"datasets.save_to_disk); {path} is plain text",
            option,
        )
    separator, number, text, searched = rows.separator, 1, "", 0
    for line in _lines(path, rows.encoding):
        text += line
        if separator and text.find(separator, searched) >= 0:
            *whole, text = text.split(separator)
            for document in whole:
                yield document.strip("\n"), number
                number += 1
        searched = max(0, len(text) - len(separator or ""))  # a separator may go across lines
    yield text.strip("\n") if separator else text, number


def _jsonl(path: Path, rows: RowFormat) -> Rows:
    for number, line in enumerate(_lines(path, rows.encoding), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise unreadable(path, f"line {number}: its JSON is nested too deeply") from None
        except json.JSONDecodeError as error:
            reason = f"{error.msg.removesuffix(' at')}, column {error.colno}"
            raise unreadable(path, f"line {number} is not JSON: {reason}") from None
        except ValueError:  # of int()
            reason = "it has a number of more digits than Python reads"
            raise unreadable(path, f"line {number}: {reason}") from None
        if not isinstance(row, dict) or rows.field not in row:
            keys = isinstance(row, dict) and f"its keys are {list_names(row)}"
            there = keys or f"it is {_kind(row)}"
            raise ConfigError(
                f"{{key}}: {path}, line {number} has no key `{rows.field}`: {there}",
                _field_key(rows),
            )
        yield row[rows.field], number


def _csv(path: Path, rows: RowFormat) -> Rows:
    csv.field_size_limit(2**31 - 1)
    table = csv.reader(_lines(path, rows.encoding, newline=""), strict=True)
    column, width, begin = None, 0, 1
    while True:
        try:
            row = next(table, None)
        except csv.Error as error:
            raise unreadable(path, f"the row that begins in line {begin}: {error}") from None
        if row is None:
            return
        if row and column is None:
            column, width = _column(row, path, rows), len(row)
        elif row and column is not None:
            if len(row) != width:
                cells = f"it has {counted(len(row), 'cell')}, and the first row has {width}"
                raise unreadable(path, f"the row that begins in line {begin}: {cells}")
            yield row[column], begin
        begin = table.line_num + 1


def _parquet(path: Path, rows: RowFormat) -> Rows:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        _column(table.schema_arrow.names, path, rows)
        yield from _values(table.iter_batches(_BATCH, columns=[rows.field]), path, rows)


def _saved_dataset(path: Path, rows: RowFormat) -> Rows:
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        for file in arrow_files(path):
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                _column(stream.schema.names, path, rows)
                yield from stream

    yield from _values(batches(), path, rows)


def _values(batches: Iterable[Any], path: Path, rows: RowFormat) -> Rows:
    """Yield the values of the column of Arrow batches."""
    number = 1
    for batch in batches:
        column = batch.column(rows.field)
        try:
            values = column.to_pylist()
        except UnicodeDecodeError:
            values = map(partial(_decoded, path, number), range(len(column)), column)
        yield from zip(values, range(number, number + len(column)), strict=True)
        number += len(column)


def _decoded(path: Path, first: int, index: int, item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        raise unreadable(path, f"row {first + index} has bytes that are not UTF-8") from None


def _column(names: Sequence[str], path: Path, rows: RowFormat) -> int:
    """Return the place of the field among the columns."""
    if names.count(rows.field) == 1:
        return names.index(rows.field)
    key = _field_key(rows)
    if rows.field in names:
        raise ConfigError(f"{{key}}: {path} has several columns `{rows.field}`", key)
    raise ConfigError(
        f"{{key}} must be a column of {path.name}: {list_names(names)}; got {rows.field}."
        f"{did_you_mean(rows.field, names)}",
        key,
    )


def _field_key(rows: RowFormat) -> str:
    return "token_field" if rows.content == "token ids" else "field"


def list_names(names: Iterable[str]) -> str:
    """List names in a message."""
    listed = [repr(name)[1:-1][:40] for name in names]
    return ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "") or "nothing"


def unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{{key}}: cannot read {path}: {reason}", "path")


def _lines(path: Path, encoding: str, newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a file, each checked.

    Args:
        newline: None: every line ends with a line feed; "": line ends are those of the file.
    """
    with (
        _opened(path) as raw,
        io.TextIOWrapper(raw, encoding=encoding, errors=UNDECODABLE, newline=newline) as file,
    ):
        for number, line in enumerate(file, 1):
            if not line.isascii():
                if number == 1:
                    line = line.removeprefix(_MARK)
                if not is_unicode(line):
                    raise ConfigError(
                        f"{{key}}: {path}, line {number} has bytes that are not {encoding}: give "
                        "the encoding of the text, or mend the line",
                        "encoding",
                    )
            if "\0" in line:
                reason = f"line {number} has a NUL character: it is no text, or UTF-16 "
                raise unreadable(path, f"{reason}(dataset.encoding=utf-16 or utf-16-le)")
            yield line


def _opened(path: Path) -> Any:
    """Open a file to read its bytes, uncompressed."""
    compression = path.suffix.lower()
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        return io.BufferedReader(_Zstd(path))
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """The uncompressed bytes of a .zst file; zstandard's own reader takes a cut file for whole."""

    def __init__(self, path: Path) -> None:
        self._pieces = self._decompressed(path)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    @staticmethod
    def _decompressed(path: Path) -> Iterator[bytes]:
        frames = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        with path.open("rb") as file:
            frame = None
            while block := file.read(2**17):
                while block:
                    frame = frame or frames.decompressobj()
                    yield frame.decompress(block)
                    block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            if frame is not None:
                raise EOFError("the compressed data end too early")


_READERS: dict[str, Callable[[Path, RowFormat], Rows]] = {
    ".txt": _plain, ".md": _plain, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip
_COMPRESSED = (".gz", ".zst")
FORMATS = f"{', '.join(sorted(_READERS))} (all but .parquet also with {' or '.join(_COMPRESSED)})"


def ending_of(path: Path) -> str:
    """Return the ending that decides the format, in lower case (``.jsonl.gz``), or "" if a file of
    this name is not read."""
    name = path.name.lower()
    compression = next((end for end in _COMPRESSED if name.endswith(end)), "")
    ending = Path(name.removesuffix(compression)).suffix
    readable = ending in _READERS and not (compression and ending == ".parquet")
    return ending + compression if readable else ""


def reader_of(path: Path) -> Callable[[Path, RowFormat], Rows]:
    return _READERS[f".{ending_of(path).split('.')[1]}"] if path.is_file() else _saved_dataset


def file_documents(path: Path, rows: RowFormat) -> Iterator[str]:
    """Yield the documents of a file or a saved data set.

    Raises:
        ConfigError: it cannot be read to its end, or a row does not hold a document. The error's
            key is relative to ``dataset``.
    """
    reader = reader_of(path)
    unit = {"_plain": "document", "_jsonl": "line", "_csv": "line"}.get(reader.__name__, "row")
    try:
        for value, number in reader(path, rows):
            document = document_of(value, f"{path}, {unit} {number}", rows)
            if document is not None:
                yield document
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, zstandard.ZstdError,
            NotImplementedError, KeyError, TypeError) as error:  # fmt: skip
        # The last three are bases of errors of pyarrow.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise unreadable(path, reason) from error


# Data sets of `datasets.save_to_disk`.


def arrow_files(folder: Path) -> list[Path]:
    """Return the files of a saved data set, which its state lists."""
    state = folder / STATE
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        files = [folder / name for name in names]
        if any(Path(name).name != name for name in names) or not all(f.is_file() for f in files):
            raise ValueError("it names a file that is not in its folder")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = f"{STATE} does not list its files ({error})"
        raise unreadable(folder, reason) from None
    return files
