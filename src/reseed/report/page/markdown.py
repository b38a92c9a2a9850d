"""Blocks as one markdown file, which shows the images in ``figures/``."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.report.page.blocks import (
    Block,
    Code,
    Folded,
    Items,
    Paragraph,
    Picture,
    Section,
    Table,
)
from reseed.report.tables import markdown_table


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the whole file."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *(_block(block, 3) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, level: int) -> str:
    match block:
        case Paragraph(text):
            return text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Table(words):
            caption = f"*{words.caption}*\n\n" if words.caption else ""
            return caption + markdown_table(words)
        case Picture(name, title, caption, data):
            files = ", ".join(f"[{file}](data/{file})" for file in data)
            image = f"![{title}](figures/{name}.png)"
            return f"{image}\n\n**{title}.** {caption} Data: {files}."
        case Code(text):
            return f"```\n{text}\n```"
        case Folded(title, blocks):
            return "\n\n".join([f"{'#' * level} {title}", *(_block(b, level + 1) for b in blocks)])
