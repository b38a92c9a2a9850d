"""What the commands say while they work: to the terminal, or plain lines where it is none."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """The one console; 100 columns where the output is no terminal."""
    from rich.console import Console

    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=100)


def say(message: str) -> None:
    """Print a line; markup is not interpreted, as names may hold brackets."""
    console().print(message, markup=False)
