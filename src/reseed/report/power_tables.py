"""The question that ``reseed power`` answers, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from numbers import Real
from typing import Any

from reseed.compare.power import MOST_SEEDS, error_ratios
from reseed.compare.registry import Interval, fractions
from reseed.compare.statistics import MIN_SEEDS
from reseed.errors import ConfigError, did_you_mean
from reseed.report.cell_labels import Cell, columns, knob_values
from reseed.report.format import (
    LEAST,
    MISSING,
    format_number,
    measure_name,
    range_text,
    with_interval,
)
from reseed.report.table import Table
from reseed.system.console import format_duration

NAMED = 6
"""Most cells that a footnote names."""


@dataclass(frozen=True)
class Question:
    """The difference to be seen, and how surely.

    Attributes:
        measure: a fraction of the weights of pairs (`registry.fractions`).
        difference: true difference of two cells, on the scale of the measure.
        power: probability with which Welch's test finds it.
        confidence: level of all intervals, and of all tests together (two-sided).
        tokens: one budget or several to predict; by default `power.FURTHER` times the largest.
        differences: number m of differences that are tested together (Holm 1979).
    """

    measure: str
    difference: float = 0.05
    power: float = 0.8
    confidence: float = 0.95
    tokens: float | Sequence[float] = ()
    differences: int = 1

    def __post_init__(self) -> None:
        for key in ("confidence", "difference", "power"):
            value = getattr(self, key)
            low, words = (1 - self.confidence, "1 − confidence") if key == "power" else (0, "0")
            if not _is_number(value) or not low < value < 1:
                got = f"{value:g}" if _is_number(value) else repr(value)
                raise ConfigError(f"{{key}} must be above {words} and below 1; got {got}", key)
        known = fractions()
        if self.measure not in known:
            raise ConfigError(
                f"{{key}} must be one of the fractions {', '.join(known)}; got "
                f"{self.measure!r}.{did_you_mean(self.measure, known)}",
                "measure",
            )
        for key, values in (
            ("tokens", _listed_values(self.tokens)),
            ("differences", (self.differences,)),
        ):
            for value in values:
                if not _is_number(value) or value != value // 1:
                    raise ConfigError(f"{{key}} must be an integer; got {value!r}", key)
                if value < 1:
                    raise ConfigError(f"{{key}} must be at least 1; got {value:g}", key)

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budgets of ``tokens``."""
        return tuple(map(int, _listed_values(self.tokens)))

    @property
    def level(self) -> float:
        """Level of the first of Holm's tests, 1 − α/m: that of a test alone for m = 1."""
        return 1 - (1 - self.confidence) / self.differences


