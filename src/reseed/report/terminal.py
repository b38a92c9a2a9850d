"""Printing of tables on a terminal, as wide as the window allows."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from reseed.report.architecture_contrasts import difference_lines
from reseed.report.cell_labels import FEW, Cell
from reseed.report.table import Table
from reseed.report.table_files import shown_tables


def print_summary(
    cells: Sequence[Cell], *, title: str = "", console: Console | None = None
) -> None:
    """Print the summary table with its footnotes and `difference_lines`, then the other tables of
    `shown_tables`.

    On a terminal a table fits the window: if it is too wide, spare columns are left out; if that
    does not suffice, rows are printed as paragraphs. In a file or pipe a table has its full width
    and no colour, so that nothing is cut off.
    """
    console = console or Console()
    first, *others = shown_tables(cells)
    print_table(first, console, title)
    for line in difference_lines(cells):
        console.print(_styled(line), width=min(console.width, 100))
    for table in others:
        console.print()
        print_table(table, console)


def print_tables(
    tables: Sequence[Table],
    *,
    title: str = "",
    console: Console | None = None,
    whole: bool = False,
) -> None:
    """Print tables one below the other, fitted as by `print_summary`.

    Args:
        whole: the tables are in no file. Spare columns are left out before any entry is broken
            over lines, and names are before numbers and intervals.
    """
    console = console or Console()
    for i, table in enumerate(tables):
        if i:
            console.print()
        print_table(table, console, "" if i else title, whole=whole)


def print_table(table: Table, console: Console, title: str = "", *, whole: bool = False) -> None:
    """Print one table, fitted as by `print_summary`; ``whole`` as in `print_tables`."""
    if not console.is_terminal:
        width = max(100, _needed(_rich_table(table), console))
        console = Console(file=console.file, width=width, color_system=None)
    if title:
        console.print(Text(title, style="bold"))
    console.print(Text(table.caption))
    for unbroken in (0, table.num_knobs, None) if whole else (None,):
        fitting = _fitting(table, console, unbroken)
        if fitting is not None:
            console.print(_fitted(fitting, console, unbroken))
            break
    else:
        console.print(_paragraphs(table))
    spared = [] if fitting is None else [n for n in table.header if n not in fitting.header]
    if spared:
        names = ", ".join(name.replace("\n", " ") for name in spared)
        place = "" if whole else ", but in summary.md"
        note = f"not shown (the window is too narrow){place}: {names}"
        console.print(Text(note), width=min(console.width, 100), style="dim")
    for note in table.footnotes:
        console.print(_styled(note), width=min(console.width, 100), style="dim")


def _fitting(table: Table, console: Console, unbroken: int | None) -> Table | None:
    """Leave out as few spare columns as the window allows; None if it is too narrow anyway."""
    for count in range(len(table.spare) + 1):
        narrower = table.without(table.spare[:count])
        if _needed(_rich_table(narrower, 0, unbroken), console) <= console.width:
            return narrower
    return None


def _needed(made: RichTable, console: Console) -> int:
    """Return the width of a table in characters; all of its columns must have a set width."""
    wide = console.options.update(width=10_000, max_width=10_000)
    return Measurement.get(console, wide, made).maximum


def _fitted(table: Table, console: Console, unbroken: int | None) -> RichTable:
    """Make the table with its columns as wide as the window allows."""
    least = _needed(_rich_table(table, 0, unbroken), console)
    return _rich_table(table, console.width - least, unbroken)


def _rich_table(table: Table, room: int = 10_000, unbroken: int | None = None) -> RichTable:
    """Make the table; columns may wrap between words, never within a word or number.

    Args:
        room: number of characters by which the table may exceed its minimum width. (By default
            rich narrows the widest column first, and breaks its words while others have room.)
            Columns that need little get it; the others share the rest equally.
        unbroken: entries from this column on are on one line; None: of no column.
    """
    made = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="bold")
    made.collapse_padding, made.pad_edge = True, False
    columns = [[name, *(row[i] for row in table.rows)] for i, name in enumerate(table.header)]
    widths = [
        max(
            cell_len(word)
            for j, e in enumerate(own)
            for word in ([e] if j and unbroken is not None and i >= unbroken else e.split() or [""])
        )
        for i, own in enumerate(columns)
    ]
    full = [
        max(cell_len(line) for e in own for line in (e.splitlines() or [""])) for own in columns
    ]
    wanted = [most - least for least, most in zip(widths, full, strict=True)]
    order = sorted(range(len(columns)), key=wanted.__getitem__)
    for place, i in enumerate(order):
        given = max(0, min(wanted[i], room // (len(order) - place)))
        widths[i] += given
        room -= given
    for i, (name, width) in enumerate(zip(table.header, widths, strict=True)):
        justify = "left" if i < table.num_knobs else "right"
        made.add_column(name, justify=justify, overflow="fold", width=width)
    first = [row[:1] for row in table.rows]
    grouped = table.num_knobs > 1 and len(table.rows) > FEW
    for i, row in enumerate(table.rows):
        if grouped and i and first[i] != first[i - 1] and len(set(first)) < len(first):
            made.add_section()
        made.add_row(*map(Text, row))
    return made


def _paragraphs(table: Table) -> Text:
    """Return the table as paragraphs, for a window that is too narrow for it."""
    names = [name.replace("\n", " ") for name in table.header]
    cells = [
        " · ".join(f"{name} {entry}" for name, entry in zip(names, row, strict=True))
        for row in table.rows
    ]
    return Text("\n" + "\n\n".join(cells) + "\n")


def _styled(text: str) -> Text:
    """Style ``**bold**`` for the terminal."""
    out = Text()
    for i, part in enumerate(text.split("**")):
        out.append(part, style="bold" if i % 2 else "")
    return out
