"""Pairs of runs grouped by the axes in which they differ, with intervals only over seeds.

Seeds are a sample; layers and architectures are not. A mean over pairs of runs that differ only in
the seed has an interval over seeds (`statistics.seed_interval`). If the runs of pairs differ in a
chosen value (layer, width, architecture), their mean over a cell has no interval: four layers are
not a sample of layers. But each *pair of values*, such as layer 1 with layer 2, has an interval
over the seeds that both were trained with. For these intervals, `pair_groups` pools the cells that
differ only in the seed. If both the seed and the data order vary, the intervals are over both, and
need every combination (`statistics.crossed_interval`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from reseed.compare.config import REPLICATES, ComparisonConfig, pair_axes, value_axes
from reseed.compare.registry import Interval
from reseed.compare.statistics import (
    MIN_SEEDS,
    NO_SPREAD,
    crossed_interval,
    is_constant,
    run_interval,
)

AxisValues = Mapping[str, str]
"""Values of a run on the paired axes: axis → value."""
SEPARATOR = ", "
"""Separator between the values of several axes."""
DERIVED = ("shared_of_a", "shared_of_b", "shared_of_smaller")
"""Shared latents as a fraction of the first, the second, and the smaller dictionary's latents."""
_OTHER = {"a": "b", "b": "a"}


def axis_label(place: AxisValues) -> str:
    """Join the axis values of a run into one string, as in `Dictionary.seed`."""
    return SEPARATOR.join(place.values())


def seed_of_run(label: str, settings: ComparisonConfig, knobs: Mapping[str, Any]) -> str | None:
    """Return the seed of the run with this label in a cell with these settings; None if unknown.

    For runs that differ only in the data order, this is the order seed.
    """
    axes, words = pair_axes(settings.pair_by), label.split(SEPARATOR)
    if "seed" in axes and len(words) == len(axes):
        return words[axes.index("seed")]
    if "seed" in knobs:
        return str(knobs["seed"])
    return label if settings.pairs_are_a_sample else None


def add_axis_columns(
    pairs: pd.DataFrame, places: Mapping[str, AxisValues], settings: ComparisonConfig
) -> pd.DataFrame:
    """Return the pairs with columns for the axes in which their runs differ.

    Adds ``differs_in``: the axes in which the two runs differ, joined by a comma. With several
    paired axes, or one whose values the user chose, it also adds ``<axis>_a`` and ``<axis>_b``.

    Args:
        places: run id → axis values of the run.
    """
    axes, found = pair_axes(settings.pair_by), pairs.copy()
    sides = {letter: [places[run] for run in pairs[letter]] for letter in ("a", "b")}
    differ = [
        SEPARATOR.join(axis for axis in axes if a[axis] != b[axis])
        for a, b in zip(*sides.values(), strict=True)
    ]
    at = list(found.columns).index("seed_b") + 1
    found.insert(at, "differs_in", differ)
    if not settings.pairs_are_a_sample:
        for axis in axes:
            for letter, side in sides.items():
                name, values = f"{axis}_{letter}", [place[axis] for place in side]
                if name in found:  # `seed_a` held the joined values of all axes until here
                    found[name] = values
                else:
                    at += 1
                    found.insert(at, name, values)
    return found


def without_intervals(
    estimates: Mapping[str, Interval], settings: ComparisonConfig
) -> dict[str, Interval]:
    """Return a cell's estimates: unchanged if its runs are a sample, else without intervals."""
    if settings.pairs_are_a_sample:
        return dict(estimates)
    reason = f"runs that differ in {settings.pair_words} are not a sample: no interval over them"
    if not value_axes(settings.pair_by):
        reason = (
            f"pairs that differ in {' or '.join(pair_axes(settings.pair_by))} or in both are of "
            "several kinds: an interval for each kind, none for all of them"
        )
    return {
        name: replace(found, low=None, high=None, standard_error=None, reason=reason)
        for name, found in estimates.items()
    }


