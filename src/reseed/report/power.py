"""Seeds and tokens that a comparison needs, from a pilot: the result of ``reseed power``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from math import nan, sqrt
from typing import Any

import pandas as pd
from rich.console import Console

from reseed.compare.power import error_ratios, predict_budget, seeds_needed
from reseed.compare.registry import Interval
from reseed.compare.statistics import MIN_SEEDS, at_level
from reseed.errors import ConfigError, ReseedError
from reseed.report.cell_labels import Cell, amounts, distinguishing_knobs, other_knob_values
from reseed.report.page.render import table_html
from reseed.report.power_tables import Question, budgets_table, seeds_table
from reseed.report.table import Table
from reseed.report.terminal import print_tables

MIN_BUDGETS = 3
"""Minimum number of budgets for a curve: two smaller ones predict the largest."""
FURTHER = (2, 4)
"""Budgets that are predicted by default, as multiples of the largest that was trained."""
FARTHEST = 100
"""Most that a predicted budget may exceed the largest of the pilot, or be below the smallest."""


@dataclass(frozen=True, eq=False)
class PowerResult:
    """Seeds and tokens that a comparison needs; `print` shows it, and so does a notebook.

    Attributes:
        question: the difference to be seen.
        seeds: a row per cell: its settings, ``n_seeds`` of the pilot, the measure with its
            interval at the question's level, ``spread`` (standard deviation per seed),
            ``seeds_needed`` with the interval that the uncertain spread gives,
            ``seconds_per_run``, and ``note``, the reason where there is no answer.
        budgets: a row per prediction: the settings of the curve, ``tokens``, ``fitted`` (number of
            budgets that the curve was fitted to), ``predicted`` with its interval,
            ``seconds_per_run``; for the check, the largest budget predicted from the smaller ones,
            also ``measured`` and ``within``. Empty if no curve has `MIN_BUDGETS` budgets with a
            standard error.
        tables: both as text, with what they assume.
    """

    question: Question
    seeds: pd.DataFrame
    budgets: pd.DataFrame
    tables: tuple[Table, ...] = field(repr=False)

    def __str__(self) -> str:
        """Return the tables as text of at most 100 columns."""
        text = StringIO()
        print_tables(self.tables, console=Console(file=text, width=100), whole=True)
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
        ConfigError: budgets were given, but no curve has `MIN_BUDGETS` budgets, or one of them is
            farther than `FARTHEST` from the pilot's.
    """
    sample = _sample(cells, question.measure)
    seconds = run_seconds(records)
    needed = [_seeds_row(knobs, cell, question, seconds) for knobs, cell in sample]
    curves = _curves(sample)
    used = {
        place: with_error
        for place, curve in curves.items()
        if len(with_error := _with_error(curve, question.measure)) >= MIN_BUDGETS
    }
    _check_budgets(question.budgets, curves if used else {})
    names = [knob for knob in distinguishing_knobs(sample) if knob != "tokens"]
    predicted = [
        row
        for place, curve in used.items()
        for row in _budget_rows(
            dict(zip(names, place, strict=True)), curve, curves[place], question, seconds
        )
    ]
    chosen = [cell for cell in cells if not cell[1].settings.pairs_are_a_sample]
    tables = [seeds_table(sample, needed, question, chosen)]
    if predicted:
        tables.append(budgets_table(names, predicted, curves, used, question))
    elif curves:
        none = (
            f"**Other budgets** are not predicted: no row has {MIN_BUDGETS} budgets with a "
            "standard error."
        )
        tables[0] = replace(tables[0], footnotes=(*tables[0].footnotes, none))
    return PowerResult(question, pd.DataFrame(needed), pd.DataFrame(predicted), tuple(tables))


