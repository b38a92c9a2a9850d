"""File locks; the operating system releases them when their process dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


def take(path: Path, *, shared: bool = False, wait_s: float | None = None) -> int | None:
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
