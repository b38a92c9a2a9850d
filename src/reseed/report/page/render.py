"""Blocks of a report, independent of its format, and their rendering as HTML, markdown and LaTeX.

Text has the inline marks of `report.markup`; every other character is literal. In HTML, `tag`
escapes its children unless they are `Html`, which only this module makes, and leaves out a link
that is not `is_link_target`. A page loads only scripts and styles with the nonce in its security
policy, so that nothing in a name or token would run even if it were not escaped. The markdown file
shows the images in ``figures/``; the LaTeX document compiles as it is, with pdf figures in
``figures/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from itertools import count
from typing import Any

from reseed.report.markup import (
    is_link_target,
    latex_code,
    latex_inline,
    latex_table,
    latex_text,
    markdown_block,
    markdown_inline,
    markdown_table,
    markdown_text,
    spans,
)
from reseed.report.table import Table

_SCALE = 1.15
"""Pixels per point: makes a figure's 8 pt letters as large as those of the footnotes."""
_VOID = {"img", "input", "link", "meta"}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self' file:; "
    "base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy of a page. Some browsers do not count files on disk as ``'self'``."""
_PREAMBLE = r"""\documentclass[11pt]{article}
\usepackage[utf8]{inputenc}
\usepackage[margin=2.5cm]{geometry}
\usepackage{booktabs,graphicx,hyperref}
\setlength{\parindent}{0pt}
\setlength{\parskip}{0.6em}
"""


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class BulletList:
    """A list.

    Attributes:
        warns: whether the items are warnings.
    """

    texts: tuple[str, ...]
    warns: bool = False


@dataclass(frozen=True)
class TableBlock:
    """A table with its caption and footnotes."""

    table: Table


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: stem of its files under ``figures/``.
        title: subject, in a few words.
        caption: how to read it, with n and the interval.
        data: files of ``data/`` that hold its numbers.
        size: width and height, in points.
    """

    name: str
    title: str
    caption: str
    data: tuple[str, ...]
    size: tuple[float, float]


@dataclass(frozen=True)
class Code:
    """Preformatted lines: commands or settings."""

    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on demand, where the format can hide them."""

    title: str
    blocks: tuple[Block, ...]


Block = Paragraph | BulletList | TableBlock | Picture | Code | Folded


