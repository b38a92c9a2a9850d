"""Format of numbers in tables and on the terminal."""

from __future__ import annotations

from math import isnan

MISSING = "–"
"""Sign for a missing value."""
LEAST = 0.001
"""Smaller numbers are shown as below this."""


def number(value: float) -> str:
    """Format with two decimals, or with one digit if these would be 0; ``< 0.001`` below
    `LEAST`."""
    if isnan(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < LEAST:
        return f"< {LEAST}" if value > 0 else f"> -{LEAST}"
    return f"{value:.2f}" if abs(value) >= 0.00995 else f"{value:.1g}"


def bounds(low: float, high: float) -> str:
    """Return ``[0.30, 0.52]``; bounds contain no space, so that no line breaks within one."""
    return "[" + ", ".join(number(bound).replace(" ", "") for bound in (low, high)) + "]"
