"""``summary.tex``: the tables that the terminal shows, in LaTeX for a paper.

Use it with `\\input` in a document that has ``\\usepackage{booktabs}`` and
``\\usepackage{graphicx}`` (for ``\\resizebox``, which shrinks a table that is too wide to the width
of the text), and LaTeX of 2018 or later, which reads UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reseed.report.cell_labels import Cell, count_text, pair_axis_name
from reseed.report.format import range_text
from reseed.report.table import Table

PREAMBLE = r"% \usepackage{booktabs,graphicx}"
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    **{character: f"\\{character}" for character in "&%$#_"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # After a line break LaTeX would read [ and * as its arguments.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    # The OT1 font encoding shows these as other characters.
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "–": "--",
    "…": r"\ldots{}",
    "−": "$-$",
    "λ": r"$\lambda$",
    "κ": r"$\kappa$",
    "τ": r"$\tau$",
    "σ": r"$\sigma$",
    "Σ": r"$\Sigma$",
    "≈": r"$\approx$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "≠": r"$\neq$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\rightarrow$",
    "₀": "$_0$",
    "₁": "$_1$",
    "₂": "$_2$",
    "²": "$^2$",
    "½": r"$\frac{1}{2}$",
    "x\u0302": r"$\hat{x}$",
    "‖": r"$\|$",
}
_PATTERN = re.compile("|".join(map(re.escape, _SPECIAL)))


def escaped(text: str) -> str:
    """Escape a text for LaTeX, so that every character is literal."""
    return _PATTERN.sub(lambda found: _SPECIAL[found[0]], text)


def summary_latex(cells: Sequence[Cell], tables: Sequence[Table], name: str = "") -> str:
    """Return each table as a ``table`` with its caption and footnotes.

    Args:
        tables: the tables that the terminal shows; the first has the comparison's footnotes.
        name: prefix of the labels: ``tab:<name>``, ``tab:<name>-2``, …
    """
    label = re.sub(r"[^A-Za-z0-9-]+", "-", name or "summary").strip("-")
    made = [
        latex_table(table, _conditions(cells), f"tab:{label}" + (f"-{i}" if i > 1 else ""))
        for i, table in enumerate(tables, 1)
    ]
    return "\n\n".join([PREAMBLE, *made]) + "\n"


def latex_table(table: Table, conditions: str, label: str) -> str:
    """Return one table in LaTeX.

    Args:
        conditions: added to the table's own caption: n, interval, tokens.
    """
    columns = "l" * table.num_knobs + "r" * (len(table.header) - table.num_knobs)
    caption = ". ".join(text.rstrip(".") for text in (table.caption, conditions) if text)
    body = [
        r"\begin{table}[tbp]",
        r"\centering",
        rf"\caption{{{escaped(caption)}.}}",
        rf"\label{{{label}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row([_stacked(name) for name in table.header]),
        r"\midrule",
        *(_row([escaped(entry) for entry in row]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}}",
    ]
    if table.footnotes:
        notes = " ".join(_bold(note) for note in table.footnotes)
        body += [r"\par\medskip", rf"\parbox{{\linewidth}}{{\footnotesize {notes}}}"]
    return "\n".join([*body, r"\end{table}"])


def _row(entries: Sequence[str]) -> str:
    return " & ".join(entries) + r" \\"


def _stacked(name: str) -> str:
    """Return a heading, broken into lines at its line breaks."""
    lines = [escaped(line) for line in name.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack{" + r" \\ ".join(lines) + "}"


def _bold(text: str) -> str:
    """Return a footnote as a sentence, with ``**bold**`` and ``code`` in LaTeX."""
    parts = [
        rf"\textbf{{{escaped(part)}}}" if i % 2 else _code(part)
        for i, part in enumerate(text.split("**"))
    ]
    whole = "".join(parts)
    return whole if whole.endswith((".", ".}")) else f"{whole}."


def _code(text: str) -> str:
    return "".join(
        rf"\texttt{{{escaped(part)}}}" if i % 2 else escaped(part)
        for i, part in enumerate(text.split("`"))
    )


def _conditions(cells: Sequence[Cell]) -> str:
    """Return ``Mean over pairs of n = 3 seeds with the 95% interval over seeds; 65,536 held-out
    …``."""
    some = any(e.low is not None for _, cell in cells for e in cell.estimates.values())
    confidence = cells[0][1].settings.confidence
    over = (
        "seeds"
        if any(not c.settings.pairs_are_a_sample for _, c in cells)
        else pair_axis_name(cells)
    )
    interval = f" with the {confidence:.0%} interval over {over}" if some else ", no interval"
    tokens = range_text(cell.held_out_tokens for _, cell in cells)
    return f"Mean over pairs of {count_text(cells)}{interval}; {tokens} held-out tokens"
