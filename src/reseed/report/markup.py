"""Text in markdown and LaTeX: inline marks, escaping, and tables.

Text of a table or report is plain except for ``**bold**``, ```code``` and ``[words](target)``
(`spans`). Names, labels, paths and messages from outside are part of such text, so each format
escapes every character that it would not show as itself: `markdown_text` and `latex_text` here,
`page.render.tag` for HTML. Only targets that `is_link_target` accepts become links.

Use ``summary.tex`` with `\\input` in a document that has ``\\usepackage{booktabs}`` and
``\\usepackage{graphicx}`` (for ``\\resizebox``, which shrinks a table that is too wide to the width
of the text), and LaTeX of 2018 or later, which reads UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reseed.report.cell_labels import Cell, count_text, pair_axis_name
from reseed.report.format import one_line, range_text
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
_SPAN = re.compile(
    r"\*\*(?P<bold>.+?)\*\*|`(?P<code>[^`]+)`|\[(?P<link>[^\]\n]+)\]\((?P<target>\S+?)\)"
)
# No target holds a character that markdown or LaTeX would read as its end.
_TARGET = re.compile(r"https?://[\w./#?=&%+,:;@~-]+|(?!/)[\w./#?=&%+,~-]+", re.ASCII)
# Kept: the brackets of an interval and the star after it, which mean nothing to markdown.
_MARKDOWN = re.compile(
    r"(?P<kept>\[[-+0-9.,%<>–∞ ]+\](?![(\[:])|(?<= )\*(?= |$))"
    r"|[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|<(?=[^\s\d])|&(?=[#\w])|!$"
)
_BEGINNING = re.compile(r"^(\s*)(?:(#|>|=|[-+](?=[\s-]|$))|(\d+)([.)])(?=\s|$))")


@dataclass(frozen=True)
class Span:
    """A piece of text of one kind.

    Attributes:
        target: target of a link: a path in the report or a URL.
    """

    kind: Literal["plain", "bold", "code", "link"]
    text: str
    target: str = ""


def spans(text: str) -> list[Span]:
    """Return the pieces of a text, in order; none is empty.

    A link whose target `is_link_target` refuses is plain text.
    """
    found: list[Span] = []
    at = 0
    for match in _SPAN.finditer(text):
        if match["link"] and not is_link_target(match["target"]):
            continue
        found.append(Span("plain", text[at : match.start()]))
        if match["bold"]:
            found.append(Span("bold", match["bold"]))
        elif match["code"]:
            found.append(Span("code", match["code"]))
        else:
            found.append(Span("link", match["link"], match["target"]))
        at = match.end()
    found.append(Span("plain", text[at:]))
    return [span for span in found if span.text]


def is_link_target(target: str) -> bool:
    """Return True for ``https:`` and ``http:`` addresses and relative paths, which have no scheme
    that could run code (``javascript:``, ``data:``)."""
    return _TARGET.fullmatch(target) is not None


def markdown_text(text: str) -> str:
    """Escape a text for markdown, so that every character is literal, also in a table."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found["kept"] else f"\\{found[0]}"

    escaped = _MARKDOWN.sub(escape, one_line(text))
    return _BEGINNING.sub(lambda m: m[1] + (f"\\{m[2]}" if m[2] else f"{m[3]}\\{m[4]}"), escaped)


def markdown_code(text: str) -> str:
    """Return a text as a code span of markdown."""
    text = one_line(text)
    fence = _fence(text, 1)
    inside = f" {text} " if "`" in text or text != text.strip() else text
    return f"{fence}{inside}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """Return lines as a code block of markdown."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    """Return more backticks than the text has in a row."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def markdown_inline(text: str) -> str:
    """Return a text with its bold words, code and links as markdown."""
    made = []
    for span in spans(text):
        if span.kind == "code":
            made.append(markdown_code(span.text))
        elif span.kind == "bold":
            made.append(f"**{markdown_text(span.text)}**")
        elif span.kind == "link":
            made.append(f"[{markdown_text(span.text)}]({span.target})")
        else:
            made.append(markdown_text(span.text))
    return "".join(made)


def markdown_table(table: Table) -> str:
    """Return the table and its footnotes as markdown."""

    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_text, entries)) + " |"

    rule = "| " + " | ".join(
        [":--"] * table.num_knobs + ["--:"] * (len(table.header) - table.num_knobs)
    ) + " |"  # fmt: skip
    lines = [line(table.header), rule, *map(line, table.rows)]
    notes = "\n".join(f"- {markdown_inline(note)}" for note in table.footnotes)
    return ("\n".join(lines) + "\n\n" + notes).strip()


def latex_text(text: str) -> str:
    """Escape a text for LaTeX, so that every character is literal."""
    return _PATTERN.sub(lambda found: _SPECIAL[found[0]], one_line(text))


def latex_inline(text: str, *, breakable: bool = False) -> str:
    """Return a text with its bold words, code and links in LaTeX.

    Args:
        breakable: allow line breaks within code after ``_ / . - =``, for long names.
    """
    made = []
    for span in spans(text):
        if span.kind == "bold":
            made.append(rf"\textbf{{{latex_text(span.text)}}}")
        elif span.kind == "code":
            made.append(latex_code(span.text) if breakable else _typewriter(latex_text(span.text)))
        elif span.kind == "link" and ":" in span.target:
            address = re.sub("([%#&])", r"\\\1", span.target)
            made.append(rf"\href{{{address}}}{{{latex_text(span.text)}}}")
        else:
            made.append(latex_text(span.text))
    return "".join(made)


def latex_code(text: str) -> str:
    """Return code in LaTeX, with line breaks allowed after ``_ / . - =``."""
    made = latex_text(text)
    for sign in (r"\_", "/", ".", "-", "="):
        made = made.replace(sign, sign + r"\allowbreak{}")
    return _typewriter(made)


def _typewriter(text: str) -> str:
    return rf"\texttt{{{text}}}"


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
        rf"\caption{{{latex_text(caption)}.}}",
        rf"\label{{{label}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row([_stacked(name) for name in table.header]),
        r"\midrule",
        *(_row([latex_text(entry) for entry in row]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}}",
    ]
    if table.footnotes:
        notes = " ".join(_sentence(note) for note in table.footnotes)
        body += [r"\par\medskip", rf"\parbox{{\linewidth}}{{\footnotesize {notes}}}"]
    return "\n".join([*body, r"\end{table}"])


def _row(entries: Sequence[str]) -> str:
    return " & ".join(entries) + r" \\"


def _stacked(name: str) -> str:
    """Return a heading, broken into lines at its line breaks."""
    lines = [latex_text(line) for line in name.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack{" + r" \\ ".join(lines) + "}"


def _sentence(text: str) -> str:
    """Return a footnote as a sentence."""
    whole = latex_inline(text)
    return whole if whole.endswith((".", ".}")) else f"{whole}."


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