@dataclass(frozen=True, eq=False)
class PairGroup:
    """The pairs of two values (layer 1 with layer 2) that differ in the same axes.

    Attributes:
        knobs: the settings that the cells of the pairs have in common, without the seed.
        first, second: the two values, in the order of the axis; equal if the pairs differ only in
            the seed.
        differs_in: the axes in which the runs of each pair differ, joined by a comma.
        pairs: rows of the pairs, oriented so that side a has the first value.
        units: random axis, such as the seed → its values for sides a and b of each pair. Intervals
            are over these axes; without any, there is none.
    """

    knobs: Mapping[str, Any]
    first: str
    second: str
    differs_in: str
    pairs: pd.DataFrame
    units: Mapping[str, tuple[tuple[str, str], ...]]

    @property
    def within(self) -> bool:
        return self.first == self.second

    @property
    def levels(self) -> dict[str, list[str]]:
        """The distinct values of each random axis: usually seeds."""
        return {
            axis: list(dict.fromkeys(value for pair in each for value in pair))
            for axis, each in self.units.items()
        }

    @property
    def n(self) -> int:
        """Number of values of the random axis, or of the one that has the fewest."""
        return min(map(len, self.levels.values()), default=0)

    @property
    def counts(self) -> str:
        """Numbers of values of the random axes: ``3``, or ``3 × 3`` for two axes."""
        return " × ".join(str(len(each)) for each in self.levels.values()) or "1"

    @property
    def crossed(self) -> bool:
        """True if the pairs have runs of every combination of the random axes, for both values."""
        rows = list(zip(*self.units.values(), strict=True))
        sides = [{tuple(pair[side] for pair in row) for row in rows} for side in (0, 1)]
        if self.within:
            sides = [sides[0] | sides[1]]
        return all(side == set(product(*self.levels.values())) for side in sides)

    def mean(self, column: str) -> float:
        return float(self.values(column).mean())

    def without(self, column: str, axis: str) -> list[float]:
        """Return, for each of the `levels` of a random axis, the mean over pairs that lack it; NaN
        if there are none."""
        values = self.values(column)
        found = []
        for level in self.levels[axis]:
            kept = [level not in pair for pair in self.units[axis]]
            found.append(float(values[kept].mean()) if any(kept) else float("nan"))
        return found

    def interval(self, column: str, confidence: float, *, fraction: bool = True) -> Interval:
        """Return the mean with its interval over seeds: leave all runs of one seed out, t(n−1).

        If every seed has one pair (pairs of layers), this is the t interval of n values. If a seed
        has several, this is the interval of a U-statistic; runs of one seed may depend on each
        other (`seed_scope`). With several random axes, see `statistics.crossed_interval`.
        """
        mean = self.mean(column)
        reason = self.reason
        if reason:
            return Interval(mean, None, None, None, self.n, reason)
        without = {axis: self.without(column, axis) for axis in self.units}
        return crossed_interval(mean, without, confidence, "logit" if fraction else "linear")

    @property
    def reason(self) -> str:
        """The reason why the runs allow no interval; empty if they do."""
        if self.n < 2 and len(self.units) < 2:
            return "one seed: chosen values are not a sample, so there is no interval"
        if len(self.units) > 1 and self.n >= MIN_SEEDS and not self.crossed:
            words = " and ".join(self.units)
            return f"not every combination of {words} was run: no interval over them"
        return ""

    def values(self, column: str) -> np.ndarray:
        """Return a column of the pairs, or one of `DERIVED`.

        In pairs within one value the sides are interchangeable: a one-sided column is the mean of
        both sides. (Otherwise the mean would depend on the order of the seeds and would not be a
        U-statistic.)
        """
        stem, _, letter = column.rpartition("_")
        if self.within and stem and letter in _OTHER:
            both = (self._one_sided(f"{stem}_{side}") for side in _OTHER)
            return np.mean([*both], axis=0)
        return self._one_sided(column)

    def _one_sided(self, column: str) -> np.ndarray:
        if column not in DERIVED:
            return self.pairs[column].to_numpy(dtype=np.float64)
        sizes = self.pairs[["num_latents_a", "num_latents_b"]].to_numpy(dtype=np.float64)
        of = dict(zip(DERIVED, (sizes[:, 0], sizes[:, 1], sizes.min(axis=1)), strict=True))
        return self.pairs["shared_latents"].to_numpy(dtype=np.float64) / of[column]


