"""What is made to break in a forked child: a kill, or a full disk, at the n-th time it writes."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

POINTS = ("replace", "fsync", "unlink")
"""What every write to a disk comes down to (`reseed.atomic`): a name, a content, a name less."""


def put(kind: str, **how: Any) -> None:
    """Break something in this process, for good."""
    {"kill": _kill, "full": _full, "slow": _slow, "count": _count}[kind](**how)


def _at_write(act: Callable[[int, str, tuple[Any, ...]], None]) -> None:
    """Call ``act`` with its number, name and arguments before every call that writes."""
    number = 0

    def before(name: str) -> None:
        original = getattr(os, name)

        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal number
            # A folder is synced too, which decides nothing while the machine runs.
            if name != "fsync" or os.path.isfile(f"/proc/self/fd/{arguments[0]}"):
                number += 1
                act(number, name, arguments)
            return original(*arguments, **options)

        setattr(os, name, called)

    for name in POINTS:
        before(name)


def _kill(at: int) -> None:
    """Before the write number ``at`` (from 1): of a content, which is not yet forced to the disk,
    half is lost."""

    def act(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == at:
            if name == "fsync":
                path = os.readlink(f"/proc/self/fd/{arguments[0]}")
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    _at_write(act)


def _full(at: int, times: int = 1 << 30) -> None:
    """From the content number ``at`` on (for so many ``times``) the disk has no room."""
    contents = 0

    def act(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal contents
        if name == "fsync":  # a name, and a name less, need no room
            contents += 1
            if at <= contents < at + times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at_write(act)


def _count(into: str) -> None:
    """Write down the number of writes, each time."""

    def act(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        with open(into, "w") as file:
            file.write(str(number))

    _at_write(act)


def _slow(where: str, seconds: float, after: int = 0) -> None:
    """Each call of ``module:Class.function`` takes so much longer, and says so, from call number
    ``after`` on; asleep it is interrupted as a computation is, between two of its parts."""
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
