"""Locks on files. The operating system frees that of a process that died."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


def take(path: Path, *, shared: bool = False, wait_s: float | None = None) -> int | None:
    """Lock a file, which is made if it is not there, until the handle is closed (`os.close`).

    Args:
        shared: beside others that share it.
        wait_s: how long it is waited for at the most; None for as long as it takes.

    Returns:
        the handle, or None where another process holds the lock.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        handle = os.open(path, os.O_RDONLY)  # of another user
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
    except BaseException:  # Ctrl-C while it waits
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
