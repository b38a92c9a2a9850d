"""Blocks of a report, independent of its format.

Text is plain except for ``**bold**``, ```code``` and ``[words](target)``; every other character is
literal, so that renderers can escape it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from reseed.report.wording import Wording

_SPAN = re.compile(
    r"\*\*(?P<bold>.+?)\*\*|`(?P<code>[^`]+)`|\[(?P<link>[^\]\n]+)\]\((?P<target>\S+?)\)"
)


@dataclass(frozen=True)
class Span:
    """A piece of text of one kind.

    Attributes:
        target: target of a link: a path in the report or a URL.
    """

    kind: Literal["plain", "bold", "code", "link"]
    text: str
    target: str = ""


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    """A list.

    Attributes:
        warns: whether the items are warnings.
    """

    texts: tuple[str, ...]
    warns: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption and footnotes."""

    words: Wording


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


Block = Paragraph | Items | Table | Picture | Code | Folded


@dataclass(frozen=True)
class Section:
    """Blocks under a heading.

    Attributes:
        name: its anchor.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


def spans(text: str) -> list[Span]:
    """Return the pieces of a text, in order; none is empty."""
    found: list[Span] = []
    at = 0
    for match in _SPAN.finditer(text):
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
