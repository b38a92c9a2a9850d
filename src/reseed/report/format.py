"""Numbers, intervals and names as text, for tables, the terminal and figures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isnan

import numpy as np

from reseed.compare.registry import Interval, find

MISSING = "–"
"""Sign for a missing value."""
LEAST = 0.001
"""Positive numbers smaller than this are shown as ``< 0.001``."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
    """Replace line breaks and control characters by spaces.

    A line break in a name could begin a new paragraph. A control character could command the
    terminal, end an SVG or LaTeX file, or reverse the text that follows it.
    """
    return _CONTROL.sub(" ", text)


def format_number(value: float) -> str:
    """Format with two decimals, or with one significant digit if these would be 0; ``< 0.001``
    below `LEAST`."""
    if isnan(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < LEAST:
        return f"< {LEAST}" if value > 0 else f"> -{LEAST}"
    return f"{value:.2f}" if abs(value) >= 0.00995 else f"{value:.1g}"


def format_bounds(low: float, high: float) -> str:
    """Return ``[0.30, 0.52]``; bounds contain no space, so that no line breaks within one."""
    return "[" + ", ".join(format_number(bound).replace(" ", "") for bound in (low, high)) + "]"


def range_text(values: Iterable[int]) -> str:
    """Return one number, or the smallest and the largest: ``1,024–4,096``."""
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,}–{found[-1]:,}"


def padded(values: np.ndarray, length: int) -> list[str]:
    """Return the values as text, padded with empty strings to ``length``."""
    return [format_number(float(v)) for v in values] + [""] * (length - len(values))


def with_interval(estimate: Interval) -> str:
    """Return ``0.42 [0.30, 0.52]``, or the mean alone if there is no interval."""
    if estimate.low is None or estimate.high is None:
        return format_number(estimate.mean)
    return f"{format_number(estimate.mean)} {format_bounds(estimate.low, estimate.high)}"


def signed(difference: Interval) -> str:
    """Return ``+0.12 [0.05, 0.19] *``, with a star if the interval excludes 0."""
    mean = format_number(difference.mean)
    text = f"+{mean}" if difference.mean >= LEAST else mean
    if difference.low is None or difference.high is None:
        return text
    star = " *" if interval_sign(difference) else ""
    return f"{text} {format_bounds(difference.low, difference.high)}{star}"


def holm_note(counts: Iterable[int], confidence: float) -> str:
    """Explain the stars of a table whose differences were corrected by `holm_intervals`.

    Args:
        counts: number of tested differences of each measure.
    """
    tested = range_text([count for count in counts if count] or [0])
    level = f"{1 - confidence:.3g}".removeprefix("0")
    corrected = (
        f"Intervals and stars are corrected for the m = {tested} differences of a measure in this "
        f"table (Holm 1979): any false star among them has a probability of at most {level}. "
    )
    return (
        f"* if the interval excludes 0. {corrected if tested not in ('0', '1') else ''}"
        "An interval that includes 0 does not show that there is no difference: it excludes only "
        "differences beyond its ends."
    )


def interval_sign(difference: Interval) -> int:
    """Return 1 or −1 if the interval lies above or below 0, else 0."""
    if difference.low is None or difference.high is None:
        return 0
    return int(difference.low > 0) - int(difference.high < 0)


def null_text(null: float, simulated: int) -> str:
    """Return the null of a shared fraction as text; for 0, the detection limit of the simulation,
    ``< 1/4096``."""
    if null:
        return format_number(null) if null >= LEAST else f"{null:.1g}"
    return f"< 1/{simulated}" if simulated > 1 else MISSING


def measure_heading(name: str) -> str:
    """Return the heading of a measure, wrapped after its first word: ``shared\\nlive``."""
    found = find(name)
    words = found[1].heading if found and found[1].heading else name.replace("_", " ")
    first, _, rest = words.partition(" ")
    return f"{first}\n{rest}" if rest else first


def measure_name(name: str) -> str:
    """Return `measure_heading` on one line: ``shared live``."""
    return measure_heading(name).replace("\n", " ")


def interval_row(name: str, found: Interval | None) -> dict[str, float | None]:
    """Return the columns of an estimate in a csv file: ``name``, ``name_low``, ``name_high``."""
    ends = (found.mean, found.low, found.high) if found else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
