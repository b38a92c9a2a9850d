"""The smallest difference between the rows of a table that its design could detect."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import numpy as np

from reseed.compare.power import error_ratios, visible_difference
from reseed.compare.registry import Interval
from reseed.report.format import format_number, measure_name

_ANGLES = np.linspace(0, pi / 2, 33)
"""Ratios of two standard errors, as arctan: between them the smallest visible difference is
interpolated, to 1% of itself."""


def detectable_difference(
    a: Interval, b: Interval, confidence: float, tested: int = 1
) -> float | None:
    """Return the smallest difference between two estimates that Welch's test finds with 80% power
    (`power.visible_difference`), on their scale; None if one has no standard error. It is rough,
    because the estimated standard errors stand for the true ones.

    Args:
        tested: number of differences that are corrected together; the level is that of Holm's first
            step, α/m.
    """
    if not a.standard_error or not b.standard_error:
        return None
    level = 1 - (1 - confidence) / tested
    return visible_difference(a.n, b.n, a.standard_error, b.standard_error, confidence=level)


def detectable_range(
    estimates: Sequence[Interval], confidence: float, tested: int = 1
) -> tuple[float, float] | None:
    """Return the smallest and the largest `detectable_difference` over all pairs of the estimates;
    of a single estimate, that from one like it; None if there is none.

    The difference divided by √(SE² + SE²) depends only on the ratio of the standard errors and on
    the numbers of seeds. It is interpolated for all pairs, and computed for the chosen two.
    """
    known = sorted((e for e in estimates if e.standard_error), key=lambda e: e.n)
    if not known or len(known) < min(2, len(estimates)):
        return None
    known = known if len(known) > 1 else known * 2
    one, other = np.triu_indices(len(known), 1)
    errors = np.array([e.standard_error for e in known])
    seeds = np.array([e.n for e in known])
    angles = np.arctan2(errors[other], errors[one])
    sizes = np.hypot(errors[one], errors[other])
    level = 1 - (1 - confidence) / tested
    numbers = np.stack([seeds[one], seeds[other]])
    for n, m in np.unique(numbers, axis=1).T:
        at = (numbers[0] == n) & (numbers[1] == m)
        curve = [visible_difference(n, m, np.cos(x), np.sin(x), confidence=level) for x in _ANGLES]
        sizes[at] *= np.interp(angles[at], _ANGLES, curve)
    least, most = (
        detectable_difference(known[one[i]], known[other[i]], confidence, tested)
        for i in (sizes.argmin(), sizes.argmax())
    )
    assert least is not None
    assert most is not None
    return least, most


def detectable_note(
    estimates: Sequence[Interval],
    primary: str,
    confidence: float,
    tested: int = 1,
    *,
    share_draws: bool = False,
) -> tuple[str, ...]:
    """Return a footnote: the primary measure, and, if there are intervals, the smallest difference
    between rows that the design could detect.

    Args:
        tested: number of differences that are corrected together.
        share_draws: whether some rows have the same random draws (`difference.share_draws`).
    """
    name = f"Primary measure: **{measure_name(primary)}**."
    found = detectable_range(estimates, confidence, tested)
    if found is None:
        return (name,)
    least, most = map(format_number, found)
    size = least if least == most else f"{least}–{most}"
    between = "two rows" if len(estimates) > 1 else "this row and one like it"
    rows = ", depending on the rows" if size != least else ""
    alpha = f"{1 - confidence:.3g}".removeprefix("0")
    test = f"for one difference, {confidence:.0%} level"
    if tested > 1:
        test = f"for one of m = {tested} corrected differences, level {alpha}/{tested}"
    n = min(e.n for e in estimates if e.standard_error)
    low, high = error_ratios(n, confidence)
    same = (
        " It is for rows with draws of their own; some rows here have the same initial weights or "
        "data orders, and the intervals of their differences are paired."
    )
    return (
        f"{name} The smallest difference in this measure between {between} that this design could "
        f"detect is roughly {size} (80% power of Welch's test {test}{rows}). Roughly, because a "
        f"standard error that is estimated from {n} seeds lies between {low:.2f} and {high:.2f} of "
        f"the true one ({confidence:.0%}).{same if share_draws else ''}",
    )