def _sample(cells: Sequence[Cell], measure: str) -> list[Cell]:
    """Return the cells whose pairs differ in a random axis; see `power_result` for the errors."""
    sample = [(knobs, cell) for knobs, cell in cells if cell.settings.pairs_are_a_sample]
    if not sample:
        raise ReseedError(
            f"the runs of a pair differ in {cells[0][1].settings.pair_words}, whose values are not "
            "a sample: the seeds that a difference needs follow from pairs that differ only in the "
            "seed (comparison.pair_by=seed)"
        )
    if any(measure not in cell.estimates for _, cell in sample):
        raise ReseedError(
            f"this comparison was not measured with {measure}: compare again (reseed compare)"
        )
    most = max(cell.n_seeds for _, cell in sample)
    if most < MIN_SEEDS:
        raise ReseedError(
            f"a spread needs at least {MIN_SEEDS} seeds in a cell, and the pilot has {most}. "
            "Train more, for example seed=0,1,2"
        )
    return sample


def _check_budgets(
    budgets: Sequence[int], curves: Mapping[tuple[str, ...], Sequence[Cell]]
) -> None:
    """Check that budgets can be predicted from the curves; see `power_result`."""
    if budgets and not curves:
        raise ConfigError(
            f"{{key}} needs a curve over at least {MIN_BUDGETS} budgets (training.tokens) with "
            "intervals, and the pilot has none",
            "tokens",
        )
    trained = [budget for curve in curves.values() for budget in amounts(curve, "tokens")]
    for budget in budgets:
        low, high = min(trained), max(trained)
        if not low / FARTHEST <= budget <= high * FARTHEST:
            raise ConfigError(
                f"{{key}} must be at most {FARTHEST} times the largest budget of the pilot and at "
                f"least a {FARTHEST}th of its smallest, {low / FARTHEST:,.0f} to "
                f"{high * FARTHEST:,.0f}; got {budget:,}",
                "tokens",
            )


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
    found: Interval = at_level(cell.estimates[question.measure], question.confidence, "logit")
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
            seeds_needed(spread * factor, question.difference, question.power, question.level)
            for factor in (1, 1 / high, 1 / low)
        ]
    elif not note:
        note = "the pairs do not differ: no spread is known"
    names = ("seeds_needed", "seeds_needed_low", "seeds_needed_high")
    row |= {"spread": spread, **dict(zip(names, ends, strict=True))}
    return row | {"seconds_per_run": sum(took) / len(took) if took else nan, "note": note}


def _curves(cells: Sequence[Cell]) -> dict[tuple[str, ...], list[Cell]]:
    """Return the cells of each curve over budgets, ascending, by the other knobs that vary."""
    if "tokens" not in distinguishing_knobs(cells):
        return {}
    try:
        budgets = amounts(cells, "tokens")
    except ValueError:  # pairs of runs of different budgets
        return {}
    found: dict[tuple[str, ...], list[tuple[float, Cell]]] = {}
    for place, budget, cell in zip(other_knob_values(cells, "tokens"), budgets, cells, strict=True):
        found.setdefault(place, []).append((budget, cell))
    return {
        place: [cell for _, cell in sorted(curve, key=lambda entry: entry[0])]
        for place, curve in found.items()
    }


def _with_error(curve: Sequence[Cell], measure: str) -> list[Cell]:
    """Return the cells whose estimate has a standard error above 0."""
    return [cell for cell in curve if cell[1].estimates[measure].standard_error]


def _budget_rows(
    place: Mapping[str, str],
    curve: Sequence[Cell],
    trained: Sequence[Cell],
    question: Question,
    seconds: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return the rows of one curve: the largest budget from the smaller ones, then others.

    Args:
        place: value of each other knob that varies.
        curve: the cells with a standard error.
        trained: all cells of the curve. Without a standard error of the largest budget there is no
            check.
    """
    tokens, largest = amounts(curve, "tokens"), amounts(trained, "tokens")[-1]
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

    further = question.budgets or [factor * largest for factor in FURTHER]
    rows = [row(budget, len(tokens)) for budget in further]
    if tokens[-1] < largest:
        return rows
    return [row(tokens[-1], len(tokens) - 1, estimates[-1]), *rows]
