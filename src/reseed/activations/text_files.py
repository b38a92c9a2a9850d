"""Local files of a text: which files a path names, and their fingerprint."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from encodings import aliases
from pathlib import Path

from reseed.activations.text_formats import (
    FORMATS,
    INFO,
    SPLITS,
    STATE,
    UNDECODABLE,
    arrow_files,
    ending_of,
    list_names,
    reader_of,
    unreadable,
)
from reseed.errors import ConfigError, did_you_mean
from reseed.system.console import counted
from reseed.system.files import find_same_files, user_path
from reseed.system.integrity import stamp

_ABOUT = ("README", "LICENSE", "LICENCE")
_FOLDERS = ("saved data set", "folder")
_NAMES = 3
"""Number of files up to which a message names them instead of counting them."""


@dataclass(frozen=True)
class FoundFiles:
    """The files that ``dataset.path`` names.

    Attributes:
        paths: the files, and folders of saved data sets, in the order of reading.
        passed_over: the files and hidden folders of a folder that are not read.
    """

    paths: tuple[Path, ...]
    passed_over: tuple[Path, ...]

    @property
    def label(self) -> str:
        """Short name of the text, for folders and tables."""
        first = Path(os.path.abspath(self.paths[0]))  # `.` and `..` have no name
        if len(self.paths) > 1:
            return first.parent.name or "text"
        if not first.is_dir():
            return Path(first.name[: -len(ending_of(first))]).name
        whole = f"{first.parent.name}-" if (first.parent / SPLITS).is_file() else ""
        return f"{whole}{first.name}"

    @property
    def stamp(self) -> Hashable:
        """Value that changes if the files do."""
        return stamp(file for path in self.paths for file in _content_files(path))

    @property
    def description(self) -> list[str]:
        """Lines that say how many files are read, and which are not."""
        told = [f"read {_counted(self.paths)}"]
        if self.passed_over:
            told.append(f"passed over {_counted(self.passed_over)}")
        return told


def find_files(named: str | Sequence[str]) -> FoundFiles:
    """Find the files that one path or several name, with folders expanded in sorted order.

    Raises:
        ConfigError: a path does not exist, a folder has no text, or a file is named twice.
    """
    paths: list[Path] = []
    passed_over: list[Path] = []
    for name in [named] if isinstance(named, str) else named:
        if not name:
            raise ConfigError(f"{{key}} must name a file or a folder; got {named!r}", "path")
        path = user_path(name)
        if path.is_dir():
            try:
                read, others = _of_folder(path)
            except OSError as error:
                raise unreadable(path, str(error.strerror)) from None
            if not read:
                there = f" (it has {_counted(others)})" if others else ""
                raise ConfigError(
                    f"{{key}}: the folder {path} has no text{there}; the formats are {FORMATS}. "
                    "Names that begin with a dot are passed over, and README and LICENSE in .txt "
                    "or .md",
                    "path",
                )
            paths += read
            passed_over += others
        elif not path.is_file():
            raise ConfigError(f"{{key}} must be an existing file or folder; got {path}", "path")
        elif not ending_of(path):
            raise ConfigError(
                f"{{key}}: cannot read {path.name}; the formats are {FORMATS}", "path"
            )
        else:
            paths.append(path)
    if not paths:
        raise ConfigError("{key} must name at least one file", "path")
    if same := find_same_files(paths):
        raise ConfigError(
            f"{{key}} names a file twice, which would count its documents twice: {same[0]} and "
            f"{same[1]} are the same",
            "path",
        )
    return FoundFiles(tuple(paths), tuple(passed_over))


def hash_texts(paths: Sequence[Path], separator: str | None) -> str:
    """Return the SHA-256 over the contents and formats of files and saved data sets.

    Args:
        separator: separator of the documents of plain text.

    Raises:
        ConfigError: a file cannot be read.
    """
    sha = hashlib.sha256()
    for path in paths:
        sha.update(_format_key(path))
        if "\n" in (separator or "") and reader_of(path).__name__ == "_plain":
            sha.update(b"across lines")  # version 0.1 looked for the separator in each line
        for content in _content_files(path):
            try:
                with content.open("rb") as file:
                    if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
                        sha.update(b"without mark")  # version 0.1 did not drop the mark
                    file.seek(0)
                    sha.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(content, str(error.strerror)) from None
    return sha.hexdigest()


def _format_key(path: Path) -> bytes:
    """Return the name of a file's format for its fingerprint, because the same bytes are other
    documents in another format. The names of uncompressed formats are those of version 0.1."""
    compression = ending_of(path).partition(".")[2].partition(".")[2] if path.is_file() else ""
    return (reader_of(path).__name__ + compression).encode()


def _content_files(path: Path) -> list[Path]:
    """Return the files that hold the documents: the file itself, or those of a saved data set."""
    return [path] if path.is_file() else arrow_files(path)


def _of_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return what is read of a folder, and what is not, each sorted."""
    if split := _saved_split(folder):
        return [split], []
    read: list[Path] = []
    others: list[Path] = []

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        for name in tuple(folders):
            path = Path(place, name)
            if name.startswith(".") or path.is_symlink():
                others.append(path)
            elif split := _saved_split(path):
                read.append(split)
            else:
                continue
            folders.remove(name)
        for path in (Path(place, name) for name in names):
            whether = ending_of(path) and path.is_file() and not _is_about(path.name)
            (read if whether else others).append(path)
    return sorted(read), sorted(others)


