"""Console output of the commands: a terminal display, or plain lines in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Return the process's console."""
    from rich.console import Console

    found = Console(highlight=False)
    # No wrapping in a file: a name broken over two lines can be neither searched nor copied.
    return found if found.is_terminal else Console(highlight=False, width=250)


def counted(number: int, one: str) -> str:
    """Format a count with its noun: ``1 run``, ``2 runs``."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def seconds_since(started: float) -> float:
    """Return the seconds since ``started`` (time.perf_counter), rounded to the millisecond."""
    return round(time.perf_counter() - started, 3)


def throttled_say(every_s: float = 15.0) -> Callable[[str], None]:
    """Return a throttled `say`: at most one line every ``every_s`` seconds, none before that."""
    last = time.monotonic()

    def told(message: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            say(f"    {message}")

    return told


def mute() -> None:
    """Silence `say` in this process, because another process prints the same."""
    console().quiet = True


def say(message: str) -> None:
    """Print a line without interpreting markup, because names may contain brackets."""
    console().print(message, markup=False, soft_wrap=True)
