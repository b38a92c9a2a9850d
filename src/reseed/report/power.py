"""Seeds and tokens that a comparison needs, from a pilot: the result of ``reseed power``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from math import isnan, nan, sqrt
from typing import Any

import pandas as pd
from rich.console import Console

from reseed.compare.power import MOST_SEEDS, error_ratios, predict_budget, seeds_needed
from reseed.compare.registry import Interval, fractions
from reseed.compare.statistics import MIN_SEEDS
from reseed.errors import ConfigError, ReseedError, did_you_mean
from reseed.report.cell_labels import (
    Cell,
    amounts,
    columns,
    distinguishing_knobs,
    knob_values,
    other_knob_values,
)
from reseed.report.format import (
    MISSING,
    format_bounds,
    format_number,
    measure_name,
    range_text,
    with_interval,
)
from reseed.report.page.render import table_html
from reseed.report.table import Table
from reseed.report.terminal import print_tables
from reseed.system.console import format_duration

MIN_BUDGETS = 3
"""Minimum number of budgets for a curve: two smaller ones predict the largest."""
FURTHER = (2, 4)
"""Budgets that are predicted by default, as multiples of the largest."""


@dataclass(frozen=True)
class Question:
    """The difference to be seen, and how surely.

    Attributes:
        measure: a fraction of the weights of pairs (`registry.fractions`).
        difference: true difference of two cells, on the scale of the measure.
        power: probability with which Welch's test finds it.
        confidence: level of the test (two-sided) and of all intervals.
        tokens: budgets to predict; by default `FURTHER` times the largest.
    """

    measure: str
    difference: float = 0.05
    power: float = 0.8
    confidence: float = 0.95
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key, low in (("confidence", 0.0), ("difference", 0.0), ("power", 1 - self.confidence)):
            value = getattr(self, key)
            if not low < value < 1:
                words = "1 − confidence" if key == "power" else "0"
                raise ConfigError(f"{{key}} must be above {words} and below 1; got {value:g}", key)
        known = fractions()
        if self.measure not in known:
            raise ConfigError(
                f"{{key}} must be one of the fractions {', '.join(known)}; got "
                f"{self.measure!r}.{did_you_mean(self.measure, known)}",
                "measure",
            )
        for budget in self.tokens:
            if budget < 1:
                raise ConfigError(f"{{key}} must be at least 1; got {budget}", "tokens")


@dataclass(frozen=True, eq=False)
class PowerResult:
    """Seeds and tokens that a comparison needs; `print` shows it, and so does a notebook.

    Attributes:
        question: the difference to be seen.
        seeds: a row per cell: its settings, ``n_seeds`` of the pilot, the measure with its
            interval, ``spread`` (standard deviation per seed), ``seeds_needed`` with the interval
            that the uncertain spread gives, ``seconds_per_run``, and ``note``, the reason where
            there is no answer.
        budgets: a row per prediction: the settings of the curve, ``tokens``, ``fitted`` (number of
            budgets that the curve was fitted to), ``predicted`` with its interval,
            ``seconds_per_run``; for the check, the largest budget predicted from the smaller ones,
            also ``measured`` and ``within``. Empty if no curve has `MIN_BUDGETS` budgets.
        tables: both as text, with what they assume.
    """

    question: Question
    seeds: pd.DataFrame
    budgets: pd.DataFrame
    tables: tuple[Table, ...] = field(repr=False)

    def __str__(self) -> str:
        """Return the tables as text of at most 100 columns."""
        text = StringIO()
        print_tables(self.tables, console=Console(file=text, width=100))
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        return "".join(map(table_html, self.tables))


def power_result(
    cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]], question: Question
) -> PowerResult:
    """Compute the seeds that each cell needs, and predict the measure at other budgets.

    Args:
        cells: the compared cells of a pilot.
        records: run id → its record, for the seconds that it took.

    Raises:
        ReseedError: no cell has three seeds, runs of a pair differ in more than the seed, or the
            cells were compared without the measure.
        ConfigError: budgets were given, but no curve has `MIN_BUDGETS` budgets.
    """
    sample = [(knobs, cell) for knobs, cell in cells if cell.settings.pairs_are_a_sample]
    if not sample:
        raise ReseedError(
            f"the runs of a pair differ in {cells[0][1].settings.pair_words}, whose values are not "
            "a sample: the seeds that a difference needs follow from pairs that differ only in the "
            "seed (comparison.pair_by=seed)"
        )
    if any(question.measure not in cell.estimates for _, cell in sample):
        raise ReseedError(
            f"this comparison was not measured with {question.measure}: compare again (reseed "
            "compare)"
        )
    most = max(cell.n_seeds for _, cell in sample)
    if most < MIN_SEEDS:
        raise ReseedError(
            f"a spread needs at least {MIN_SEEDS} seeds in a cell, and the pilot has {most}. "
            "Train more, for example seed=0,1,2"
        )
    seconds = run_seconds(records)
    needed = [_seeds_row(knobs, cell, question, seconds) for knobs, cell in sample]
    curves = _curves(sample, question.measure)
    if question.tokens and not any(len(curve) >= MIN_BUDGETS for curve in curves.values()):
        raise ConfigError(
            f"{{key}} needs a curve over at least {MIN_BUDGETS} budgets (training.tokens) with "
            "intervals, and the pilot has none",
            "tokens",
        )
    names = _place_knobs(sample)
    predicted = [
        row
        for place, curve in curves.items()
        if len(curve) >= MIN_BUDGETS
        for row in _budget_rows(dict(zip(names, place, strict=True)), curve, question, seconds)
    ]
    tables = [_seeds_table(sample, needed, question)]
    if predicted:
        tables.append(_budgets_table(sample, predicted, curves, question))
    return PowerResult(question, pd.DataFrame(needed), pd.DataFrame(predicted), tuple(tables))


def run_seconds(records: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return each run's share of the seconds that its group trained, in proportion to its tokens.

    Runs of one group have recorded the same seconds and number of runs. Those of the group that are
    not among the records are taken to have as many tokens, on average, as those that are. Runs that
    were not trained here are left out.
    """
    groups: dict[tuple[float, int], dict[str, int]] = {}
    for run, record in records.items():
        timings = record.get("timings") or {}
        if not record.get("pretrained") and timings.get("training_s") and record.get("tokens"):
            key = (timings["training_s"], timings.get("group_runs", 1))
            groups.setdefault(key, {})[run] = record["tokens"]
    return {
        run: seconds * len(group) / of * tokens / sum(group.values())
        for (seconds, of), group in groups.items()
        for run, tokens in group.items()
    }


