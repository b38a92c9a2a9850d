"""Blocks as HTML. Everything from outside is escaped: `tag` escapes its children unless they are
`Html`, which only this module makes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

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
from reseed.report.wording import Wording

_SCALE = 1.15
"""Pixels per point: makes a figure's 8 pt letters as large as the notes."""
_VOID = {"img", "input", "link", "meta"}


class Html(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: str, **attributes: Any) -> Html:
    """Return an element.

    Args:
        children: text, which is escaped, or `Html`.
        attributes: ``class_`` becomes ``class``, ``data_sort`` becomes ``data-sort``; None and
            False are left out, True is an attribute without a value.
    """
    said = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{said}>")
    return Html(f"<{name}{said}>{joined(children)}</{name}>")


def joined(children: Sequence[str], between: str = "") -> Html:
    """Concatenate text and HTML; text is escaped."""
    return Html(between.join(c if isinstance(c, Html) else escape(c) for c in children))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def document(title: str, body: Sequence[Html], scripts: Sequence[str]) -> Html:
    """Return a whole page.

    Args:
        scripts: scripts of the report to load, in order.
    """
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="stylesheet", href="style.css"),
        # Not deferred: a chosen theme must apply before the first paint.
        tag("script", src="theme.js"),
    ]
    scripted = [tag("script", src=name, defer=True) for name in scripts]
    whole = tag("html", tag("head", *head, *scripted), tag("body", *body), lang="en")
    return Html(f"<!doctype html>\n{whole}\n")


def section_html(section: Section) -> Html:
    heading = tag("h2", tag("a", section.title, href=f"#{section.name}"))
    blocks = (block_html(block) for block in section.blocks)
    return tag("section", heading, *blocks, id=section.name, class_="section")


def block_html(block: Block) -> Html:
    match block:
        case Paragraph(text):
            return tag("p", inline(text))
        case Items(texts, warns):
            items = (tag("li", inline(text)) for text in texts)
            return tag("ul", *items, class_="warnings" if warns else None)
        case Table(words):
            return table_html(words)
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


def table_html(words: Wording) -> Html:
    """Return a table that scrolls by itself if it is too wide, with its footnotes below."""

    def cell(name: str, i: int, text: str) -> Html:
        named = i < words.num_knobs
        scope = "col" if name == "th" else None
        return tag(name, *_lines(text), scope=scope, class_="name" if named else "number")

    head = tag("tr", *(cell("th", i, text) for i, text in enumerate(words.header)))
    rows = (tag("tr", *(cell("td", i, text) for i, text in enumerate(r))) for r in words.rows)
    caption = [tag("caption", inline(words.caption))] if words.caption else []
    table = tag("table", *caption, tag("thead", head), tag("tbody", *rows))
    made = [tag("div", table, class_="wide", tabindex="0", role="region",
                aria_label=words.caption or "table")]  # fmt: skip
    if words.footnotes:
        notes = tag("ul", *(tag("li", inline(note)) for note in words.footnotes), class_="notes")
        reading = tag("summary", "How to read it")
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
    # With the size known, the page does not jump when the image arrives.
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
