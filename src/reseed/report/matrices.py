"""Pairs of chosen values as a matrix, value by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from reseed.compare.pairing import PairGroup, groups
from reseed.report.axes import Cell, columns
from reseed.report.pairings import apart, family, fullest, general, value_name
from reseed.report.wording import Wording, measure_name, number

MATRICES = 6
"""Most families of cells (layers for each of some models, say) with matrices; more are too many to
read."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One measure of all pairs of values.

    Attributes:
        title: the measure, and the family of cells if there are several.
        axis: axis of the values; empty if they have no common name.
        values: names of rows and columns, in order.
        entries: the measure; NaN where there are no such pairs.
        threshold: threshold of the sharing rule.
    """

    title: str
    axis: str
    values: tuple[str, ...]
    entries: Float[np.ndarray, "values values"]
    threshold: float


def value_matrices(cells: Sequence[Cell]) -> list[Matrix]:
    """Return, for each family of cells, the primary measure and one-sided coverage.

    Families with fewer than 3 values are left out, unless seeds pair up, too; with more than
    `MATRICES` families the list is empty.
    """
    cells = general(cells)
    families = _families(cells, named=True)
    if len(families) > MATRICES:
        return []
    names = columns([(own[0].knobs, None) for own in families])  # type: ignore[misc]
    made = []
    for own in families:
        if len(_values(own)) < 3 and not any(group.within for group in own):
            continue
        if all(apart(group) for group in own):
            continue
        settings = cells[0][1].settings
        where = ", ".join(str(own[0].knobs[name]) for name in names)
        for column in (settings.primary, None):
            what = measure_name(column).replace("\n", " ") if column else "covered"
            rule = "" if column else ": of the latents of the row, those that the column covers"
            title = f"{what.capitalize()}{rule}" + (f" ({where})" if where else "")
            entries = np.array(list(_entries(own, column).values()))
            values = tuple(_values(own))
            made.append(Matrix(title, value_name(cells), values, entries, settings.threshold))
    return made


def matrices(cells: Sequence[Cell]) -> list[Wording]:
    """Return `value_matrices` as tables."""
    return [
        Wording(
            (found.axis, *found.values),
            tuple(
                (value, *(number(float(x)) for x in row))
                for value, row in zip(found.values, found.entries, strict=True)
            ),
            1,
            found.title,
            (),
        )
        for found in value_matrices(cells)
    ]


def matrix_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return ``matrix.csv``: for each family of cells and measure a row and a column per value."""
    cells = general(cells)
    rows: list[Mapping[str, Any]] = []
    measures = (*dict.fromkeys((cells[0][1].settings.primary, "shared_fraction")), None)
    for own in _families(cells):
        for column in measures:
            for value, entries in _entries(own, column).items():
                named = dict(zip(_values(own), entries, strict=True))
                rows.append({**own[0].knobs, "measure": column or "coverage", "of": value, **named})
    return pd.DataFrame(rows)


def _families(cells: Sequence[Cell], named: bool = False) -> list[list[PairGroup]]:
    """Return the groups of `fullest`, by family.

    Args:
        named: whether to leave out groups whose values have no names.
    """
    families: dict[Any, list[PairGroup]] = {}
    for group in fullest(groups(cells)) if cells else []:
        if group.first or not named:
            families.setdefault(family(group), []).append(group)
    return list(families.values())


def _values(own: Sequence[PairGroup]) -> list[str]:
    return list(dict.fromkeys([g.first for g in own] + [g.second for g in own]))


def _entries(own: Sequence[PairGroup], column: str | None) -> dict[str, list[float]]:
    """Return row value → an entry per value; NaN where there are no such pairs.

    Args:
        column: a symmetric measure, or None for the coverage of the row's latents by the column's.
    """
    at: dict[tuple[str, str], float] = {}
    for group in own:
        forth, back = (column, column) if column else ("coverage_a", "coverage_b")
        if group.within and column is None:
            forth = back = "coverage"
        at[group.first, group.second] = group.mean(forth)
        at[group.second, group.first] = group.mean(back)
    values = _values(own)
    return {a: [at.get((a, b), float("nan")) for b in values] for a in values}
