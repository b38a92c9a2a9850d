"""Text about the cells of a comparison: the knobs that distinguish cells, their order, short names
and numeric axes, and what the runs of a pair differ in."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from reseed.compare.cell import CellResult
from reseed.compare.registry import NOT_ASKED, NOTE, TOKENS
from reseed.report.format import MISSING, one_line, range_text

Cell = tuple[Mapping[str, Any], CellResult]
"""The knobs of a cell (``{"sae": "topk", "layer": 2}``) and its measures."""
Knobbed = tuple[Mapping[str, Any], object]
"""The knobs of a cell, or of anything else."""
FEW = 4
"""Maximum number of cells that are named by all varying knobs."""
_NUMBER = re.compile(r"(.*?)([-+]?\d[\d.]*(?:e[-+]?\d+)?)")


def sort_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Sort the cells: first by their non-numeric knobs, in the order in which values were declared,
    then by their numeric knobs, ascending."""
    names = varying_knobs(cells)
    amounts = {name: values for name in names if (values := _amounts(cells, name)) is not None}
    words = {name: list(dict.fromkeys(_word(k, name) for k, _ in cells)) for name in names}
    named = [name for name in names if name not in amounts]

    def place(i: int) -> tuple[float, ...]:
        knobs = cells[i][0]
        by_name = (words[name].index(_word(knobs, name)) for name in named)
        return (*by_name, *(values[i] for values in amounts.values()))

    return [cells[i] for i in sorted(range(len(cells)), key=place)]


def varying_knobs(cells: Sequence[Knobbed]) -> list[str]:
    """Return the knobs that differ between cells."""
    names = dict.fromkeys(name for knobs, _ in cells for name in knobs)
    return [n for n in names if len({_word(knobs, n) for knobs, _ in cells}) > 1]


def distinguishing_knobs(cells: Sequence[Knobbed]) -> list[str]:
    """Return the varying knobs, without those that an earlier one determines (λ, if each
    architecture has one λ)."""
    names = varying_knobs(cells)
    return [
        name
        for i, name in enumerate(names)
        if not any(_follows(cells, name, before) for before in names[:i])
    ]


def columns(cells: Sequence[Knobbed]) -> list[str]:
    """Return the varying knobs that tables show: without those that the arm determines, which
    `arm_note` lists."""
    left_out = _of_arm(cells)
    return [name for name in varying_knobs(cells) if name not in left_out]


def arm_note(cells: Sequence[Cell]) -> str:
    """Return the knobs that each arm determines, in one line: ``easy: model world_easy, 64 latents,
    L0≈3 · …``. Arms with equal knobs share an entry. Empty if the arm determines no knob."""
    names = _of_arm(cells)
    if not names:
        return ""
    arms: dict[str, list[str]] = {}
    for knobs in {_word(knobs, "arm"): knobs for knobs, _ in cells}.values():
        text = ", ".join(_knob_text(name, _word(knobs, name)) for name in names)
        arms.setdefault(text, []).append(_word(knobs, "arm"))
    return " · ".join(f"{'; '.join(arms_alike)}: {text}" for text, arms_alike in arms.items())


def _of_arm(cells: Sequence[Knobbed]) -> list[str]:
    """Return the varying knobs, other than the arm, that have one value in each arm."""
    names = varying_knobs(cells)
    if "arm" not in names:
        return []
    return [name for name in names if name != "arm" and _follows(cells, name, "arm")]


def _knob_text(name: str, word: str) -> str:
    """Return a knob and its value: ``model world_easy``, ``64 latents``, ``L0≈3``."""
    if name.endswith("num_latents"):
        return f"{word} latents"
    return word if name == "sparsity" else f"{name} {word}"


def label_knobs(cells: Sequence[Cell]) -> list[str]:
    """Return the knobs that name a cell: all that tables show; for many cells, only
    `distinguishing_knobs`."""
    return columns(cells) if len(cells) <= FEW else distinguishing_knobs(cells)


