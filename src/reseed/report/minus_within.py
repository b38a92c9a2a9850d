"""Sharing across two chosen values minus sharing within each of them.

Pairs across two values, such as two architectures, may differ in the seed, in the data order, in
both or in neither. What another seed or order changes is taken out only if the pairs within a value
differ in the same of these axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reseed.compare.config import REPLICATES
from reseed.compare.pairing import SEPARATOR, PairGroup, across_minus_within
from reseed.compare.registry import Interval
from reseed.compare.statistics import holm_intervals
from reseed.report.format import holm_note


def minus_within(shown: Sequence[PairGroup], column: str, confidence: float) -> dict[int, Interval]:
    """Return id of a group across values → its interval of across minus within, corrected for the
    number of these differences (`holm_intervals`)."""
    found = {
        id(group): across_minus_within(group, within, column, confidence)
        for group, within in _compared(shown)
    }
    return dict(zip(found, holm_intervals([*found.values()], confidence), strict=True))


def minus_within_note(shown: Sequence[PairGroup], column: str, confidence: float) -> str:
    """Explain the column; empty if no group has an entry."""
    compared = _compared(shown)
    if not compared:
        return ""
    kinds = list(dict.fromkeys(_random_axes(within[0]) for _, within in compared))
    entries = minus_within(shown, column, confidence)
    tested = sum(one.low is not None for one in entries.values())
    if kinds == [("seed",)]:
        over = "pairs of seeds with the same value (mean of the two values)"
    elif len(kinds) == 1:
        over = (
            f"pairs with the same value that differ in {' and '.join(kinds[0])} (mean of the two "
            "values)"
        )
    else:
        over = (
            "pairs with the same value that differ in the same random axes as the row's pairs: "
            f"{'; '.join(' and '.join(kind) for kind in kinds)} (mean of the two values)"
        )
    empty = any(not group.within and id(group) not in entries for group in shown)
    lacking = " Rows without such pairs have no entry." if empty else ""
    stars = holm_note([tested], confidence)
    return f"**− within**: the row's measure minus the measure over {over}.{lacking} {stars}"


def _compared(shown: Sequence[PairGroup]) -> list[tuple[PairGroup, list[PairGroup]]]:
    """Return the groups across two values, each with the groups within its first and its second
    value whose pairs differ in the same random axes.

    No pair within a value agrees in all random axes. A group across values that does is compared
    with the pairs within them if these are of one kind, such as pairs of seeds.
    """
    own: dict[Any, dict[tuple[str, ...], PairGroup]] = {}
    for group in shown:
        if group.within and group.first:
            kinds = own.setdefault((*group.knobs.items(), group.first), {})
            kinds[_random_axes(group)] = group
    found = []
    for group in shown:
        values = (group.first, group.second)
        first, second = (own.get((*group.knobs.items(), value), {}) for value in values)
        axes = _random_axes(group)
        if not axes and len(first) == 1:
            (axes,) = first
        if not group.within and axes in first and axes in second:
            found.append((group, [first[axes], second[axes]]))
    return found


def _random_axes(group: PairGroup) -> tuple[str, ...]:
    """Return the axes of `REPLICATES` in which the runs of each pair differ."""
    return tuple(axis for axis in group.differs_in.split(SEPARATOR) if axis in REPLICATES)
