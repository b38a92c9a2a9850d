"""Faults to inject into a forked child: a kill or a full disk at its n-th write, slow calls."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

POINTS = ("replace", "fsync", "unlink")
"""The calls of `os` behind every write (`reseed.system.files`): rename, sync contents, delete."""


def put(kind: str, **how: Any) -> None:
    """Inject a fault into this process, for the rest of its life."""
    {"kill": _kill, "full": _full, "slow": _slow, "count": _count}[kind](**how)


def _at_write(act: Callable[[int, str, tuple[Any, ...]], None]) -> None:
    """Call ``act`` with its number, name and arguments before every call that writes."""
    number = 0

    def before(name: str) -> None:
        original = getattr(os, name)

        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal number
            # Syncs of folders do not count: they matter only if the machine loses power. Neither do
            # the files that `shutil.rmtree` deletes in temporary folders.
            synced = name != "fsync" or os.path.isfile(f"/proc/self/fd/{arguments[0]}")
            if synced and "dir_fd" not in options:
                number += 1
                act(number, name, arguments)
            return original(*arguments, **options)

        setattr(os, name, called)

    for name in POINTS:
        before(name)


def _kill(at: int) -> None:
    """Kill the process before write number ``at`` (from 1). If it is a sync, the file also loses
    half of its contents, which are not forced to the disk yet."""

    def act(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == at:
            if name == "fsync":
                path = os.readlink(f"/proc/self/fd/{arguments[0]}")
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    _at_write(act)


def _full(at: int, times: int = 1 << 30) -> None:
    """Let the disk be full from the sync of file number ``at`` on, for so many ``times``."""
    contents = 0

    def act(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal contents
        if name == "fsync":  # renaming and deleting need no space
            contents += 1
            if at <= contents < at + times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at_write(act)


def _count(into: str) -> None:
    """Store the number of writes in the file ``into``, at each write."""

    def act(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        with open(into, "w") as file:
            file.write(str(number))

    _at_write(act)


def _slow(where: str, seconds: float, after: int = 0) -> None:
    """Delay, and print, each call of ``module:Class.function`` after the first ``after`` ones. It
    sleeps in short intervals, so a signal interrupts it as it would a computation."""
    from importlib import import_module

    module, _, path = where.partition(":")
    *parents, name = path.split(".")
    owner = import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    def slowed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            print(f"slow: {name}", flush=True)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.02)
        return original(*arguments, **options)

    setattr(owner, name, slowed)
