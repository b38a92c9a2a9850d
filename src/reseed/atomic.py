"""Files that are either whole or absent, whatever kills the process and however full the disk."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reseed.config import ReseedError

PathLike = str | os.PathLike[str]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = ".part-"
_PROBE = b"\0" * 2**20


class DiskFullError(ReseedError):
    """There is no room for a file; what was written before is whole.

    No failure of the run whose file it is: once there is room, the same command goes on.
    """


def atomic_write(path: PathLike, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the same folder, which then takes the name at once.

    The content is forced to the disk before, the name after. Missing folders are made.

    Raises:
        DiskFullError: there is no room. A file of that name is as it was before.
    """
    path = Path(path)
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, write)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Within it an error that says that the disk is full becomes `DiskFullError`.

    Args:
        path: what is being written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"no room for {path.name} in {path.parent} ({os.strerror(error.errno)}). All that was "
            "written before is intact, results and checkpoints: free some space and give the same "
            "command, which goes on from there."
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Delete what writers that were killed left behind. Only who owns the folder may do so."""
    for path in folder.glob(f".*{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    # The suffix is kept, because writers choose a format by it.
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}{_TEMPORARY}", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            write(temporary)
        except Exception:
            # Writers in C++ and Rust have errors of their own for a full disk.
            _probe(temporary)
            raise
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files private to the user; results are shared like any other file.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _probe(temporary: Path) -> None:
    """Raise `OSError` where the file, of which nothing is wanted any more, cannot grow."""
    with temporary.open("ab", buffering=0) as file:
        left = len(_PROBE)
        while left:
            left -= file.write(_PROBE[:left])
        os.fsync(file.fileno())


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Write ``data`` so that no reader ever sees a part of it."""
    atomic_write(path, lambda temporary: temporary.write_bytes(data))


def atomic_write_text(path: PathLike, text: str) -> None:
    """`atomic_write_bytes` of ``text`` in UTF-8."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: PathLike, value: Any) -> None:
    """`atomic_write_bytes` of ``value`` as indented JSON; NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write_bytes(path, text.encode())


def hasty_write_json(path: PathLike, value: Any) -> None:
    """Whole or absent for every reader, but not forced to the disk: for what is soon written anew.

    What cannot be written is left out.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}{_TEMPORARY}{os.getpid()}{path.suffix}")
    with suppress(OSError):
        temporary.write_text(json.dumps(_finite(value)) + "\n")
        os.replace(temporary, path)


def atomic_folder(path: PathLike, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` fill a temporary folder beside it, which then takes the place of ``path``.

    A reader sees the earlier folder, for a moment none, then the new one; never a part of it.

    Raises:
        DiskFullError: there is no room. The earlier folder stands.
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
            if earlier.exists() and not path.exists():  # the new one could not take its place
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
    # Linux tells it without changing it; elsewhere the only way is to set it and set it back.
    try:
        return int(Path("/proc/self/status").read_text().split("Umask:")[1].split()[0], 8)
    except (OSError, IndexError, ValueError):
        mask = os.umask(0o022)
        os.umask(mask)
        return mask


def _sync_folder(folder: Path) -> None:
    """Force the new name itself to the disk, where the system lets a folder be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
