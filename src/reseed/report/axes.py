"""What tells the cells of a comparison apart: their order, their short names, and the axes of
numbers that figures are drawn over."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from reseed.compare.cell import CellResult
from reseed.report.numbers import MISSING

Cell = tuple[Mapping[str, Any], CellResult]
"""The knobs of a cell (``{"sae": "topk", "layer": 2}``) and what was measured."""

FEW = 4
"""So many cells have room for names of all that varies."""
_NUMBER = re.compile(r"(.*?)([-+]?\d[\d.]*(?:e[-+]?\d+)?)")


def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """The cells grouped: by arm, by what is named, then by what is a number, that ascending.

    What is named keeps the order in which it was declared.
    """
    names = varying(cells)
    amounts = {name: values for name in names if (values := _amounts(cells, name)) is not None}
    words = {name: list(dict.fromkeys(_word(k, name) for k, _ in cells)) for name in names}
    named = [name for name in names if name not in amounts]

    def place(i: int) -> tuple[float, ...]:
        knobs = cells[i][0]
        by_name = (words[name].index(_word(knobs, name)) for name in named)
        return (*by_name, *(values[i] for values in amounts.values()))

    return [cells[i] for i in sorted(range(len(cells)), key=place)]


def varying(cells: Sequence[Cell]) -> list[str]:
    """The knobs that differ between cells."""
    names = dict.fromkeys(name for knobs, _ in cells for name in knobs)
    return [n for n in names if len({_word(knobs, n) for knobs, _ in cells}) > 1]


def telling(cells: Sequence[Cell]) -> list[str]:
    """The varying knobs, without those that one before them tells already (λ of each
    architecture, which has one)."""
    names = varying(cells)
    return [
        name
        for i, name in enumerate(names)
        if not any(_follows(cells, name, before) for before in names[:i])
    ]


def columns(cells: Sequence[Cell]) -> list[str]:
    """The varying knobs that tables show: without those that the arm determines, of which
    `told_by_arm` speaks."""
    left_out = _of_arm(cells)
    return [name for name in varying(cells) if name not in left_out]


def told_by_arm(cells: Sequence[Cell]) -> str:
    """What each arm's name stands for, in one line, arms that are alike said together:
    ``easy: model world_easy, 64 latents, L0≈3 · …``. Empty where no knob follows from the arm."""
    names = _of_arm(cells)
    if not names:
        return ""
    arms: dict[str, list[str]] = {}
    for knobs in {_word(knobs, "arm"): knobs for knobs, _ in cells}.values():
        said = ", ".join(_said(name, _word(knobs, name)) for name in names)
        arms.setdefault(said, []).append(_word(knobs, "arm"))
    return " · ".join(f"{'; '.join(who)}: {said}" for said, who in arms.items())


def _of_arm(cells: Sequence[Cell]) -> list[str]:
    """The varying knobs, other than the arm itself, that have one value in each arm."""
    names = varying(cells)
    if "arm" not in names:
        return []
    return [name for name in names if name != "arm" and _follows(cells, name, "arm")]


def _said(name: str, word: str) -> str:
    """A knob and its value: ``model world_easy``, ``64 latents``, ``L0≈3``."""
    if name.endswith("num_latents"):
        return f"{word} latents"
    return word if name == "sparsity" else f"{name} {word}"


def naming(cells: Sequence[Cell]) -> list[str]:
    """The knobs that name a cell: all that tables show, of many cells only the telling ones."""
    return columns(cells) if len(cells) <= FEW else telling(cells)


def label(cells: Sequence[Cell], knobs: Mapping[str, Any]) -> str:
    """A short name of one cell among the others."""
    return ", ".join(knob_values(naming(cells), knobs)) or str(knobs.get("sae", "all runs"))


def knob_values(names: Sequence[str], knobs: Mapping[str, Any]) -> list[str]:
    """The values of some knobs in words."""
    return [_word(knobs, name) for name in names]


def row_labels(cells: Sequence[Cell]) -> tuple[list[str], list[float]]:
    """Names of rows that stand under each other, what the row above said left out, and their
    places, with a gap before each group of more than one."""
    names = naming(cells)
    words = [knob_values(names, knobs) for knobs, _ in cells]
    labels, rows = [], []
    at, before = 0.0, None
    grouped = len({tuple(w[:-1]) for w in words}) < len(cells)
    for w, (knobs, _) in zip(words, cells, strict=True):
        same = before is not None and w[:-1] == before[:-1]
        if before is not None:
            at += 1.0 if same or not grouped else 1.5
        labels.append(w[-1] if same and len(w) > 1 else label(cells, knobs))
        rows.append(at)
        before = w
    return labels, rows


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most ``width`` characters, broken between words."""
    return "\n".join(textwrap.wrap(text, max(8, width), break_long_words=False)) or text


def numeric_axes(cells: Sequence[Cell], at_least: int = 3) -> list[str]:
    """The telling knobs that are numbers, of at least so many values."""
    return [
        name
        for name in telling(cells)
        if (values := _amounts(cells, name)) is not None and len(set(values)) >= at_least
    ]


def amounts(cells: Sequence[Cell], axis: str) -> list[float]:
    """The value of a numeric axis for each cell."""
    values = _amounts(cells, axis)
    if values is None:
        raise ValueError(f"`{axis}` is no number in every cell")
    return values


def identities(cells: Sequence[Cell], axis: str) -> list[tuple[str, ...]]:
    """What a cell is beside its place on an axis: the values of the other telling knobs."""
    others = [name for name in telling(cells) if name != axis]
    return [tuple(knob_values(others, knobs)) for knobs, _ in cells]


def _amounts(cells: Sequence[Cell], name: str) -> list[float] | None:
    """Numbers, also such as ``k=8``; None where one has none, or they are of different kinds."""
    found = [_NUMBER.fullmatch(_word(knobs, name)) for knobs, _ in cells]
    if not all(found) or len({match[1] for match in found if match}) > 1:
        return None
    try:
        return [float(match[2]) for match in found if match]
    except ValueError:
        return None


def _follows(cells: Sequence[Cell], name: str, other: str) -> bool:
    """Whether ``other`` says what ``name`` is."""
    pairs = {(_word(knobs, other), _word(knobs, name)) for knobs, _ in cells}
    return len(pairs) == len({first for first, _ in pairs})


def _word(knobs: Mapping[str, Any], name: str) -> str:
    return str(knobs.get(name, MISSING))