def _listed_values(given: Any) -> tuple[Any, ...]:
    """Return several values, or one."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def seeds_table(
    cells: Sequence[Cell],
    rows: Sequence[Mapping[str, Any]],
    question: Question,
    chosen: Sequence[Cell],
) -> Table:
    """Make the table of the seeds that each cell needs.

    Args:
        rows: the rows of `PowerResult.seeds`.
        chosen: cells that were left out, because the values that their runs differ in are no
            sample.
    """
    name, level = measure_name(question.measure), percent(question.confidence)
    knobs = columns(cells)
    axes = " or ".join(dict.fromkeys(cell.settings.pair_words for _, cell in cells))
    unit = "seeds" if axes == "seed" else "runs"
    header = (*knobs, "n", f"{name}\n[{level}]", "spread", f"{unit} needed\n[{level}]", "time")
    entries = tuple(
        (*knob_values(knobs, own), str(row["n_seeds"]), with_interval(_estimate(row, question)),
         _spread_text(row["spread"]), _seeds_text(row), _time(row, row["seeds_needed"]))
        for (own, _), row in zip(cells, rows, strict=True)
    )  # fmt: skip
    n = min((row["n_seeds"] for row in rows if not isnan(row["spread"])), default=MIN_SEEDS)
    low, high = error_ratios(n, question.confidence)
    footnotes = (
        f"**{unit} needed**: {unit} in this row, and as many in another of equal spread, with "
        f"which Welch's test (two-sided, {percent(question.level)} level) finds a true difference "
        f"of {question.difference:g} in {percent(question.power)} of studies; at least "
        f"{MIN_SEEDS}. For two rows of different spread the larger of their numbers suffices.",
        _correction_note(question, unit),
        f"**spread**: standard deviation per {axes}: the standard error times √n. Its estimate "
        f"from n = {n} is {low:.2f} to {high:.2f} times the true one ({level}, χ²): the interval "
        f"of the {unit} needed is for this range.",
        "Assumed: the standard error falls with 1/√n. For a mean over pairs of runs this holds "
        "to leading order. The means are taken to be normal, and the draws of two rows to be "
        "independent (seed_scope=cell, the default). Rows with the same draws, such as the same "
        "data orders or seed_scope=shared, are not.",
        "**time**: training of so many runs, at the seconds per token of the pilot, on its "
        "machine. A group's seconds are divided among its runs by tokens. Calibration and "
        "measuring are not counted.",
        *_left_out_notes(cells, rows, chosen),
    )
    caption = f"{unit} needed to see a difference of {question.difference:g} in {name}"
    return Table(header, entries, len(knobs), caption, footnotes, ("spread", "time"))


def _estimate(row: Mapping[str, Any], question: Question) -> Interval:
    """Return the estimate of a row of `PowerResult.seeds`."""
    mean, low, high = (row[question.measure + end] for end in ("", "_low", "_high"))
    return Interval(mean, low, high, None, row["n_seeds"])


def _correction_note(question: Question, unit: str) -> str:
    """Return for how many differences the seeds suffice."""
    if question.differences == 1:
        return (
            f"The {unit} are for m = 1 difference, without correction. The stars of a table with m "
            "differences are corrected (Holm 1979) and need more: --differences M."
        )
    return (
        f"The {unit} are for m = {question.differences} differences that are tested together: "
        f"{percent(question.level)} is the level of the first step of Holm's correction (1979), "
        f"which keeps {percent(question.confidence)} for all."
    )


def _left_out_notes(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], chosen: Sequence[Cell]
) -> list[str]:
    """Return footnotes that name the cells without an answer, with the reasons."""
    reasons: dict[str, list[str]] = {}
    for (knobs, _), row in zip(cells, rows, strict=True):
        if row["note"]:
            reasons.setdefault(row["note"], []).append(_name(cells, knobs))
    notes = [f"**no spread** in {_listed(names)}: {why}." for why, names in reasons.items()]
    pairs: dict[str, list[str]] = {}
    for knobs, cell in chosen:
        own = pairs.setdefault(cell.settings.pair_words, [])
        own.append(_name([*cells, *chosen], knobs))
    return notes + [
        f"**left out**: {_listed(names)}. Their pairs differ in {axes}, whose values are not a "
        "sample, so that no spread is known."
        for axes, names in pairs.items()
    ]


def _name(cells: Sequence[Cell], knobs: Mapping[str, Any]) -> str:
    """Return the name of a cell by the knobs that the tables show."""
    return ", ".join(knob_values(columns(cells), knobs)) or "all runs"


def _listed(names: Sequence[str]) -> str:
    """Return the first names, separated by semicolons, and how many others there are."""
    more = len(names) - NAMED
    return "; ".join(names[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _spread_text(spread: float) -> str:
    """Return ``0.013``: most spreads are small, so that two decimals would not do."""
    return f"{spread:.3f}" if 0.001 <= spread < 1 else format_number(spread)


def _seeds_text(row: Mapping[str, Any]) -> str:
    """Return ``9 [4, 163]``; `MISSING` without a spread."""
    if isnan(row["spread"]):
        return MISSING
    names = ("seeds_needed", "seeds_needed_low", "seeds_needed_high")
    best, low, high = (f">{MOST_SEEDS:,}" if row[n] is None else f"{row[n]:,}" for n in names)
    return f"{best} [{low}, {high}]"


def _time(row: Mapping[str, Any], runs: int | None) -> str:
    if runs is None or isnan(row["seconds_per_run"]):
        return MISSING
    return format_duration(runs * row["seconds_per_run"])


def budgets_table(
    knobs: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[tuple[str, ...], Sequence[Cell]],
    used: Mapping[tuple[str, ...], Sequence[Cell]],
    question: Question,
) -> Table:
    """Make the table of the predictions.

    Args:
        knobs: names of the knobs that distinguish curves.
        rows: the rows of `PowerResult.budgets`.
        curves: the values of ``knobs`` → the cells of each curve, ascending.
        used: the curves that were fitted → their cells with a standard error.
    """
    name, level = measure_name(question.measure), percent(question.confidence)
    header = (*knobs, "tokens", "from", f"predicted\n[{level}]", "measured", "within", "one run")
    entries = tuple(
        (*(row[knob] for knob in knobs), f"{row['tokens']:,}", f"{row['fitted']} budgets",
         f"{_fraction(row['predicted'])} "
         f"[{_bound(row['predicted_low'])}, {_bound(row['predicted_high'])}]",
         format_number(row["measured"]), {None: "", True: "yes", False: "no"}[row["within"]],
         _time(row, 1))
        for row in rows
    )  # fmt: skip
    counts = range_text(row["n_seeds"] for row in rows)
    footnotes = [
        *_check_note(rows),
        f"**predicted**: mean over n = {counts} seeds at this budget. Logit S is taken to be a "
        "line in log tokens (it grows with every doubling), in 1/tokens (it levels off) or "
        "between, weighted by how well each fits. The interval contains those of all curves that "
        "fit about as well as the best, the sampling errors of the fitted budgets and of the "
        "predicted one, and, from three fitted budgets on, their scatter about the curve. It does "
        "not contain curves of another shape.",
    ]
    if any(row["fitted"] == 2 for row in rows):
        footnotes.append(
            "Two budgets fit all of these curves equally well: the interval **from 2 budgets** "
            "reaches from the lowest end of all to the highest."
        )
    footnotes += _curve_notes(curves, used, question.measure)
    caption = f"{name} at other budgets, from the curve over training.tokens"
    return Table(header, entries, len(knobs) + 1, caption, tuple(footnotes), ("one run", "from"))


def _check_note(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    checks = [row["within"] for row in rows if row["within"] is not None]
    if not checks:
        return []
    return [
        f"**Check**: the smaller budgets predict the largest within the interval in "
        f"{sum(checks)} of {len(checks)} curves. A wide interval holds much: this does not show "
        "that the curve is right."
    ]


def _curve_notes(
    curves: Mapping[tuple[str, ...], Sequence[Cell]],
    used: Mapping[tuple[str, ...], Sequence[Cell]],
    measure: str,
) -> list[str]:
    """Return footnotes on the curves that were not fitted or not checked, and on the budgets that
    are in no curve."""
    names = {place: ", ".join(place) or "all runs" for place in curves}
    notes, reasons = [], {}
    short = [names[place] for place in curves if place not in used]
    if short:
        notes.append(
            f"**no curve** for {_listed(short)}: fewer than 3 budgets with a standard error."
        )
    for place, cells in used.items():
        if cells[-1] is not curves[place][-1]:
            largest = curves[place][-1][0]["tokens"]
            notes.append(
                f"**no check** for {names[place]}: its largest budget, {largest} tokens, has no "
                "standard error."
            )
        for cell in curves[place]:
            if not any(cell is one for one in cells):
                why = cell[1].estimates[measure].reason or "the pairs do not differ"
                text = f"{names[place]}, {cell[0]['tokens']} tokens"
                reasons.setdefault(why, []).append(text)
    return notes + [f"**not fitted**: {_listed(own)}: {why}." for why, own in reasons.items()]


def _fraction(value: float) -> str:
    """Return a predicted fraction, which is never 1: as `format_number`, but with three decimals
    where two would make it 1, and ``> 0.999`` above 1 − `LEAST`."""
    if value < 0.995:
        return format_number(value)
    return f"{value:.3f}" if value < 1 - LEAST / 2 else f"> {1 - LEAST}"


def _bound(value: float) -> str:
    """Return `_fraction` without a space, so that no line breaks within it."""
    return _fraction(value).replace(" ", "")


def percent(level: float) -> str:
    """Return ``95%``, ``99.5%``."""
    return f"{100 * level:.4g}%"
