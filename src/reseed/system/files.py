"""Atomic writes and file locks.

A file that these functions write is complete or absent, even if the process is killed or the disk
is full. The operating system releases a lock when its process dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from reseed.errors import ReseedError

PathLike = str | os.PathLike[str]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = ".part-"
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_DAY_S = 86_400
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""Flags to open a file whose name others can predict: a symbolic link is an error, and a pipe does
not block."""
_LOCK, _EARLIER = ".lock", ".earlier"
_PROBE = b"\0" * 2**20


class DiskFullError(ReseedError):
    """Error for a full disk; files written earlier are complete.

    The run does not count as failed: once there is free space, the same command continues it.
    """


def user_path(path: PathLike) -> Path:
    """Return a path with ``~`` replaced by the user's home folder.

    Raises:
        ReseedError: the home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ReseedError(
            f"the home folder of {path} is unknown: name the folder without ~, or set HOME"
        ) from None


def shorten(name: str, most: int = 180) -> str:
    """Return the beginning of a name, in whole characters, of at most ``most`` bytes.

    File systems allow 255 bytes; a signature and the marks of temporary files need some of them.
    """
    return name.encode()[:most].decode(errors="ignore")


def find_same_files(paths: Iterable[Path]) -> tuple[Path, Path] | None:
    """Return the first two paths that lead to one file, for example through a link."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        about = path.stat()
        other = seen.setdefault((about.st_dev, about.st_ino), path)
        if other is not path:
            return other, path
    return None


