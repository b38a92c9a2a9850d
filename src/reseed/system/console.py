"""Console output of the commands: a terminal display, or plain lines in a file."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

STREAMS = ("stdin", "stdout", "stderr")
COLUMNS = 80
"""Number of columns of a terminal that is not enlarged."""


def open_streams() -> None:
    """Make stdout and stderr streams whose errors end no command.

    If the reader of a pipe or terminal has gone, output is dropped (`Stream`). Characters that the
    encoding lacks are replaced. A closed stream is opened on /dev/null, because the next file to be
    opened would get its number and the output of libraries.
    """
    for number, name in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # opens the lowest free number
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if number == 0 or stream is not original:
            continue  # replaced already, by this function or by a test or a notebook
        encoding, lines, through = "utf-8", False, False
        if stream is not None:
            stream.flush()
            encoding, lines = stream.encoding, stream.line_buffering
            through = stream.write_through
        raw = Stream(number, "w", closefd=False)
        buffer: Any = raw if through else io.BufferedWriter(raw)
        made = io.TextIOWrapper(
            buffer,
            encoding=encoding,
            errors="replace",
            line_buffering=lines,
            write_through=through,
        )
        setattr(sys, name, made)


class Stream(io.FileIO):
    """A file that drops what is written after its reader has gone.

    Another error, such as a full disk, is raised once.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno in (errno.EPIPE, errno.EIO):  # EIO: the terminal was closed
                return len(data)
            raise OSError(error.errno, error.strerror, STREAMS[self.fileno()]) from None


@cache
def console() -> Any:
    """Return the process's `rich.console.Console`."""
    from rich.console import Console  # slow to import; `reseed --help` does not need it

    found = Console(highlight=False)
    # No wrapping in a file: a name broken over two lines can be neither searched nor copied.
    return found if found.is_terminal else Console(highlight=False, width=250)


def format_duration(seconds: float) -> str:
    """Format a duration: ``40 s``, ``12 min``, ``3.1 h``, ``5.0 days``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3_600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


def counted(number: int, one: str) -> str:
    """Format a count with its noun: ``1 run``, ``2 runs``."""
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def cropped(text: str, columns: int) -> str:
    """Return the beginning of a text in one line, with control characters escaped."""
    from rich.cells import cell_len, set_cell_size

    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text[: columns + 1]
    )
    return shown if cell_len(shown) <= columns else set_cell_size(shown, columns - 1) + "…"


def seconds_since(started: float) -> float:
    """Return the seconds since ``started`` (time.perf_counter), rounded to the millisecond."""
    return round(time.perf_counter() - started, 3)


def throttled_say(every_s: float = 15.0) -> Callable[[str], None]:
    """Return a throttled `say`, which prints at most one line every ``every_s`` seconds, and the
    first one after that time."""
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
    """Print a line, or give it to the function that `messages_to` chose."""
    listener = _listener.get()
    if listener is not None:
        listener(message)
    elif console().is_jupyter:  # rich would show each line as a block of its own
        print(message)
    else:  # names may contain brackets, which are no markup
        console().print(message, markup=False, soft_wrap=True)


def has_terminal() -> bool:
    """Return True if lines are printed on a terminal, where a progress bar can be shown."""
    return _listener.get() is None and console().is_terminal


_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def messages_to(listener: Callable[[str], None] | None) -> Iterator[None]:
    """Give the lines of `say` to a function instead of printing them; None changes nothing.

    An error of the function must not fail the work that prints: the lines that follow are printed,
    and the error is raised at the end.
    """
    errors: list[Exception] = []

    def told(message: str) -> None:
        if not errors:
            try:
                listener(message)  # type: ignore[misc]
                return
            except Exception as error:
                errors.append(error)
        print(message)

    token = _listener.set(_listener.get() if listener is None else told)
    try:
        yield
    finally:
        _listener.reset(token)
    if errors:
        raise errors[0]


def print_rows(
    rows: Sequence[tuple[str, ...]], title: str, columns: Sequence[str], words: Collection[str]
) -> None:
    """Print a table or, in a window that is too narrow for it, two lines per row: the name, and the
    values below it.

    Args:
        columns: headings of the name, of a text that needs no heading, and of the other values.
        words: the columns that hold text, not numbers; they are left-aligned.
    """
    from rich.cells import cell_len, set_cell_size

    table = [tuple(columns), *rows]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    say(title)
    # Written without rich's tables, which take seconds for thousands of rows.
    if sum(widths) + 2 * (len(widths) - 1) <= console().width:
        cells = [
            [
                set_cell_size(word, width) if name in words else word.rjust(width)
                for name, word, width in zip(columns, row, widths, strict=True)
            ]
            for row in table
        ]
        say("\n".join("  ".join(row).rstrip() for row in cells))
        return
    for row in rows:
        told = [row[1]] + [f"{name} {word}" for name, word in zip(columns[2:], row[2:], strict=True)
                           if word]  # fmt: skip
        # `say` does not wrap lines, so the name can be copied from any window.
        say(row[0])
        say(f"    {' · '.join(told)}")