def label(cells: Sequence[Cell], knobs: Mapping[str, Any]) -> str:
    """Return a short name of one cell among ``cells``."""
    return ", ".join(knob_values(label_knobs(cells), knobs)) or one_line(
        str(knobs.get("sae", "all runs"))
    )


def knob_values(names: Sequence[str], knobs: Mapping[str, Any]) -> list[str]:
    """Return the values of some knobs as text."""
    return [_word(knobs, name) for name in names]


def row_labels(cells: Sequence[Cell]) -> tuple[list[str], list[float]]:
    """Return row labels, without the knobs that repeat the row above, and row positions, with a gap
    between groups if any group has more than one row."""
    names = label_knobs(cells)
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
    """Wrap a text between words, in lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, max(8, width), break_long_words=False)) or text


def numeric_axes(cells: Sequence[Cell], at_least: int = 3) -> list[str]:
    """Return the knobs of `distinguishing_knobs` that are numbers with at least ``at_least``
    values."""
    return [
        name
        for name in distinguishing_knobs(cells)
        if (values := _amounts(cells, name)) is not None and len(set(values)) >= at_least
    ]


def amounts(cells: Sequence[Cell], axis: str) -> list[float]:
    """Return the value of a numeric axis for each cell.

    Raises:
        ValueError: the axis is not a number in every cell.
    """
    values = _amounts(cells, axis)
    if values is None:
        raise ValueError(f"`{axis}` is not a number in every cell")
    return values


def other_knob_values(cells: Sequence[Cell], axis: str) -> list[tuple[str, ...]]:
    """Return, for each cell, the values of the knobs of `distinguishing_knobs` other than
    ``axis``."""
    others = [name for name in distinguishing_knobs(cells) if name != axis]
    return [tuple(knob_values(others, knobs)) for knobs, _ in cells]


def pair_axis_name(cells: Sequence[Cell], plural: bool = True) -> str:
    """Return the name of what the runs of a pair differ in: seeds, or values of another axis."""
    axis, *others = {cell.settings.pair_by for _, cell in cells}
    if others or not isinstance(axis, str):  # arms, or several axes
        return "runs" if plural else "run"
    if axis == "seed":
        return "seeds" if plural else "seed"
    return f"{'values' if plural else 'value'} of {axis}"


def count_text(cells: Sequence[Cell]) -> str:
    """Return ``n = 3 seeds``."""
    counts = range_text(cell.n_seeds for _, cell in cells)
    return f"n = {counts} {pair_axis_name(cells)}"


def threshold_text(cells: Sequence[Cell]) -> str:
    """Return the threshold of the sharing rule: ``0.7``."""
    return f"{cells[0][1].settings.threshold:g}"


def _amounts(cells: Sequence[Knobbed], name: str) -> list[float] | None:
    """Return each cell's number (8 for ``k=8``); None if a cell has none, or if prefixes differ."""
    found = [_NUMBER.fullmatch(_word(knobs, name)) for knobs, _ in cells]
    if not all(found) or len({match[1] for match in found if match}) > 1:
        return None
    try:
        return [float(match[2]) for match in found if match]
    except ValueError:
        return None


def _follows(cells: Sequence[Knobbed], name: str, other: str) -> bool:
    """Return whether ``other`` determines ``name``."""
    pairs = {(_word(knobs, other), _word(knobs, name)) for knobs, _ in cells}
    return len(pairs) == len({first for first, _ in pairs})


def _word(knobs: Mapping[str, Any], name: str) -> str:
    return one_line(str(knobs.get(name, MISSING)))


def activations_of(cell: CellResult) -> tuple[int, str]:
    """Return the number of tokens on which the activations of a cell's latents were compared, and
    the reason why they were not; empty if they were."""
    tokens = int(cell.pairs[TOKENS].to_numpy().max()) if TOKENS in cell.pairs else 0
    if tokens:
        return tokens, ""
    return 0, str(cell.pairs[NOTE].iloc[0]) if NOTE in cell.pairs else NOT_ASKED
