"""Extraction of English prose from the docstrings of Python sources.

This file imports only the standard library, because the worker processes of `docstrings.py` run it
as a script. It reads a JSON list of file names from stdin and writes each file's paragraphs to
stdout.
"""

import ast
import gc
import json
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_PARAGRAPH_WORDS = 4
MIN_LETTER_SHARE = 0.88
"""Minimum share of letters and spaces in a paragraph of prose; tables and code have fewer."""


def source_docstrings(source: bytes) -> list[str]:
    """Return the docstrings of a module, its classes and functions, in the order of the source.

    Documentation attached by a call (`add_newdoc`, `add_docstr`) is included. A source that does
    not parse gives an empty list.
    """
    if b'"""' not in source and b"'''" not in source:
        return []  # saves the parsing, which takes nearly all of the time
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    return list(_docstrings_below(tree))


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            yield docstring
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield from _attached_docstrings(node.value)
    for field in ("body", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, field, ()):
            yield from _docstrings_below(statement)


def _attached_docstrings(call: ast.Call) -> Iterator[str]:
    function = call.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    if "add_" not in name or "doc" not in name:
        return
    for argument in call.args:
        for node in ast.walk(argument):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


# The patterns for lines are matched from the first non-blank character of a line.
_FENCE = ("```", "~~~")
_DOCTEST = re.compile(r">>>|\.\.\. |In \[\d+\]:")
_RULE = re.compile(r"[=\-~^+*#_\"'.`]{3,}[=\-~^+*#_ |]*\s*$|\|.*\|\s*$")
_DIRECTIVE = re.compile(r"\.\. *[\w-]*")
_PROSE_DIRECTIVE = re.compile(r"\.\. (note|warning|important|tip|seealso|caution|hint|attention)::")
_TYPE_LINE = re.compile(r":r?type\b|[`*\w][\w.*`, \[\]]* ?: ?[^.]*$")
_FIELD = re.compile(
    r":\w+[^:\n]*:(?:\s+|$)"  # :param name:
    r"|[*`\w.]+ *\([^:]*\) *:(?:\s+|$)"  # name (type):
    r"|[*`\w.]+:(?:\s+|$)"  # name:
    r"|[*`\w.]+ : +(?=[A-Z])"  # name : Sentence.
)
_BULLET = re.compile(r"([-*+•]|\(?\d{1,2}[.)]|\[\d+\]_?)\s+")
_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]+?) *<[^>`]*>`_*")
_MARK = re.compile(r"`+_?|\*\*?(?=\w)|(?<=\w)\*\*?(?!\w)|</?\w+>|\|(?=\w)|(?<=\w)\|")
_MARKUP_CHARS = frozenset("`*|[<:")
_WORD = re.compile(r"[A-Za-z]+")
_FUNCTION_WORD = re.compile(
    r"\b(?:the|a|an|of|to|is|in|and|for|be|this|that|with|it|are|as|by|from|on|or|not|if|which)\b",
    re.IGNORECASE,
)
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def prose_paragraphs(docstring: str) -> list[str]:
    """Return the paragraphs of English in a docstring, each on one line, without markup.

    Leaves out code (doctests, fences, literal blocks), tables, rules and the headings above them,
    formulas, and lines that only give a parameter's name and type.
    """
    lines = _dedent_tail(docstring).translate(_ASCII).splitlines()
    paragraphs = (_plain(" ".join(block)) for block in _blocks(_without_code(lines)))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _dedent_tail(docstring: str) -> str:
    """Dedent all lines but the first, which follows the quotes and has no indentation."""
    first, _, rest = docstring.expandtabs().partition("\n")
    return f"{first.strip()}\n{textwrap.dedent(rest)}"


def _without_code(lines: list[str]) -> Iterator[str]:
    """Yield the stripped lines outside of code, with an empty line for each omission."""
    block_indent: int | None = None  # skipped are lines indented by more than this
    fenced = in_doctest = False
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith(_FENCE):
            fenced = not fenced
            yield ""
        elif fenced:
            continue
        elif not text:
            in_doctest = False
            yield ""
        elif block_indent is not None and indent > block_indent:
            continue
        elif in_doctest or _DOCTEST.match(text):
            in_doctest, block_indent = True, None
            yield ""
        elif _DIRECTIVE.match(text):
            # The body of a note is prose; code, formulas and version marks are not.
            block_indent = None if _PROSE_DIRECTIVE.match(text) else indent
            yield ""
        else:
            block_indent = indent if text.endswith("::") else None
            yield text


def _blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield groups of lines that form a paragraph; list items and parameters are separate."""
    block: list[str] = []
    for line in lines:
        has_colon = ":" in line
        starts_block = _BULLET.match(line) or (has_colon and _FIELD.match(line))
        if _RULE.match(line):
            block = []  # the lines directly above a rule are its heading
        elif not line or starts_block:
            yield block
            block = [line[starts_block.end() :]] if starts_block else []
        elif has_colon and _TYPE_LINE.match(line) and _names_a_parameter(line):
            yield block
            block = []
        else:
            block.append(line)
    yield block


def _names_a_parameter(line: str) -> bool:
    """Return True for `axis : int or None, optional`, False for a sentence with a colon."""
    name, _, _ = line.partition(":")
    return line.startswith((":type", ":rtype")) or (
        len(name.split(",")) == len(name.split()) and not line.endswith(":")
    )


def _plain(text: str) -> str:
    """Return the text on one line, without the markup of reStructuredText and Markdown."""
    if not _MARKUP_CHARS.isdisjoint(text):
        text = _ROLE.sub(r"\1", text)
        text = _LINK.sub(lambda match: match[1] or match[2] or "", text)
        text = _MARK.sub("", text).replace("::", ":")
    return " ".join(text.split())


def _is_prose(paragraph: str) -> bool:
    words = _WORD.findall(paragraph)
    if len(words) < MIN_PARAGRAPH_WORDS or not paragraph.isascii():
        return False
    letters = sum(map(len, words)) + paragraph.count(" ")
    if letters < MIN_LETTER_SHARE * len(paragraph):
        return False
    return _FUNCTION_WORD.search(paragraph) is not None


def read_paragraphs(files: Iterable[str]) -> list[list[list[str]]]:
    """Return each file's docstrings as paragraphs; skip repetitions and those without prose."""
    warnings.simplefilter("ignore")  # parsing some sources warns, e.g. about invalid escapes
    gc.disable()  # syntax trees have no cycles; searching for them costs a quarter of the time
    seen: set[str] = set()
    results = []
    for file in files:
        docstrings = source_docstrings(Path(file).read_bytes())
        fresh = [docstring for docstring in docstrings if docstring not in seen]
        seen.update(fresh)
        paragraphs = map(prose_paragraphs, fresh)
        results.append([document for document in paragraphs if document])
    return results


if __name__ == "__main__":
    try:
        json.dump(read_paragraphs(json.load(sys.stdin)), sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # the command that reads the output was killed
        os._exit(1)