def _seeds_row(
    knobs: Mapping[str, Any], cell: Any, question: Question, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return a row of `PowerResult.seeds`."""
    found: Interval = cell.estimates[question.measure]
    took = [seconds[run] for run in cell.runs["run"] if run in seconds]
    row: dict[str, Any] = {
        **knobs, "n_seeds": cell.n_seeds, question.measure: found.mean,
        f"{question.measure}_low": found.low, f"{question.measure}_high": found.high,
    }  # fmt: skip
    spread, note = nan, found.reason
    ends: list[int | None] = [None] * 3
    if found.standard_error:
        spread = found.standard_error * sqrt(found.n)
        low, high = error_ratios(found.n, question.confidence)
        ends = [
            seeds_needed(spread * factor, question.difference, question.power, question.confidence)
            for factor in (1, 1 / high, 1 / low)
        ]
    elif not note:
        note = "the pairs do not differ: no spread is known"
    names = ("seeds_needed", "seeds_needed_low", "seeds_needed_high")
    row |= {"spread": spread, **dict(zip(names, ends, strict=True))}
    return row | {"seconds_per_run": sum(took) / len(took) if took else nan, "note": note}


def _place_knobs(cells: Sequence[Cell]) -> list[str]:
    """Return the knobs that distinguish curves over budgets."""
    return [knob for knob in distinguishing_knobs(cells) if knob != "tokens"]


def _curves(cells: Sequence[Cell], measure: str) -> dict[tuple[str, ...], list[Cell]]:
    """Return the cells of each curve over budgets, ascending, by the other knobs that vary; only
    cells whose estimate has a standard error."""
    if "tokens" not in distinguishing_knobs(cells):
        return {}
    try:
        budgets = amounts(cells, "tokens")
    except ValueError:  # pairs of runs of different budgets
        return {}
    found: dict[tuple[str, ...], list[tuple[float, Cell]]] = {}
    for place, budget, cell in zip(other_knob_values(cells, "tokens"), budgets, cells, strict=True):
        curve = found.setdefault(place, [])
        if cell[1].estimates[measure].standard_error:
            curve.append((budget, cell))
    return {
        place: [cell for _, cell in sorted(curve, key=lambda entry: entry[0])]
        for place, curve in found.items()
    }


def _budget_rows(
    place: Mapping[str, str],
    curve: Sequence[Cell],
    question: Question,
    seconds: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return the rows of one curve: the largest budget from the smaller ones, then others.

    Args:
        place: value of each other knob that varies.
    """
    tokens = amounts(curve, "tokens")
    estimates = [cell.estimates[question.measure] for _, cell in curve]
    took = [
        (seconds[run], budget)
        for budget, (_, cell) in zip(tokens, curve, strict=True)
        for run in cell.runs["run"]
        if run in seconds
    ]
    rate = sum(s for s, _ in took) / sum(b for _, b in took) if took else nan

    def row(budget: float, fitted: int, measured: Interval | None = None) -> dict[str, Any]:
        found = predict_budget(tokens[:fitted], estimates[:fitted], budget, question.confidence)
        assert found.low is not None
        assert found.high is not None
        return {
            **place, "tokens": round(budget), "fitted": fitted, "n_seeds": found.n,
            "predicted": found.mean, "predicted_low": found.low, "predicted_high": found.high,
            "measured": measured.mean if measured else nan,
            "within": found.low <= measured.mean <= found.high if measured else None,
            "seconds_per_run": rate * budget,
        }  # fmt: skip

    further = question.tokens or [factor * tokens[-1] for factor in FURTHER]
    check = row(tokens[-1], len(tokens) - 1, estimates[-1])
    return [check, *(row(budget, len(tokens)) for budget in further)]


def _seeds_table(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], question: Question
) -> Table:
    name, level = measure_name(question.measure), f"{question.confidence:.0%}"
    knobs = columns(cells)
    found = [cell.estimates[question.measure] for _, cell in cells]
    header = (*knobs, "n", f"{name}\n[{level}]", "spread", f"seeds needed\n[{level}]", "time")
    entries = tuple(
        (*knob_values(knobs, own), str(row["n_seeds"]), with_interval(estimate),
         _spread_text(row["spread"]), _seeds_text(row), _time(row, row["seeds_needed"]))
        for (own, _), estimate, row in zip(cells, found, rows, strict=True)
    )  # fmt: skip
    n = min((row["n_seeds"] for row in rows if not isnan(row["spread"])), default=MIN_SEEDS)
    low, high = error_ratios(n, question.confidence)
    reasons = dict.fromkeys(str(row["note"]) for row in rows if row["note"])
    footnotes = (
        f"**seeds needed**: seeds in this row, and as many in another of equal spread, with which "
        f"Welch's test (two-sided, {level} level) finds a true difference of "
        f"{question.difference:g} in {question.power:.0%} of studies; at least {MIN_SEEDS}. For "
        "two rows of different spread the larger of their numbers suffices.",
        f"**spread**: standard deviation per seed: the standard error times √n. Its estimate from "
        f"n = {n} seeds is {low:.2f} to {high:.2f} times the true one ({level}, χ²): the interval "
        "of the seeds needed is for this range.",
        "Assumed: the standard error falls with 1/√n. For a mean over pairs of seeds this holds "
        "to leading order. The means are taken to be normal.",
        "**time**: training of so many runs, at the seconds per token of the pilot, on its "
        "machine. A group's seconds are divided among its runs by tokens. Calibration and "
        "measuring are not counted.",
        *(f"**{reason}**" for reason in reasons),
    )
    caption = f"seeds needed to see a difference of {question.difference:g} in {name}"
    return Table(header, entries, len(knobs), caption, footnotes, ("spread",))


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


