"""Differences between architectures at each budget, and the rule for claiming a difference.

The ranking of two architectures can change with the number of optimiser steps. A difference is
therefore claimed only if its interval excludes 0 at the last two budgets, on the same side. Each
budget is a run of its own whose learning rate has decayed to zero. The intervals are corrected for
all differences of a measure, of every pair of architectures at every budget (Holm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from reseed.compare.difference import cell_difference, share_draws
from reseed.compare.registry import Interval
from reseed.compare.statistics import holm_intervals
from reseed.report.cell_labels import Cell, amounts, distinguishing_knobs, pair_axis_name
from reseed.report.format import format_number, holm_note, interval_sign, measure_name, signed
from reseed.report.table import Table

MEASURES = {
    "shared": "shared_fraction",
    "shared, dec": "shared_fraction_decoder",
    "shared, corr": "shared_fraction_correlation",
}
LISTED = 4
"""Maximum number of verdicts that the terminal shows one by one."""
BUDGETS = 2
"""Number of budgets, counted from the largest, that must agree for a claim."""


@dataclass(frozen=True)
class Contrast:
    """Two architectures, equal in all else, at every budget that both were trained with.

    Attributes:
        first, second: the architectures.
        place: values of the other knobs that vary: arm, layer, …
        budgets: tokens, ascending.
        differences: measure → interval of first − second, for each budget.
        primary: the measure on which a difference is claimed.
        paired: whether the cells of some budget have the same random draws (`share_draws`).
        tested: number of differences of the primary measure for which intervals are corrected.
    """

    first: str
    second: str
    place: tuple[str, ...]
    budgets: tuple[float, ...]
    differences: dict[str, tuple[Interval, ...]]
    primary: str = "shared_fraction"
    paired: bool = False
    tested: int = 1

    @property
    def name(self) -> str:
        where = f"{', '.join(self.place)}: " if self.place else ""
        return f"{where}{self.first} − {self.second}"

    @property
    def claimed(self) -> int:
        """1 if the first is larger at all of the last `BUDGETS`, −1 if the second is, else 0."""
        sides = {interval_sign(d) for d in self.differences[self.primary][-BUDGETS:]}
        return sides.pop() if len(sides) == 1 else 0

    def verdict(self) -> str:
        """Return one line: the claim on the primary measure, or why there is none."""
        found = self.differences[self.primary]
        last = list(zip(self.budgets, found, strict=True))[-BUDGETS:]
        intervals = " and ".join(f"{signed(d)} at {b:,.0f}" for b, d in last) + " tokens"
        intervals += f"; corrected for {self.tested} differences" if self.tested > 1 else ""
        without = next((d.reason for _, d in last if d.low is None), "")
        sides = {interval_sign(d) for _, d in last}
        if without:
            claim = f"no difference claimed, because there is no interval ({without})"
        elif self.claimed:
            first, second = (self.first, self.second)[:: self.claimed]
            claim = f"**{first} {claim_phrase(self.primary)} than {second}**"
        elif 0 in sides:
            claim = "no difference claimed: an interval at the last two budgets includes 0"
        else:
            claim = "no difference claimed: the sign changes between the last two budgets"
        return f"{self.name}: {claim} ({intervals})"


def contrasts(cells: Sequence[Cell]) -> list[Contrast]:
    """Return every pair of architectures at two budgets or more, everything else equal.

    The intervals of each measure are corrected for the number of its differences (`_corrected`).
    Only cells whose pairs are a sample are used, because the others have no intervals.
    """
    cells = [(knobs, cell) for knobs, cell in cells if cell.settings.pairs_are_a_sample]
    names = distinguishing_knobs(cells)
    if "sae" not in names or "tokens" not in names:
        return []
    try:
        tokens = amounts(cells, "tokens")
    except ValueError:  # pairs consist of runs of different budgets
        return []
    others = [name for name in names if name not in ("sae", "tokens")]
    by_place: dict[tuple[str, ...], dict[str, dict[float, Cell]]] = {}
    for cell, budget in zip(cells, tokens, strict=True):
        place = tuple(str(cell[0].get(name)) for name in others)
        by_place.setdefault(place, {}).setdefault(str(cell[0]["sae"]), {})[budget] = cell
    settings, found = cells[0][1].settings, []
    for place, by_sae in by_place.items():
        for first, second in combinations(by_sae, 2):
            budgets = sorted(by_sae[first].keys() & by_sae[second].keys())
            if len(budgets) >= BUDGETS:
                pairs = [(by_sae[first][b][1], by_sae[second][b][1]) for b in budgets]
                differences = {
                    name: tuple(cell_difference(*two, name, settings.confidence) for two in pairs)
                    for name in measures(settings.primary).values()
                }
                paired = any(share_draws(*two) for two in pairs)
                found.append(
                    Contrast(
                        first, second, place, tuple(budgets), differences, settings.primary, paired
                    )
                )
    return _corrected(found, settings.confidence)


def _corrected(found: Sequence[Contrast], confidence: float) -> list[Contrast]:
    """Correct the intervals of each measure for the number of its differences."""
    corrected: list[dict[str, tuple[Interval, ...]]] = [{} for _ in found]
    for name in found[0].differences if found else ():
        each = holm_intervals([d for own in found for d in own.differences[name]], confidence)
        for own, contrast in zip(corrected, found, strict=True):
            count = len(contrast.budgets)
            own[name], each = tuple(each[:count]), each[count:]
    tested = sum(d.low is not None for own in found for d in own.differences[own.primary])
    return [
        replace(contrast, differences=own, tested=tested)
        for contrast, own in zip(found, corrected, strict=True)
    ]


def tested_differences(cells: Sequence[Cell]) -> int:
    """Return the number of differences of the primary measure that are corrected together; 1 if
    there are fewer."""
    return max([1, *(contrast.tested for contrast in contrasts(cells))])


def measures(primary: str) -> dict[str, str]:
    """Return name in the table → measure, the primary one first."""
    own = {name: measure for name, measure in MEASURES.items() if measure == primary}
    name = measure_name(primary)
    return (own or {name: primary}) | MEASURES


def claim_phrase(primary: str) -> str:
    """Return the phrase for the architecture with the larger primary measure."""
    if primary == "shared_fraction":
        return "shares more"
    return f"has more {measure_name(primary)}"


def differences(cells: Sequence[Cell]) -> Table | None:
    """Return the table of all contrasts, a row per budget; None if there are none."""
    found = contrasts(cells)
    if not found:
        return None
    shown = measures(found[0].primary)
    rows = [
        (contrast.name, f"{budget:,.0f}",
         *(signed(contrast.differences[name][i]) for name in shown.values()))
        for contrast in found
        for i, budget in enumerate(contrast.budgets)
    ]  # fmt: skip
    confidence = cells[0][1].settings.confidence
    counts = [
        sum(d.low is not None for contrast in found for d in contrast.differences[name])
        for name in shown.values()
    ]
    footnotes = (
        *(contrast.verdict() for contrast in found),
        *(f"**{reason}**" for reason in _reasons(found)),
        f"Differences of cell means with the {confidence:.0%} interval over "
        f"{pair_axis_name(cells)} ({difference_method([c.paired for c in found])}); "
        f"{holm_note(counts, confidence)} A difference is claimed, on the first measure, only if "
        "its interval excludes 0 at the last two budgets, on the same side, because the ranking "
        "can change with the budget.",
    )
    header = ("difference", "tokens", *shown)
    return Table(header, tuple(rows), 1, "", footnotes)


def _reasons(found: Sequence[Contrast]) -> list[str]:
    """Return why some differences have no interval."""
    each = (d.reason for own in found for ds in own.differences.values() for d in ds)
    return list(dict.fromkeys(filter(None, each)))


def difference_method(paired: Sequence[bool]) -> str:
    """Return how the intervals of differences were computed, from `share_draws` of each."""
    same = (
        "the same draw is left out of both cells at a time, because both have the same initial "
        "weights or data orders"
    )
    if all(paired):
        return same
    return f"Welch; where the cells have the same draws, {same}" if any(paired) else "Welch"


def difference_lines(cells: Sequence[Cell]) -> list[str]:
    """Return a line per contrast, or, if there are many, a line per place (other knobs' values)."""
    found = contrasts(cells)
    if len(found) <= LISTED:
        return [contrast.verdict() for contrast in found]
    places: dict[tuple[str, ...], list[Contrast]] = {}
    for contrast in found:
        places.setdefault(contrast.place, []).append(contrast)
    lines = [_order(place, pairs) for place, pairs in places.items()]
    return [
        *lines,
        f"Claims are based on the last two budgets, with intervals corrected for {found[0].tested} "
        "differences; summary.md has every difference.",
    ]


def _order(place: tuple[str, ...], pairs: Sequence[Contrast]) -> str:
    """Return ``L0≈8: relu shares more than gated, topk; gated shares more than topk``."""
    below: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.claimed:
            first, second = (pair.first, pair.second)[:: pair.claimed]
            below.setdefault(first, []).append(second)
    ranked = sorted(below.items(), key=lambda entry: -len(entry[1]))
    ahead = claim_phrase(pairs[0].primary)
    lines = [f"**{winner}** {ahead} than {', '.join(lost)}" for winner, lost in ranked]
    where = f"{', '.join(place)}: " if place else ""
    claims = sum(len(lost) for lost in below.values())
    told = f"{claims} of {len(pairs)} pairs{_not_excluded(pairs)}"
    return f"{where}{'; '.join(lines) or 'no difference claimed'} ({told})"


def _not_excluded(pairs: Sequence[Contrast]) -> str:
    """Say how large the differences may be that are not claimed; empty if all are."""
    last = [
        d for pair in pairs if not pair.claimed for d in pair.differences[pair.primary][-BUDGETS:]
    ]
    if not last:
        return ""
    ends = [abs(end) for d in last for end in (d.low, d.high) if end is not None]
    if len(ends) < 2 * len(last):
        return "; of the others some have no interval"
    return f"; the others may differ by up to {format_number(max(ends))}"