@dataclass(frozen=True)
class Section:
    """Blocks under a heading.

    Attributes:
        name: anchor of the heading.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


class Html(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: str, **attributes: Any) -> Html:
    """Return an HTML element.

    Args:
        children: text, which is escaped, or `Html`.
        attributes: ``class_`` becomes ``class``, ``data_sort`` becomes ``data-sort``; None and
            False are left out, and so are links that are not `is_link_target`; True is an attribute
            without a value.
    """
    text = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{text}>")
    return Html(f"<{name}{text}>{joined(children)}</{name}>")


def joined(children: Sequence[str], between: str = "") -> Html:
    """Concatenate text and HTML; text is escaped."""
    return Html(between.join(c if isinstance(c, Html) else escape(c) for c in children))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if name in ("href", "src") and not is_link_target(str(value)):
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def document(title: str, body: Sequence[Html], scripts: Sequence[str]) -> Html:
    """Return a whole HTML page.

    Args:
        scripts: scripts of the report to load, in order.
    """
    made = tag("body", *body)
    # Text from outside is part of what is hashed, so it cannot contain the nonce.
    nonce = sha256(f"{title}\n{made}".encode()).hexdigest()[:32]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY.format(nonce)),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="stylesheet", href="style.css", nonce=nonce),
        # Not deferred: a chosen theme must apply before the first paint.
        tag("script", src="theme.js", nonce=nonce),
    ]
    scripted = [tag("script", src=name, defer=True, nonce=nonce) for name in scripts]
    whole = tag("html", tag("head", *head, *scripted), made, lang="en")
    return Html(f"<!doctype html>\n{whole}\n")


def section_html(section: Section) -> Html:
    heading = tag("h2", tag("a", section.title, href=f"#{section.name}"))
    blocks = (block_html(block) for block in section.blocks)
    return tag("section", heading, *blocks, id=section.name, class_="section")


def block_html(block: Block) -> Html:
    match block:
        case Paragraph(text):
            return tag("p", inline(text))
        case BulletList(texts, warns):
            items = (tag("li", inline(text)) for text in texts)
            return tag("ul", *items, class_="warnings" if warns else None)
        case TableBlock(table):
            return table_html(table)
        case Picture():
            return _picture(block)
        case Code(text):
            return tag("pre", tag("code", text), tabindex="0")
        case Folded(title, blocks):
            inside = (block_html(inner) for inner in blocks)
            return tag("details", tag("summary", title), *inside)


def inline(text: str) -> Html:
    """Render ``**bold**``, ```code``` and links of a text."""
    made: list[str] = []
    for span in spans(text):
        if span.kind == "bold":
            made.append(tag("strong", span.text))
        elif span.kind == "code":
            made.append(tag("code", span.text))
        elif span.kind == "link":
            made.append(tag("a", span.text, href=span.target))
        else:
            made.append(span.text)
    return joined(made)


def table_html(table: Table) -> Html:
    """Return a table with its footnotes below; if it is too wide, only the table scrolls."""

    def cell(name: str, i: int, text: str) -> Html:
        named = i < table.num_knobs
        scope = "col" if name == "th" else None
        return tag(name, *_lines(text), scope=scope, class_="name" if named else "number")

    head = tag("tr", *(cell("th", i, text) for i, text in enumerate(table.header)))
    rows = (tag("tr", *(cell("td", i, text) for i, text in enumerate(r))) for r in table.rows)
    caption = [tag("caption", inline(table.caption))] if table.caption else []
    element = tag("table", *caption, tag("thead", head), tag("tbody", *rows))
    made = [tag("div", element, class_="wide", tabindex="0", role="region",
                aria_label=table.caption or "table")]  # fmt: skip
    if table.footnotes:
        notes = tag("ul", *(tag("li", inline(note)) for note in table.footnotes), class_="notes")
        reading = tag("summary", "How to read the table")
        made.append(tag("details", reading, notes, open=True, class_="reading"))
    return joined(made)


def _lines(text: str) -> list[str]:
    """Return a heading without its optional line break, or an estimate with its interval in a span
    of its own."""
    value, bracket, rest = text.partition(" [")
    if bracket and rest.endswith("]"):
        return [value, " ", tag("span", f"[{rest}", class_="interval")]
    return [text.replace("\n", " ")]


def _picture(picture: Picture) -> Html:
    files = f"figures/{picture.name}"
    width, height = (round(side * _SCALE) for side in picture.size)
    # The size is given so that the text does not move when the image has loaded.
    image = tag(
        "img",
        src=f"{files}.svg",
        alt=f"{picture.title}. {picture.caption}",
        width=width,
        height=height,
        loading="lazy",
    )
    data = [tag("a", name, href=f"data/{name}") for name in picture.data]
    links = [tag("a", kind, href=f"{files}.{kind}") for kind in ("svg", "png")]
    caption = tag(
        "figcaption",
        tag("strong", f"{picture.title}."),
        " ",
        inline(picture.caption),
        tag("span", "figure: ", joined(links, " "), " · data: ", joined(data, " "), class_="links"),
    )
    return tag("figure", tag("a", image, href=f"{files}.svg", class_="card"), caption)


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return a report as markdown."""
    parts = [f"# {markdown_text(title)}"]
    for section in sections:
        parts.append(f"## {markdown_text(section.title)}")
        parts += [_markdown_block(block, 3) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block, level: int) -> str:
    match block:
        case Paragraph(text):
            return markdown_inline(text)
        case BulletList(texts):
            return "\n".join(f"- {markdown_inline(text)}" for text in texts)
        case TableBlock(table):
            caption = f"*{markdown_text(table.caption)}*\n\n" if table.caption else ""
            return caption + markdown_table(table)
        case Picture(name, title, caption, data):
            files = ", ".join(_markdown_link(file, f"data/{file}") for file in data)
            image = "!" + _markdown_link(title, f"figures/{name}.png")
            about = f"**{markdown_text(title)}.** {markdown_inline(caption)}"
            return f"{image}\n\n{about} Data: {files}."
        case Code(text):
            return markdown_block(text)
        case Folded(title, blocks):
            head = f"{'#' * level} {markdown_text(title)}"
            return "\n\n".join([head, *(_markdown_block(b, level + 1) for b in blocks)])


def _markdown_link(text: str, target: str) -> str:
    return f"[{markdown_text(text)}]({target})" if is_link_target(target) else markdown_text(text)


def tex(title: str, sections: Sequence[Section]) -> str:
    """Return a report as a LaTeX document."""
    numbers = count(1)
    body: list[str] = []
    for section in sections:
        body.append(rf"\section{{{latex_text(section.title)}}}")
        body += [_tex_block(block, numbers) for block in section.blocks]
        body.append(r"\clearpage")  # LaTeX fails if too many figures wait to be placed
    head = rf"\title{{{latex_text(title)}}}" + "\n" + r"\date{}"
    return "\n\n".join(
        [_PREAMBLE + head, r"\begin{document}", r"\maketitle", *body, r"\end{document}"]
    ) + "\n"  # fmt: skip


def _tex_block(block: Block, numbers: count[int]) -> str:
    match block:
        case Paragraph(text):
            return latex_inline(text, breakable=True)
        case BulletList(texts):
            items = "\n".join(rf"\item {latex_inline(text, breakable=True)}" for text in texts)
            return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}"
        case TableBlock(table):
            return latex_table(table, "", f"tab:{next(numbers)}")
        case Picture():
            return _figure(block)
        case Code(text):
            lines = [latex_code(line) for line in text.splitlines() if line]
            return "{\\small\\raggedright\n" + "\\\\\n".join(lines) + "\\par}"
        case Folded(title, blocks):
            inside = [_tex_block(inner, numbers) for inner in blocks]
            return "\n\n".join([rf"\subsection{{{latex_text(title)}}}", *inside])


def _figure(picture: Picture) -> str:
    caption = latex_inline(picture.caption, breakable=True)
    return "\n".join(
        [
            r"\begin{figure}[htbp]",
            r"\centering",
            rf"\includegraphics[width=\linewidth,height=0.8\textheight,keepaspectratio]"
            rf"{{figures/{picture.name}.pdf}}",
            rf"\caption{{{latex_text(picture.title)}. {caption}}}",
            rf"\label{{fig:{picture.name}}}",
            r"\end{figure}",
        ]
    )
