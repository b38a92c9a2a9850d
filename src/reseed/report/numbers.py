"""Numbers in tables and on the terminal."""

from __future__ import annotations

from math import isnan

MISSING = "–"
"""What stands for a value that is not there."""
LEAST = 0.001
"""Smaller numbers are said to be below it."""


def number(value: float) -> str:
    """Two decimals, or one digit where these would show nothing; not below `LEAST`."""
    if isnan(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < LEAST:
        return f"< {LEAST}" if value > 0 else f"> -{LEAST}"
    return f"{value:.2f}" if abs(value) >= 0.00995 else f"{value:.1g}"


def bounds(low: float, high: float) -> str:
    """``[0.30, 0.52]``; a bound is one word, so that no line breaks within it."""
    return "[" + ", ".join(number(bound).replace(" ", "") for bound in (low, high)) + "]"
