"""Texts of the summary: one compact row per cell, with a caption and footnotes.

The terminal and ``summary.md`` show the same rows; only the typesetting differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import hypot, isnan, sqrt
from typing import Any

import numpy as np

from reseed.compare.cell import CellResult
from reseed.compare.pair import NO_COMMON_SPACE, WEIGHTS_NOTE
from reseed.compare.statistics import Interval, detectable_difference
from reseed.report.axes import (
    FEW,
    LEAST,
    MISSING,
    Cell,
    arm_note,
    bounds,
    columns,
    knob_values,
    label,
    number,
    varying,
)

# MERGED Tables with a row per cell, built from columns: functions from a cell to its entry.
NULL_FACTOR = 10
NOT_SHARED = f"shared at most {NULL_FACTOR} × its null: not converged or not shared"
"""A shared fraction of at most `NULL_FACTOR` times its null is marked `NOT_SHARED`. A null of 0
counts as the smallest that the simulation can detect: one latent in all its draws."""
L0_BOUND = 0.05
OFF_TARGET = f"L0 off its target by more than {L0_BOUND:.0%}"


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        header: column names; a line break where a column name may break.
        rows: as many entries each as the header.
        num_knobs: number of leading columns that name the cell; the others are numbers.
        caption: what all cells have in common.
        footnotes: explanations of the columns, and remarks about single cells.
        spare: columns that a narrow window can leave out, the least useful first.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_knobs: int
    caption: str
    footnotes: tuple[str, ...]
    spare: tuple[str, ...] = ()

    def without(self, names: Sequence[str]) -> Table:
        """Return the table without some columns."""
        keep = [i for i, name in enumerate(self.header) if name not in names]
        rows = tuple(tuple(row[i] for i in keep) for row in self.rows)
        return replace(self, header=tuple(self.header[i] for i in keep), rows=rows)


def pair_axis_name(cells: Sequence[Cell], plural: bool = True) -> str:
    """Return what the pairs differ in, in words: seeds, or values of another axis."""
    axis, *others = {cell.settings.pair_by for _, cell in cells}
    if others or not isinstance(axis, str):  # arms, or several axes
        return "runs" if plural else "run"
    if axis == "seed":
        return "seeds" if plural else "seed"
    return f"{'values' if plural else 'value'} of {axis}"


def count_text(cells: Sequence[Cell]) -> str:
    """Return ``n = 3 seeds``."""
    counts = sorted({cell.n_seeds for _, cell in cells})
    return (
        f"n = {counts[0]}"
        + (f"–{counts[-1]}" if len(counts) > 1 else "")
        + f" {pair_axis_name(cells)}"
    )


def summary(cells: Sequence[Cell]) -> Table:
    """Return the main table of a comparison."""
    knobs = columns(cells)
    seeds = (pair_axis_name(cells),) if len({cell.n_seeds for _, cell in cells}) > 1 else ()
    percent = f"[{_range(cells, lambda c: round(100 * c.settings.confidence))}%]"
    made = [_numbers(cell, cells[0][1].settings.primary, percent) for _, cell in cells]
    header = (*knobs, *seeds, *made[0])
    rows = tuple(
        (*knob_values(knobs, k), *(str(cell.n_seeds) for _ in seeds), *numbers.values())
        for (k, cell), numbers in zip(cells, made, strict=True)
    )
    arms = arm_note(cells)
    settings = cells[0][1].settings
    estimates = [cell.estimates[settings.primary] for _, cell in cells]
    seen = detectable_note(estimates, settings.primary, settings.confidence)
    footnotes = (*([arms] if arms else []), *_legend(cells), *seen, *_remarks(cells))
    spare = ("cos\nnull", "shared\nnull", "shared\ndec")
    return Table(header, rows, len(knobs), _caption(cells), footnotes, spare)


def cell_notes(cell: CellResult, knobs: Mapping[str, Any] | None = None) -> list[str]:
    """Return remarks about a cell's shared fraction and its target L0; see `NOT_SHARED` and
    `OFF_TARGET`."""
    shared = cell.estimates["shared_fraction"]
    simulated = cell.null_simulated_latents
    null = max(_null(cell), 1 / (max(1, simulated) * cell.settings.null_draws))
    # A single latent has no meaningful null.
    found = [NOT_SHARED] if simulated > 1 and shared.mean <= NULL_FACTOR * null else []
    target = re.fullmatch(r"L0≈(\d[\d.e+-]*)", str((knobs or {}).get("sparsity")))
    if target and "l0" in cell.estimates:
        l0 = cell.estimates["l0"].mean
        found += [OFF_TARGET] if abs(l0 / float(target[1]) - 1) > L0_BOUND else []
    if WEIGHTS_NOTE in cell.pairs:
        found.append(NO_COMMON_SPACE)
    elif simulated < cell.num_latents:
        found.append(f"null simulated with {simulated:,} latents, its cosine extrapolated")
    reason = cell.estimates[cell.settings.primary].reason
    return found + ([reason] if reason else [])


def with_interval(estimate: Interval) -> str:
    if estimate.low is None or estimate.high is None:
        return number(estimate.mean)
    return f"{number(estimate.mean)} {bounds(estimate.low, estimate.high)}"


def measure_name(name: str) -> str:
    """Return the column heading of a measure: ``shared\\nlive`` for `shared_fraction_live`."""
    for long, short in (("shared_fraction", "shared"), ("decoder", "dec"), ("correlation", "corr"),
                        ("coverage", "covered")):  # fmt: skip
        name = name.replace(long, short)
    first, _, rest = name.partition("_")
    return f"{first}\n{rest.replace('_', ' ')}" if rest else first


def _numbers(cell: CellResult, primary: str, percent: str) -> dict[str, str]:
    """Return column heading → number of a row, the primary measure first."""
    estimates = cell.estimates

    def mean(name: str) -> float:
        return estimates[name].mean if name in estimates else float("nan")

    l0 = mean("l0")
    strict = {f"shared\n{percent}": with_interval(estimates["shared_fraction"])}
    first = strict
    if primary != "shared_fraction":
        name = measure_name(primary).replace("\n", " ")
        first = {f"{name}\n{percent}": with_interval(estimates[primary])} | strict
    alone = ("shared_fraction_live", "shared_fraction_decoder")
    return {
        **first,
        **{measure_name(name): number(mean(name)) for name in alone if name != primary},
        "shared\nnull": null_in_words(_null(cell), cell.null_simulated_latents),
        "cos\nenc": number(mean("cosine_encoder")),
        "cos\ndec": number(mean("cosine_decoder")),
        "cos\nnull": number(cell.pair_mean("null_cosine")),
        "FVU": number(mean("fvu")),
        "L0": MISSING if isnan(l0) else f"{l0:.1f}",
        "dead": number(mean("dead_fraction")),
    }


def detectable(a: Interval, b: Interval, confidence: float) -> float | None:
    """Return the smallest difference between two estimates that is detected with 80% power
    (`statistics.detectable_difference`), on their scale; None if one has no standard error."""
    if not a.standard_error or not b.standard_error:
        return None
    units = detectable_difference(min(a.n, b.n), confidence=confidence)
    return units * hypot(a.standard_error, b.standard_error) / sqrt(2)


def detectable_note(
    estimates: Sequence[Interval], primary: str, confidence: float
) -> tuple[str, ...]:
    """Return the primary measure and the smallest difference between rows that the design could
    detect; only the former without intervals."""
    name = measure_name(primary).replace("\n", " ")
    pairs = list(combinations(estimates, 2)) or [(e, e) for e in estimates]
    seen = [x for a, b in pairs if (x := detectable(a, b, confidence)) is not None]
    if not seen:
        return (f"Primary measure: **{name}**.",)
    counts = sorted({e.n for e in estimates if e.standard_error})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    least, most = number(min(seen)), number(max(seen))
    size = least if least == most else f"{least}–{most}"
    between = "two rows" if len(estimates) > 1 else "this row and one like it"
    rows = ", depending on the rows" if size != least else ""
    return (
        f"Primary measure: **{name}**. With n = {n} the smallest difference in it between "
        f"{between} that this design could detect is {size} (80% power, {confidence:.0%} "
        f"level{rows}).",
    )


def _null(cell: CellResult) -> float:
    return cell.pair_mean("null_shared_fraction")


def null_in_words(null: float, simulated: int) -> str:
    """Return a shared fraction by chance in words; for 0, the detection limit of the simulation,
    ``< 1/4096``."""
    if null:
        return number(null) if null >= LEAST else f"{null:.1g}"
    return f"< 1/{simulated}" if simulated > 1 else MISSING


def range_text(values: Iterable[int]) -> str:
    """Return one number, or the smallest and the largest: ``1,024–4,096``."""
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,}–{found[-1]:,}"


def padded(values: np.ndarray, length: int) -> list[str]:
    """Return the values in words, padded with empty strings to ``length``."""
    return [number(float(v)) for v in values] + [""] * (length - len(values))


def _caption(cells: Sequence[Cell]) -> str:
    changing = varying(cells)
    constant = [f"{k}={v}" for k, v in cells[0][0].items() if k not in changing]
    sizes = [f"{_range(cells, lambda c: c.num_latents)} latents"]
    if any(name.endswith("num_latents") for name in cells[0][0]):
        sizes = []
    seeds = f"{_range(cells, lambda c: c.n_seeds)} {pair_axis_name(cells)}"
    return " · ".join([*constant, *sizes, seeds])


def _legend(cells: Sequence[Cell]) -> list[str]:
    settings, count = cells[0][1].settings, _range(cells, lambda c: c.n_seeds)
    one = pair_axis_name(cells, plural=False)
    interval = (
        f", with the {settings.confidence:.0%} interval over {pair_axis_name(cells)} (leave one {one} out, "
        "t distribution on the logit scale)."
    )
    if max(cell.n_seeds for _, cell in cells) < 3:
        interval = "."
    pairs = f"Mean over the {_range(cells, lambda c: len(c.pairs))} pairs"
    if max(len(cell.pairs) for _, cell in cells) == 1:
        pairs = "One pair"
    tokens = _range(cells, lambda c: c.held_out_tokens)
    return [
        "**shared**: the exact matchings by encoder and by decoder give the latent the same "
        f"partner, and both cosines are at least {settings.threshold:g} (Paulo & Belrose). "
        f"{pairs} of n = {count} {pair_axis_name(cells)}{interval}",
        f"**live**: counted over latents that fire at least {settings.live_at_least} times in "
        f"{tokens} held-out tokens, both partners live. **dec**: only the decoder's match counts; "
        "its cosine is at least the threshold.",
        "**null**: two random dictionaries of the same size, matched the same way. **cos**: mean "
        "cosine of all matched latents, by encoder and by decoder.",
        "**FVU**: fraction of variance unexplained; **L0**: active latents per token; both on "
        "held-out tokens. **dead**: fraction of latents that did not fire at the end of training.",
    ]


def _remarks(cells: Sequence[Cell]) -> list[str]:
    """Return each note once, with the cells that it is about."""
    about: dict[str, list[str]] = {}
    for knobs, cell in cells:
        for note in cell_notes(cell, knobs):
            value = f" ({cell.estimates['l0'].mean:.1f})" if note == OFF_TARGET else ""
            about.setdefault(note, []).append(label(cells, knobs) + value)
    return [
        f"**{note}**" + _which(who, len(cells), always=note == OFF_TARGET)
        for note, who in about.items()
    ]


def _which(who: Sequence[str], of: int, always: bool = False) -> str:
    """Return the cells that a note is about: by name if at most `FEW`, else their number; nothing
    if it is about all of them, unless ``always``."""
    if len(who) == of and not (always and of <= FEW):
        return ""
    if len(who) > FEW:
        return f": {len(who)} of the {of} rows (marked in column `note` of summary.csv)"
    return f": {'; '.join(who)}"


def _range(cells: Sequence[Cell], value: Callable[[CellResult], float]) -> str:
    return range_text(int(value(cell)) for _, cell in cells)


Column = Callable[[CellResult], str]
"""A function from a cell to its entry in a column."""


def cell_table(cells: Sequence[Cell], made: Mapping[str, Column], *footnotes: str) -> Table:
    """Make a table with a row per cell: the knobs that distinguish cells, then the columns.

    Args:
        made: heading → column.
    """
    knobs = columns(cells)
    rows = tuple(
        (*knob_values(knobs, k), *(column(cell) for column in made.values())) for k, cell in cells
    )
    header = (*knobs, *made)
    return Table(header, rows, len(knobs), "", footnotes)


def measured(measures: Mapping[str, str]) -> dict[str, Column]:
    """Return columns of estimates with their intervals.

    Args:
        measures: heading → name of the estimate.
    """

    def column(name: str) -> Column:
        return lambda cell: estimate_text(cell, name)

    return {head: column(name) for head, name in measures.items()}


def pair_mean(name: str) -> Column:
    """Return a column of the mean of a pair measure, without interval."""
    return lambda cell: number(cell.pair_mean(name))


def run_mean(name: str) -> Column:
    """Return a column of the mean over runs of a count, with one decimal."""

    def column(cell: CellResult) -> str:
        found = cell.estimates.get(name)
        return MISSING if found is None or isnan(found.mean) else f"{found.mean:.1f}"

    return column


def chance(name: str, drawn: bool) -> Column:
    """Return a column of a shared fraction by chance.

    Args:
        drawn: whether it comes from simulated dictionaries, so that a 0 has a limit of detection.
    """

    def column(cell: CellResult) -> str:
        mean = cell.pair_mean(name)
        if isnan(mean) or not drawn:
            return number(mean)
        return null_in_words(mean, cell.null_simulated_latents)

    return column


def kappa(rung: str, null: str) -> Column:
    """Return a column of κ against a null, with the interval of S carried over.

    Args:
        rung: ``isotropic``, ``covariance`` or ``untrained``.
        null: the pair measure with S₀.
    """
    name = "kappa" if rung == "isotropic" else f"kappa_{rung}"

    def column(cell: CellResult) -> str:
        mean, by_chance = cell.pair_mean(name), cell.pair_mean(null)
        shared = cell.estimates["shared_fraction"]
        if isnan(mean) or by_chance >= 1 or shared.low is None or shared.high is None:
            return number(mean)
        ends = [(end - by_chance) / (1 - by_chance) for end in (shared.low, shared.high)]
        return f"{number(mean)} {bounds(*ends)}"

    return column


def beside_null(name: str) -> Column:
    """Return a column of an estimate, then its null: ``0.80 [0.70, 0.90] / 0.50``."""

    def column(cell: CellResult) -> str:
        own, null = estimate_text(cell, name), cell.pair_mean(f"null_{name}")
        return own if isnan(null) else f"{own} / {number(null)}"

    return column


def estimate_text(cell: CellResult, name: str) -> str:
    """Return an estimate with its interval, or `MISSING` if the cell lacks it."""
    found: Interval | None = cell.estimates.get(name)
    return MISSING if found is None else with_interval(found)