def _budgets_table(
    cells: Sequence[Cell],
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[tuple[str, ...], Sequence[Cell]],
    question: Question,
) -> Table:
    name, level = measure_name(question.measure), f"{question.confidence:.0%}"
    knobs = _place_knobs(cells)
    header = (*knobs, "tokens", "from", f"predicted\n[{level}]", "measured", "within", "one run")
    entries = tuple(
        (*(row[knob] for knob in knobs), f"{row['tokens']:,}", f"{row['fitted']} budgets",
         f"{format_number(row['predicted'])} "
         f"{format_bounds(row['predicted_low'], row['predicted_high'])}",
         format_number(row["measured"]), {None: "", True: "yes", False: "no"}[row["within"]],
         _time(row, 1))
        for row in rows
    )  # fmt: skip
    checks = [row["within"] for row in rows if row["within"] is not None]
    counts = range_text(row["n_seeds"] for row in rows)
    footnotes = [
        f"**Check**: the smaller budgets predict the largest within the interval in "
        f"{sum(checks)} of {len(checks)} curves. A wide interval holds much: this does not show "
        "that the curve is right.",
        f"**predicted**: mean over n = {counts} seeds at this budget. Logit S is taken to be a "
        "line in log tokens (it grows with every doubling), in 1/tokens (it levels off) or "
        "between, weighted by how well each fits. The interval contains this choice, the sampling "
        "errors of the fitted budgets and of the predicted one, and, from three fitted budgets "
        "on, their scatter about the curve. It does not contain curves of another shape.",
    ]
    if any(row["fitted"] == 2 for row in rows):
        footnotes.append(
            "Two budgets fit all of these curves, so **from 2 budgets** all have the same weight."
        )
    short = [", ".join(place) for place, curve in curves.items() if len(curve) < MIN_BUDGETS]
    if short:
        footnotes.append(
            f"**no curve** for {'; '.join(short)}: fewer than {MIN_BUDGETS} budgets with a "
            "standard error."
        )
    caption = f"{name} at other budgets, from the curve over training.tokens"
    return Table(header, entries, len(knobs) + 1, caption, tuple(footnotes), ("one run",))
