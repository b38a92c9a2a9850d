"""The on-disk activation cache: its layout, its locks and its eviction.

    FOLDER/
        .lock                          held briefly by a process that adds or removes entries
        <readable>-<digest>/           an entry: the chunks of one hookpoint, text, order and model
            entry.json                 everything that decides its activations; mtime = last use
            .use                       locked (shared) by every process that uses the entry
            .writer                    locked by the one process that writes chunks
            000003-<digest>.safetensors    a chunk and its checksum (`chunk_cache`)

Each file is either complete or absent. When the budget is reached, chunks are evicted from the
least recently used entry that no live process uses, the last chunk first: runs read an entry from
its first chunk on, so the remaining chunks stay useful. If this does not free enough space, the new
chunk is not stored.
(Dropping the run's own oldest chunk instead would drop each chunk shortly before its next use.)

Imports only the standard library, so that `reseed cache` starts quickly.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from reseed.config import digest
from reseed.system.console import say
from reseed.system.files import atomic_write_json, lock_file, shorten

DIGITS = 24
_ENTRY = re.compile(rf"-[0-9a-f]{{{DIGITS}}}$")
_CHUNK = re.compile(r"^(\d{6,})-[0-9a-f]{16}\.safetensors$")
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class EntryInfo:
    """The state of one entry, read from its folder.

    Attributes:
        chunks: size in bytes of each chunk by file name, in the order of chunk numbers.
        unfinished: size in bytes of the temporary files, including those of processes that died.
        last_used: seconds since 1970.
    """

    path: Path
    chunks: Mapping[str, int]
    unfinished: int
    last_used: float

    @property
    def size(self) -> int:
        """Size of all chunks in bytes, finished or not."""
        return sum(self.chunks.values()) + self.unfinished

    @property
    def in_use(self) -> bool:
        """True if a live process uses the entry."""
        handle = lock_file(self.path / ".use", wait_s=0)
        if handle is None:
            return True
        os.close(handle)
        return False


class ActivationCache:
    """The cache folder. An I/O error is reported once; the run continues without the cache.

    Args:
        folder: created with the first entry.
        budget: maximum size in bytes. Chunks that live processes use are never evicted.
    """

    def __init__(self, folder: Path | str, budget: int) -> None:
        self.folder, self.budget = Path(folder), budget
        self._printed: set[str] = set()
        self._collected = False

    def entry(self, key: Mapping[str, Any], readable: str) -> CacheEntry | None:
        """Return the entry of ``key``, marked as in use until the object is garbage-collected.

        Args:
            key: plain values that together determine the activations.
            readable: prefix of the folder's name.

        Returns:
            None if the folder cannot be used.
        """
        name = re.sub(r"[^\w.+-]+", "_", readable)
        path = self.folder / f"{shorten(name, 150)}-{digest(dict(key), DIGITS)}"
        use = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                path.mkdir(exist_ok=True)
                use = lock_file(path / ".use", shared=True)
                if (path / "entry.json").is_file():
                    os.utime(path / "entry.json")
                else:
                    atomic_write_json(path / "entry.json", dict(key))
                self._make_room(0)
        except OSError as error:
            self.warn_once(f"the activation cache {self.folder} cannot be used: {_reason(error)}")
            if use is not None:
                os.close(use)
            return None
        assert use is not None
        return CacheEntry(self, path, use)

    def stored(self) -> list[EntryInfo]:
        """Return all entries, from the most to the least recently used."""
        try:
            folders = [p for p in self.folder.iterdir() if _is_entry(p)]
        except OSError:
            return []
        found = [entry for folder in sorted(folders) if (entry := _stored(folder)) is not None]
        return sorted(found, key=lambda entry: -entry.last_used)

    def foreign(self) -> list[str]:
        """Return the names of what is in the folder although no cache writes it, sorted."""
        if not self.folder.is_dir():
            return []
        found = [p.name for p in self.folder.iterdir() if not _is_entry(p)]
        return sorted(set(found) - {".lock", ".DS_Store"})

    def clear(self, pattern: str = "*") -> tuple[list[EntryInfo], list[EntryInfo]]:
        """Remove the entries whose name contains ``pattern``, which may hold wildcards.

        Returns:
            the removed entries, and those left because a live process uses them.
        """
        removed, kept = [], []
        if not self.folder.is_dir():
            return [], []
        with self._locked():
            for entry in self.stored():
                if fnmatchcase(entry.path.name, f"*{pattern}*"):
                    gone = _if_idle(entry, lambda entry: shutil.rmtree(entry.path))
                    (removed if gone else kept).append(entry)
        return removed, kept

    def warn_once(self, message: str) -> None:
        """Print a message the first time it occurs, not once per chunk."""
        if message not in self._printed:
            self._printed.add(message)
            say(message)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock in the context; wait for it, as each process holds it briefly."""
        handle = lock_file(self.folder / ".lock")
        try:
            yield
        finally:
            os.close(handle)  # type: ignore[arg-type]

    def _make_room(self, size: int) -> bool:
        """Evict chunks until ``size`` more bytes fit. The caller holds `_locked`.

        Returns:
            True if there is room now.
        """
        stored = self.stored()
        over = sum(entry.size for entry in stored) + size - self.budget

        def shorten(entry: EntryInfo) -> None:
            nonlocal over
            for file in entry.path.glob(f"{_UNFINISHED}*"):  # left by a process that died
                over -= file.stat().st_size
                file.unlink()
            for name, taken in reversed(list(entry.chunks.items())):
                if over <= 0:
                    return
                (entry.path / name).unlink()
                over -= taken
            shutil.rmtree(entry.path)

        for entry in reversed(stored):
            if over <= 0:
                break
            with suppress(OSError):  # another user's entry may not be removable
                _if_idle(entry, shorten)
        return over <= 0


