"""What the commands say while they work: to the terminal, or plain lines where it is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """The one console."""
    from rich.console import Console

    found = Console(highlight=False)
    # Nothing is folded in a file: names that were cut in two can be neither searched nor copied.
    return found if found.is_terminal else Console(highlight=False, width=250)


def counted(number: int, one: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def seconds_since(started: float) -> float:
    """Wall clock since ``started`` (time.perf_counter), rounded to the millisecond."""
    return round(time.perf_counter() - started, 3)


def now_and_then(every_s: float = 15.0) -> Callable[[str], None]:
    """A `say` for those who report all the time: a line every ``every_s`` seconds, none before."""
    last = time.monotonic()

    def told(message: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            say(f"    {message}")

    return told


def mute() -> None:
    """From here on `say` says nothing: another process says the same."""
    console().quiet = True


def say(message: str) -> None:
    """Print a line; markup is not interpreted, as names may hold brackets."""
    console().print(message, markup=False, soft_wrap=True)
