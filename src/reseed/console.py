"""What the commands say while they work: to the terminal, or plain lines where it is none."""

from __future__ import annotations

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


def say(message: str) -> None:
    """Print a line; markup is not interpreted, as names may hold brackets."""
    console().print(message, markup=False, soft_wrap=True)
