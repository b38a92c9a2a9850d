"""Blocks as a LaTeX document that compiles as it is, with pdf figures in ``figures/``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from reseed.report.latex import escaped, latex_table
from reseed.report.page.blocks import (
    Block,
    Code,
    Folded,
    Items,
    Paragraph,
    Picture,
    Section,
    Table,
    spans,
)

_PREAMBLE = r"""\documentclass[11pt]{article}
\usepackage[utf8]{inputenc}
\usepackage[margin=2.5cm]{geometry}
\usepackage{booktabs,graphicx,hyperref}
\setlength{\parindent}{0pt}
\setlength{\parskip}{0.6em}
"""


def tex(title: str, sections: Sequence[Section]) -> str:
    """Return the whole document."""
    numbers = count(1)
    body: list[str] = []
    for section in sections:
        body.append(rf"\section{{{escaped(section.title)}}}")
        body += [_block(block, numbers) for block in section.blocks]
        body.append(r"\clearpage")  # LaTeX can hold back only a few figures
    head = rf"\title{{{escaped(title)}}}" + "\n" + r"\date{}"
    return "\n\n".join(
        [_PREAMBLE + head, r"\begin{document}", r"\maketitle", *body, r"\end{document}"]
    ) + "\n"  # fmt: skip


def _block(block: Block, numbers: count[int]) -> str:
    match block:
        case Paragraph(text):
            return _inline(text)
        case Items(texts):
            items = "\n".join(rf"\item {_inline(text)}" for text in texts)
            return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}"
        case Table(words):
            return latex_table(words, "", f"tab:{next(numbers)}")
        case Picture():
            return _figure(block)
        case Code(text):
            lines = [rf"\texttt{{{_breakable(line)}}}" for line in text.splitlines() if line]
            return "{\\small\\raggedright\n" + "\\\\\n".join(lines) + "\\par}"
        case Folded(title, blocks):
            inside = [_block(inner, numbers) for inner in blocks]
            return "\n\n".join([rf"\subsection{{{escaped(title)}}}", *inside])


def _figure(picture: Picture) -> str:
    return "\n".join(
        [
            r"\begin{figure}[htbp]",
            r"\centering",
            rf"\includegraphics[width=\linewidth,height=0.8\textheight,keepaspectratio]"
            rf"{{figures/{picture.name}.pdf}}",
            rf"\caption{{{escaped(picture.title)}. {_inline(picture.caption)}}}",
            rf"\label{{fig:{picture.name}}}",
            r"\end{figure}",
        ]
    )


def _inline(text: str) -> str:
    made = []
    for span in spans(text):
        if span.kind == "bold":
            made.append(rf"\textbf{{{escaped(span.text)}}}")
        elif span.kind == "code":
            made.append(rf"\texttt{{{_breakable(span.text)}}}")
        elif span.kind == "link" and span.target.startswith("https://"):
            made.append(rf"\href{{{_address(span.target)}}}{{{escaped(span.text)}}}")
        else:
            made.append(escaped(span.text))
    return "".join(made)


def _breakable(text: str) -> str:
    """Escape ``text`` and allow line breaks after ``_ / . - =``, for long names."""
    made = escaped(text)
    for sign in (r"\_", "/", ".", "-", "="):
        made = made.replace(sign, sign + r"\allowbreak{}")
    return made


def _address(url: str) -> str:
    return url.replace("%", r"\%").replace("#", r"\#")