def _is_about(name: str) -> bool:
    """Return True if a file is hidden or, by its name, describes the others: ``README.md``,
    ``LICENSE.MIT.txt``, but not ``readmes.txt`` or ``README.jsonl``."""
    parts = name.upper().split(".")
    return not parts[0] or (parts[0] in _ABOUT and parts[-1] in ("TXT", "MD"))


def _saved_split(folder: Path) -> Path | None:
    """Return the folder of the one split of a saved data set; None if the folder is none.

    Raises:
        ConfigError: it has several splits.
    """
    if (folder / INFO).is_file() and (folder / STATE).is_file():
        return folder
    if not (folder / SPLITS).is_file():
        return None
    splits = sorted(path.parent for path in folder.glob(f"*/{STATE}"))
    if len(splits) == 1:
        return splits[0]
    if not splits:
        raise unreadable(folder, "it has no folder of a split")
    raise ConfigError(
        f"{{key}}: {folder} has {len(splits)} splits ({list_names(p.name for p in splits)}): name "
        f"the folder of one, such as {splits[0]}",
        "path",
    )


def _counted(paths: Sequence[Path]) -> str:
    """Describe files: by name if they are few, and otherwise by their endings."""
    if len(paths) <= _NAMES:
        return list_names(path.name or path.absolute().name for path in paths)
    endings = Counter(map(_kind, paths))
    kinds = [
        counted(count, ending) if ending in _FOLDERS else f"{count:,} {ending[:20]}"
        for ending, count in endings.most_common(5)
    ]
    more = len(endings) - len(kinds)
    others = f" and {more:,} other kinds" if more else ""
    return f"{len(paths):,} files ({', '.join(kinds)}{others})"


def _kind(path: Path) -> str:
    """Return the ending of a file, or the kind of a folder."""
    if path.is_dir():
        return _FOLDERS[not (path / STATE).is_file()]
    return ending_of(path) or path.suffix.lower() or path.name


def checked_encoding(encoding: str) -> str:
    """Return the canonical name of an encoding.

    Raises:
        ConfigError: Python has no text encoding of this name.
    """
    if not _decodes(encoding):
        names = {name.replace("_", "-") for name in aliases.aliases.values()}
        raise ConfigError(
            f"{{key}} must be a text encoding of Python, such as utf-8, utf-16 or latin-1; got "
            f"{encoding!r}.{did_you_mean(encoding.lower(), filter(_decodes, names))}",
            "encoding",
        )
    name = codecs.lookup(encoding).name
    return "utf-8" if name == "utf-8-sig" else name  # the byte order mark is dropped in either


def _decodes(encoding: str) -> bool:
    """Return True if files can be read in an encoding, which some codecs of Python cannot."""
    try:
        raw = io.BytesIO("a\n".encode(encoding))
        return io.TextIOWrapper(raw, encoding=encoding, errors=UNDECODABLE).read() == "a\n"
    except (LookupError, ValueError, TypeError):
        return False
