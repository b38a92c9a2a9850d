"""Printing of tables on a terminal, as wide as the window allows."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from reseed.report.axes import FEW, Cell
from reseed.report.differences import difference_lines
from reseed.report.table import Table
from reseed.report.tables import shown_tables


def print_summary(
    cells: Sequence[Cell],
    *,
    title: str = "",
    console: Console | None = None,
) -> None:
    """Print the summary table with its footnotes and `difference_lines`, then `truth_tables`.

    On a terminal it fits the window: if it is too wide, spare columns are left out; if that does
    not suffice, cells are printed as paragraphs. In a file or pipe it has its full width and no
    colour, so that nothing is cut off.
    """
    console = console or Console()
    first, *others = shown_tables(cells)
    print_words(first, console, title)
    for line in difference_lines(cells):
        console.print(_rich(line), width=min(console.width, 100))
    for words in others:
        console.print()
        print_words(words, console)


def print_tables(
    tables: Sequence[Table], *, title: str = "", console: Console | None = None
) -> None:
    """Print tables one below the other, fitted as by `print_summary`."""
    console = console or Console()
    for i, words in enumerate(tables):
        if i:
            console.print()
        print_words(words, console, "" if i else title)


def print_words(words: Table, console: Console, title: str = "") -> None:
    """Print one table, fitted as by `print_summary`."""
    if not console.is_terminal:
        width = max(100, _needed(_table(words), console))
        console = Console(file=console.file, width=width, color_system=None)
    if title:
        console.print(Text(title, style="bold"))
    console.print(Text(words.caption))
    fitting = _fitting(words, console)
    console.print(_paragraphs(words) if fitting is None else _fitted(fitting, console))
    spared = [] if fitting is None else [n for n in words.header if n not in fitting.header]
    if spared:
        names = ", ".join(name.replace("\n", " ") for name in spared)
        note = f"not shown (the window is too narrow), but in summary.md: {names}"
        console.print(Text(note), width=min(console.width, 100), style="dim")
    for note in words.footnotes:
        console.print(_rich(note), width=min(console.width, 100), style="dim")


def _fitting(words: Table, console: Console) -> Table | None:
    """Leave out as few spare columns as the window allows; None if it is too narrow anyway."""
    for count in range(len(words.spare) + 1):
        narrower = words.without(words.spare[:count])
        if _needed(_table(narrower, 0), console) <= console.width:
            return narrower
    return None


def _needed(table: RichTable, console: Console) -> int:
    """Return the window columns that a table takes; its columns must all have a width."""
    wide = console.options.update(width=10_000, max_width=10_000)
    return Measurement.get(console, wide, table).maximum


def _fitted(words: Table, console: Console) -> RichTable:
    """Make the table with its columns as wide as the window allows."""
    return _table(words, console.width - _needed(_table(words, 0), console))


def _table(words: Table, room: int = 10_000) -> RichTable:
    """Make the table; columns may wrap between words, never within a word or number.

    Args:
        room: how much wider than the narrowest possible the table may be. (By default rich narrows
            the widest column first, and breaks its words while others have room.)
    """
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="bold")
    table.collapse_padding, table.pad_edge = True, False
    for i, name in enumerate(words.header):
        entries = [name, *(row[i] for row in words.rows)]
        least = max(cell_len(word) for entry in entries for word in (entry.split() or [""]))
        full = max(cell_len(line) for entry in entries for line in (entry.splitlines() or [""]))
        width = min(full, least + room)
        room -= width - least
        justify = "left" if i < words.num_knobs else "right"
        table.add_column(name, justify=justify, overflow="fold", width=width)
    first = [row[:1] for row in words.rows]
    grouped = words.num_knobs > 1 and len(words.rows) > FEW
    for i, row in enumerate(words.rows):
        if grouped and i and first[i] != first[i - 1] and len(set(first)) < len(first):
            table.add_section()
        table.add_row(*map(Text, row))
    return table


def _paragraphs(words: Table) -> Text:
    """Return the table as paragraphs, for a window that is too narrow for it."""
    names = [name.replace("\n", " ") for name in words.header]
    cells = [
        " · ".join(f"{name} {entry}" for name, entry in zip(names, row, strict=True))
        for row in words.rows
    ]
    return Text("\n" + "\n\n".join(cells) + "\n")


def _rich(text: str) -> Text:
    """Style ``**bold**`` for the terminal."""
    out = Text()
    for i, part in enumerate(text.split("**")):
        out.append(part, style="bold" if i % 2 else "")
    return out