class CacheEntry:
    """An entry in use by this process.

    Args:
        use: handle of the shared lock, closed when this object is garbage-collected.
    """

    def __init__(self, cache: ActivationCache, path: Path, use: int) -> None:
        self.cache, self.path = cache, path
        self._writer: int | None = None
        self._unwritable = False
        weakref.finalize(self, os.close, use)

    def file(self, c: int, address: str) -> Path:
        """Return the path of chunk ``c``, whether or not it exists.

        Args:
            address: digest of everything that determines the chunk.
        """
        return self.path / f"{c:06d}-{address[:16]}.safetensors"

    def write(self, path: Path, size: int, write: Callable[[Path], object]) -> bool:
        """Call ``write`` on a temporary file of about ``size`` bytes, then rename it to ``path``.

        Returns:
            False if another process writes this entry, if the file exceeds the budget, or if the
            disk is full.
        """
        if self._unwritable or not self._writes():
            return False
        temporary = None
        try:
            temporary = self._reserved(size)
            if temporary is None:
                gib = self.cache.budget / 2**30
                self.cache.warn_once(
                    f"the activation cache {self.cache.folder} is full "
                    f"(runtime.activation_cache_gib={gib:g}): further chunks are not stored"
                )
                return False
            write(temporary)
            os.replace(temporary, path)
            return True
        except OSError as error:
            self._give_up(error)
            return False
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self._unwritable = True
        self.cache.warn_once(
            f"cannot write to the activation cache {self.cache.folder} ({_reason(error)}): further "
            "chunks are not stored"
        )

    def discard(self, path: Path) -> None:
        """Remove a damaged file, if this process is the writer of the entry."""
        if self._writes():
            with suppress(OSError):
                path.unlink()

    def _writes(self) -> bool:
        """Become the entry's writer, unless another process is, for as long as this object lives.

        Returns:
            True if this process is the writer.
        """
        if self._writer is None:
            try:
                handle = lock_file(self.path / ".writer", wait_s=0)
            except OSError as error:
                self._give_up(error)
                return False
            if handle is None:
                return False
            self._writer = handle
            weakref.finalize(self, os.close, handle)
            for file in self.path.glob(f"{_UNFINISHED}*"):  # left by a process that died
                file.unlink(missing_ok=True)
        return True

    def _reserved(self, size: int) -> Path | None:
        """Return a new sparse temporary file of ``size`` bytes, or None if the budget is full."""
        with self.cache._locked():
            there = self.cache._make_room(size)
            if not there and not self.cache._collected:
                # Because of reference cycles, entries that are no longer used may still be locked.
                self.cache._collected = True
                gc.collect()
                there = self.cache._make_room(size)
            if not there:
                return None
            path = self.path / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}"
            path.touch(exist_ok=False)
            try:
                os.truncate(path, size)
            except OSError:
                path.unlink()
                raise
            return path


def _reason(error: OSError) -> str:
    refused = error.errno == errno.ELOOP  # by `lock_file`, which says what to do with the file
    return f"{error.filename}: {error.strerror}" if refused else str(error.strerror)


def _if_idle(entry: EntryInfo, act: Callable[[EntryInfo], object]) -> bool:
    """Call ``act`` on an entry if no live process uses it; return True if it was called."""
    handle = lock_file(entry.path / ".use", wait_s=0)
    if handle is None:
        return False
    try:
        act(entry)
    finally:
        os.close(handle)
    return True


def _is_entry(path: Path) -> bool:
    """Return True for a folder with the name of an entry; a link to one would lead out of the
    cache."""
    return bool(_ENTRY.search(path.name)) and path.is_dir() and not path.is_symlink()


def _stored(folder: Path) -> EntryInfo | None:
    """Read an entry's folder; return None if the folder was removed or is not an entry."""
    chunks: dict[str, int] = {}
    unfinished = 0
    try:
        last_used = (folder / "entry.json").stat().st_mtime
        for file in os.scandir(folder):
            with suppress(FileNotFoundError):  # the writer may have renamed it meanwhile
                if _CHUNK.match(file.name):
                    chunks[file.name] = file.stat().st_size
                elif file.name.startswith(_UNFINISHED):
                    unfinished += file.stat().st_size
    except OSError:
        return None
    ordered = sorted(chunks, key=lambda name: (int(name.partition("-")[0]), name))
    return EntryInfo(folder, {name: chunks[name] for name in ordered}, unfinished, last_used)