def across_minus_within(
    across: PairGroup, within: Sequence[PairGroup], column: str, confidence: float
) -> Interval:
    """Return sharing across two values minus the mean of sharing within each value.

    The estimate is S(v, w) − (S(v, v) + S(w, w))/2; the interval leaves all runs of one seed out at
    a time. There is none if all pairs of one of the three are equal.
    """
    groups = (across, *within)
    first, second = (group.mean(column) for group in within)
    mean = across.mean(column) - (first + second) / 2
    levels = [{axis: set(each) for axis, each in group.levels.items()} for group in groups]
    if not levels[0] == levels[1] == levels[2]:
        return Interval(mean, None, None, None, 0, "not every seed was run for both values")
    reason = next((group.reason for group in groups if group.reason), "")
    if reason:
        return Interval(mean, None, None, None, 0, reason)
    without = {}
    for axis, own in across.levels.items():
        lacking = [
            dict(zip(group.levels[axis], group.without(column, axis), strict=True))
            for group in groups
        ]
        without[axis] = [lacking[0][s] - (lacking[1][s] + lacking[2][s]) / 2 for s in own]
    found = crossed_interval(mean, without, confidence)
    places = ("across the values", "within the first value", "within the second value")
    for where, group in zip(places, groups, strict=True):
        if found.low is not None and is_constant(group.values(column)):
            reason = f"every pair {where} is {group.mean(column):.3g}: {NO_SPREAD}"
            return Interval(mean, None, None, None, found.n, reason)
    return found


def pair_groups(cells: Sequence[tuple[Mapping[str, Any], Any]]) -> list[PairGroup]:
    """Group the pairs of cells whose runs are not a sample by the two values compared.

    Args:
        cells: settings and `CellResult` of each cell; cells that differ only in the seed are
            pooled.
    """
    found = []
    for knobs, family in _families(cells):
        settings = family[0][1].settings
        parts = [_placed(own, cell.pairs, settings) for own, cell in family]
        pairs = pd.concat(parts, ignore_index=True)
        order = _order(settings, [*pairs["value_a"], *pairs["value_b"]])
        pairs = _oriented(pairs, order)
        grouped: dict[tuple[str, str, str], list[int]] = {}
        names = ("value_a", "value_b", "differs_in")
        for i, (a, b, axes) in enumerate(zip(*(pairs[name] for name in names), strict=True)):
            grouped.setdefault((a, b, axes), []).append(i)
        for key in sorted(grouped, key=lambda k: (order[k[0]], order[k[1]], k[2].count(SEPARATOR))):
            rows = pairs.iloc[grouped[key]].reset_index(drop=True)
            units = {
                axis: tuple(zip(*(rows[f"at {axis}_{x}"] for x in "ab"), strict=True))
                for axis in _units(rows)
            }
            kept = rows.drop(columns=[c for c in rows if c.startswith(("at ", "value_"))])
            a, b, axes = key
            found.append(PairGroup(knobs, a, b, axes, kept, units))
    return found


def runs_by_value(
    cells: Sequence[tuple[Mapping[str, Any], Any]], confidence: float
) -> list[tuple[Mapping[str, Any], str, dict[str, Interval]]]:
    """Return, for each value: settings, value, and metrics (FVU, L0) of its runs over seeds."""
    found = []
    for knobs, family in _families(cells):
        runs: dict[str, dict[str, Any]] = {}
        places: dict[str, list[str]] = {}
        for own, cell in family:
            placed = _placed(own, cell.pairs, cell.settings)
            for x in "ab":
                names = [x, f"value_{x}", *(f"at {axis}_{x}" for axis in REPLICATES)]
                places |= {run: place for run, *place in zip(*map(placed.get, names), strict=True)}
            for row in cell.runs.to_dict("records"):
                runs.setdefault(places[row["run"]][0], {})[row["run"]] = row
        for value in sorted(runs, key=_order(family[0][1].settings, list(runs)).__getitem__):
            frame = pd.DataFrame(runs[value].values()).drop(columns=["run", "seed"])
            draws = pd.DataFrame([places[run][1:] for run in runs[value]], columns=[*REPLICATES])
            estimates = {n: _over_runs(frame[n].to_numpy(), draws, confidence) for n in frame}
            found.append((knobs, value, estimates))
    return found