def atomic_write(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a temporary file, then rename it to ``path``.

    The content is fsynced before the rename, the folder after it. Missing folders are created.

    Raises:
        DiskFullError: the disk is full. An existing file at ``path`` is unchanged.
    """
    path = Path(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, write)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raise `DiskFullError` in place of an `OSError` about a full disk.

    Args:
        path: the file being written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"no room for {path.name} in {path.parent} ({os.strerror(error.errno)}). Results and "
            "checkpoints that were written earlier are intact. Free some space and run the same "
            "command again; it continues where it stopped."
        ) from error


def remove_leftovers(folder: Path, *, sole_writer: bool = False) -> None:
    """Delete the temporary folders of killed writers.

    A writer locks its temporary folder, and the system releases the locks of a process that dies:
    what can be locked is left over. Because some network file systems do not show the locks of
    other machines, what another machine wrote counts as left over only after a day.

    Args:
        sole_writer: no other process, on any machine, writes into the folder.
    """
    for path in folder.glob(f".*{_TEMPORARY}*"):
        with suppress(OSError):  # it is gone, or cannot be locked or deleted
            about = path.lstat()
            here = sole_writer or f"{_TEMPORARY}{_HOST}" in path.name
            if not here and time.time() - about.st_mtime < _DAY_S:
                continue
            if not stat.S_ISDIR(about.st_mode):  # version 0.1 wrote temporary files
                path.unlink()
            elif (handle := lock_file(path / _LOCK, wait_s=0)) is not None:
                try:
                    _restore(path)
                    shutil.rmtree(path)
                finally:
                    os.close(handle)


_cleaned: set[str] = set()
"""The folders from which this process has removed leftovers, before it first wrote into them."""


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new, private folder with a random name beside ``path``, and delete it at the end.

    What is written into it can be renamed to ``path``. `remove_leftovers` deletes it if the process
    is killed: the next process that writes beside ``path`` does so first.
    """
    if (parent := os.path.abspath(path.parent)) not in _cleaned:
        remove_leftovers(path.parent)
        _cleaned.add(parent)
    while True:
        folder = tempfile.mkdtemp(prefix=f".{path.stem[:40]}{_TEMPORARY}{_HOST}-", dir=path.parent)
        temporary, handle = Path(folder), None
        try:
            handle = lock_file(temporary / _LOCK)
        except FileNotFoundError:
            continue
        except OSError:  # a file system without locks
            break
        assert handle is not None
        if (temporary / _LOCK).exists():
            break
        os.close(handle)  # before it was locked, another process took it for a leftover
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def wait_for_writer(path: Path, waiting: Callable[[], object]) -> None:
    """Call ``waiting`` and wait if another process fills a `temporary_folder` beside ``path``."""
    for folder in path.parent.glob(f".{escape(path.stem[:40])}{_TEMPORARY}*"):
        with suppress(OSError):  # it is gone, or the file system has no locks
            handle = lock_file(folder / _LOCK, wait_s=0)
            if handle is None:
                waiting()
                handle = lock_file(folder / _LOCK)
            os.close(handle)  # type: ignore[arg-type]


def _write(path: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    with temporary_folder(path) as folder:
        # The temporary file has the same name, because some writers choose the format by it.
        temporary = folder / path.name
        try:
            write(temporary)
        except Exception:
            # Writers in C++ and Rust raise their own errors for a full disk.
            _probe(temporary)
            raise
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        # Some writers create private files; results get the usual permissions.
        temporary.chmod(0o666 & ~_umask())
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            raise ReseedError(f"{path} must be a file; it is a folder: remove it") from None
    if sync:
        _sync_folder(path.parent)


def _probe(temporary: Path) -> None:
    """Raise `OSError` if the disk is full: try to extend ``temporary``, which will be deleted."""
    with temporary.open("ab", buffering=0) as file:
        left = len(_PROBE)
        while left:
            left -= file.write(_PROBE[:left])
        os.fsync(file.fileno())


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Write ``data`` so that no reader sees an incomplete file."""
    atomic_write(path, lambda temporary: temporary.write_bytes(data))


def atomic_write_text(path: PathLike, text: str) -> None:
    """Write ``text`` in UTF-8 with `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON with `atomic_write_bytes`; NaN and infinity become null."""
    atomic_write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return ``value`` as indented JSON; NaN and infinity become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json_unsynced(path: PathLike, value: Any) -> None:
    """Write JSON without fsync, for files that are soon rewritten; readers see complete files.

    Errors of the file system are ignored.
    """
    data = (json.dumps(_finite(value)) + "\n").encode()
    with suppress(OSError):
        _write(Path(path), lambda temporary: temporary.write_bytes(data), sync=False)


def atomic_folder(path: PathLike, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` fill a temporary folder next to ``path``, then put it in the place of ``path``.

    A reader sees the earlier folder, briefly none, then the new one; never an incomplete folder.

    Raises:
        DiskFullError: the disk is full. The earlier folder is unchanged.
    """
    path = Path(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as temporary:
            new, earlier = temporary / path.name, temporary / _EARLIER
            new.mkdir()
            fill(new)
            try:
                if os.path.lexists(path):
                    earlier.mkdir()
                    os.replace(path, earlier / path.name)
                os.replace(new, path)
            finally:
                _restore(temporary)
        _sync_folder(path.parent)


def _restore(temporary: Path) -> None:
    """Put the earlier folder back unless a new one is in its place."""
    for earlier in temporary.glob(f"{_EARLIER}/*"):
        if not os.path.lexists(path := temporary.parent / earlier.name):
            os.replace(earlier, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    # Linux reports it in /proc; elsewhere the only way is to set it and restore it.
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(status.split("Umask:")[1].split()[0], 8)
    except (OSError, IndexError, ValueError):
        mask = os.umask(0o022)
        os.umask(mask)
        return mask


def _sync_folder(folder: Path) -> None:
    """Fsync the folder's entries, if the system allows opening a folder."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock_file(path: Path, *, shared: bool = False, wait_s: float | None = None) -> int | None:
    """Lock a file until the handle is closed (`os.close`); create the file if it is missing.

    Args:
        shared: take a shared lock, compatible with other shared locks.
        wait_s: seconds before a second and last attempt (0: none); None waits without limit.

    Returns:
        the handle, or None if another process holds the lock.

    Raises:
        OSError: the file cannot be opened, or it is a symbolic link or not a regular file.
    """
    handle = _open_lock(path)
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        if wait_s is None:
            fcntl.flock(handle, how)
            return handle
        if _taken(handle, how):
            return handle
        time.sleep(wait_s)
        if wait_s and _taken(handle, how):
            return handle
    except BaseException:  # e.g. Ctrl-C while waiting
        os.close(handle)
        raise
    os.close(handle)
    return None


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Lock a file in the context, after waiting for it; its folder is created.

    Raises: see `lock_file`.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = lock_file(path)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def _open_lock(path: Path) -> int:
    try:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _SAFE, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            handle = os.open(path, os.O_RDONLY | _SAFE)  # another user's file, an archive
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _no_lock(path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _no_lock(path)
    return handle


def _no_lock(path: Path) -> OSError:
    reason = "it is a symbolic link or a special file, but a lock must be a regular file: remove it"
    return OSError(errno.ELOOP, reason, str(path))


def sign_lock(handle: int, owner: str) -> None:
    """Write the owner of a lock into its file. The text is only informative; errors are ignored."""
    with suppress(OSError):  # e.g. the disk is full
        if os.fstat(handle).st_nlink == 1:  # a hard link may give the file another purpose
            os.truncate(handle, 0)
            os.write(handle, f"{owner}\n".encode())


def lock_owner(path: Path) -> str:
    """Return the owner that `sign_lock` wrote, or ""."""
    try:
        with open(os.open(path, os.O_RDONLY | _SAFE), encoding="utf-8", errors="replace") as file:
            return file.read(200).strip()
    except OSError:
        return ""


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
