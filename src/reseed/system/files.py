"""Atomic writes and file locks.

A file that these functions write is complete or absent, even if the process is killed or the disk
is full. The operating system releases a lock when its process dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reseed.errors import ReseedError

PathLike = str | os.PathLike[str]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = ".part-"
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


def atomic_write(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the same folder, then rename it to ``path``.

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


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed writers. The caller must be the folder's only writer."""
    for path in folder.glob(f".*{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    # The temporary file has the same suffix, because some writers choose the format by it.
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}{_TEMPORARY}", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            write(temporary)
        except Exception:
            # Writers in C++ and Rust raise their own errors for a full disk.
            _probe(temporary)
            raise
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp creates private files; results get the usual permissions.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
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
    text = json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write_bytes(path, text.encode())


def write_json_unsynced(path: PathLike, value: Any) -> None:
    """Write JSON without fsync, for files that are soon rewritten; readers see complete files.

    Errors of the file system are ignored.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}{_TEMPORARY}{os.getpid()}{path.suffix}")
    with suppress(OSError):
        temporary.write_text(json.dumps(_finite(value)) + "\n")
        os.replace(temporary, path)


def atomic_folder(path: PathLike, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` fill a temporary folder next to ``path``, then put it in the place of ``path``.

    A reader sees the earlier folder, briefly none, then the new one; never an incomplete folder.

    Raises:
        DiskFullError: the disk is full. The earlier folder is unchanged.
    """
    path = Path(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}{_TEMPORARY}", dir=path.parent))
        earlier = temporary.with_name(f"{temporary.name}-earlier")
        try:
            fill(temporary)
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                os.replace(path, earlier)
            os.replace(temporary, path)
        finally:
            if earlier.exists() and not path.exists():  # the new folder could not be renamed
                os.replace(earlier, path)
            for left_over in (temporary, earlier):
                shutil.rmtree(left_over, ignore_errors=True)
        _sync_folder(path.parent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    # Linux reports it in /proc; elsewhere the only way is to set it and restore it.
    try:
        return int(Path("/proc/self/status").read_text().split("Umask:")[1].split()[0], 8)
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
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        handle = os.open(path, os.O_RDONLY)  # another user's file
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


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