def _over_runs(values: np.ndarray, draws: pd.DataFrame, confidence: float) -> Interval:
    """Return the mean of a metric over runs, with its interval over the random axes.

    Args:
        draws: a row per run, a column per axis of `REPLICATES`.
    """
    axes = _varying(draws)
    if len(axes) < 2:
        return run_interval(values, confidence)
    mean, levels = float(values.mean()), [dict.fromkeys(draws[axis]) for axis in axes]
    if len(values) != np.prod([len(each) for each in levels]):
        reason = f"not every combination of {' and '.join(axes)} was run: no interval over them"
        return Interval(mean, None, None, None, len(values), reason)
    without = {
        axis: [float(values[(draws[axis] != level).to_numpy()].mean()) for level in each]
        for axis, each in zip(axes, levels, strict=True)
    }
    return replace(crossed_interval(mean, without, confidence), n=len(values))


def _families(
    cells: Sequence[tuple[Mapping[str, Any], Any]],
) -> list[tuple[dict[str, Any], list[tuple[Mapping[str, Any], Any]]]]:
    """Group cells that differ only in the seed; return each group with its common settings."""
    general = [(knobs, cell) for knobs, cell in cells if not cell.settings.pairs_are_a_sample]
    # A setting that differs within a cell (`0|1|2`) is a paired axis or follows from one; its text
    # differs between cells if one of them lacks runs, so leave it out of the key.
    paired = {name for knobs, _ in general for name, v in knobs.items() if "|" in str(v)}
    found: dict[Any, tuple[dict[str, Any], list[tuple[Mapping[str, Any], Any]]]] = {}
    for knobs, cell in general:
        common = {name: v for name, v in knobs.items() if name not in (*paired, *REPLICATES)}
        key = (cell.settings.pair_by, tuple(common.items()))
        shown = {name: v for name, v in knobs.items() if name not in REPLICATES}
        found.setdefault(key, (shown, []))[1].append((knobs, cell))
    return list(found.values())


def _placed(
    knobs: Mapping[str, Any], pairs: pd.DataFrame, settings: ComparisonConfig
) -> pd.DataFrame:
    """Add to a cell's pairs, per side, ``value_a`` (the chosen values) and ``at seed_a``, … (the
    draws)."""
    axes, more = pair_axes(settings.pair_by), {}
    chosen = value_axes(settings.pair_by)
    for letter in "ab":
        words = [pairs[f"{axis}_{letter}"].astype(str) for axis in chosen]
        more[f"value_{letter}"] = [SEPARATOR.join(row) for row in zip(*words, strict=True)] or ""
        for axis in REPLICATES:
            if axis in axes:
                more[f"at {axis}_{letter}"] = pairs[f"{axis}_{letter}"].astype(str)
            else:
                more[f"at {axis}_{letter}"] = str(knobs.get(axis, ""))
    return pairs.assign(**more)


def _order(settings: ComparisonConfig, values: Sequence[str]) -> dict[str, int]:
    """Return the rank of each value, in the order of the grid."""
    listed = [""]
    for i, axis in enumerate(value_axes(settings.pair_by)):
        words = [str(word) for word in settings.grid[axis]]
        listed = [f"{before}{SEPARATOR if i else ''}{word}" for before in listed for word in words]
    return {value: i for i, value in enumerate(dict.fromkeys([*listed, *values]))}


def _oriented(pairs: pd.DataFrame, order: Mapping[str, int]) -> pd.DataFrame:
    """Swap the sides of pairs so that the value that comes first in ``order`` is on side a."""
    turned = [order[a] > order[b] for a, b in zip(pairs["value_a"], pairs["value_b"], strict=True)]
    swap = _OTHER | {
        name: name[:-1] + _OTHER[name[-1]]
        for name in pairs
        if name[-2:] in ("_a", "_b") and name[:-1] + _OTHER[name[-1]] in pairs
    }
    backwards = pairs.loc[turned].rename(columns=swap)[list(pairs)]
    return pd.concat([pairs.loc[np.logical_not(turned)], backwards]).sort_index()


def _units(rows: pd.DataFrame) -> list[str]:
    """Return the axes for intervals over pairs: those of `REPLICATES` with several values, else the
    first one with a known value."""
    sides = [rows[[f"at {axis}_{x}" for axis in REPLICATES]].to_numpy() for x in "ab"]
    draws = pd.DataFrame(np.concatenate(sides), columns=[*REPLICATES])
    return _varying(draws) or [axis for axis in REPLICATES if {*draws[axis]} - {""}][:1]


def _varying(draws: pd.DataFrame) -> list[str]:
    return [axis for axis in REPLICATES if len({*draws[axis]}) > 1]
