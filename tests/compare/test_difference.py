"""Differences between cells whose runs have the same random draws, or draws of their own."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reseed.compare.difference import cell_difference, run_draws, share_draws
from reseed.compare.registry import Interval
from reseed.compare.statistics import seed_interval, welch_difference
from reseed.store.runs import RunStore


def cell(values: Any, init: Any = (), order: Any = ()) -> Any:
    """Return the parts of a cell that a difference reads, from the values of its pairs [n, n].

    ``init`` and ``order`` are the seeds of the runs' initial weights and data orders.
    """
    values, runs = np.asarray(values), [f"run-{s}" for s in range(len(values))]
    places = list(combinations(range(len(runs)), 2))
    pairs = pd.DataFrame({
        "a": [runs[s] for s, _ in places],
        "b": [runs[t] for _, t in places],
        "shared_fraction": [values[s, t] for s, t in places],
    })  # fmt: skip
    draws = {
        run: {"seed": i, "dataset.order_seed": o}
        for run, i, o in zip(runs, init, order, strict=False)
    }
    table = pd.DataFrame({"run": runs, "seed": [str(s) for s in range(len(runs))]})
    estimates = {"shared_fraction": seed_interval(values)}
    return SimpleNamespace(pairs=pairs, runs=table, estimates=estimates, draws=draws)


def difference(first: Any, second: Any) -> Interval:
    return cell_difference(first, second, "shared_fraction", 0.95)


FIRST = [[9, 0.4, 0.5], [0.4, 9, 0.36], [0.5, 0.36, 9]]
SECOND = [[9, 0.3, 0.42], [0.3, 9, 0.24], [0.42, 0.24, 9]]


def test_cells_with_the_same_initial_weights_leave_the_same_seed_out_of_both():
    """Without a seed one pair is left: .36 − .24, .5 − .42, .4 − .3."""
    cells = [cell(values, [7, 8, 9], [0, 0, 0]) for values in (FIRST, SECOND)]
    found = difference(*cells)
    error = np.sqrt(2 / 3 * (0.02**2 + 0.02**2))
    assert (found.mean, found.standard_error) == pytest.approx((0.1, error))
    reach = stats.t.ppf(0.975, 2) * error
    assert (found.low, found.high) == pytest.approx((0.1 - reach, 0.1 + reach))
    salted = [cell(FIRST, [7, 8, 9], [0, 0, 0]), cell(SECOND, [4, 5, 6], [0, 0, 0])]
    wide = difference(*salted)
    assert wide == welch_difference(*(x.estimates["shared_fraction"] for x in salted))
    assert wide.low is not None
    assert wide.low < 0 < found.low


def test_runs_are_matched_by_their_seed_whatever_their_order():
    turned = cell(np.array(SECOND)[::-1, ::-1], [9, 8, 7], [0, 0, 0])
    turned.runs["seed"] = ["2", "1", "0"]
    first = cell(FIRST, [7, 8, 9], [0, 0, 0])
    straight = difference(first, cell(SECOND, [7, 8, 9], [0, 0, 0]))
    assert difference(first, turned).high == pytest.approx(straight.high)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (([7, 8, 9], [0, 0, 0]), ([4, 5, 6], [0, 0, 0]), False),  # by default, with one data order
        (([7, 8, 9], [0, 0, 0]), ([7, 8, 9], [0, 0, 0]), True),  # seed_scope=shared
        (([7, 7, 7], [0, 1, 2]), ([4, 4, 4], [0, 1, 2]), True),  # pairs of data orders
        (([7, 8, 9], [0, 1, 2]), ([4, 5, 6], [0, 1, 2]), True),  # dataset.order_seed=${seed}
        (([7, 7, 7], [0, 1, 2]), ([7, 8, 9], [0, 0, 0]), False),  # one draw of a fixed order
        (([None] * 3, [0, 0, 0]), ([None] * 3, [0, 0, 0]), False),  # pretrained
        (((), ()), ((), ()), False),  # not known
    ],
)
def test_cells_share_draws_if_these_vary_in_both(first, second, shared):
    assert share_draws(cell(FIRST, *first), cell(SECOND, *second)) == shared


def test_among_many_cells_two_with_the_same_draws_suffice():
    own = [cell(FIRST, [3 * i, 3 * i + 1, 3 * i + 2], [0] * 3) for i in range(4)]
    assert not share_draws(*own)
    assert share_draws(*own, cell(FIRST, [50, 51, 4], [0] * 3))
    assert not share_draws(*own, cell(FIRST, [4, 4, 4], [0, 1, 2])), "one draw does not vary"


def test_cells_with_the_same_draws_need_all_of_them_in_both():
    four = np.full((4, 4), 0.4)
    four[:3, :3] = SECOND
    found = difference(cell(FIRST, [7, 8, 9], [0] * 3), cell(four, [7, 8, 9, 10], [0] * 4))
    assert found.low is None
    assert found.reason == (
        "the cells have the same draws, but not every one was run for both: no interval"
    )


def test_without_an_estimate_there_is_no_paired_interval_and_the_reason():
    two = [cell(np.array(x)[:2, :2], [7, 8], [0, 0]) for x in (FIRST, SECOND)]
    assert difference(*two).reason == "fewer than 3 seeds: no interval"
    unknown = np.array(FIRST)
    unknown[0, 1] = unknown[1, 0] = np.nan
    found = difference(cell(unknown, [7, 8, 9], [0] * 3), cell(SECOND, [7, 8, 9], [0] * 3))
    assert (found.low, found.reason) == (
        None, "in the first cell, undefined in at least one pair"
    )  # fmt: skip


def test_a_cell_that_shares_nothing_leaves_no_paired_interval_either():
    """The draws move the other cell alone: a spread of 0 does not say how they move this one."""
    nothing = cell(np.zeros((3, 3)), [7, 8, 9], [0] * 3)
    found = difference(cell(FIRST, [7, 8, 9], [0] * 3), nothing)
    assert (found.mean, found.low) == (pytest.approx(0.42), None)
    assert found.reason.startswith("in the second cell, every pair is 0: no interval, because")


@pytest.mark.parametrize("sign", [1, -1], ids=["alike", "opposite"])
def test_the_interval_of_cells_with_the_same_draws_covers_their_difference(sign):
    """A seed moves all of its pairs, in both cells by the same amount or by the opposite one.

    Welch's interval, which takes the cells as independent, is then too wide or too narrow.
    """
    rng, draws, n = np.random.default_rng(3), 600, 4
    covered = welch = 0
    for _ in range(draws):
        effect = rng.normal(0, 0.03, n)
        made = []
        for level, common in ((0.5, effect), (0.4, sign * effect)):
            own = common + rng.normal(0, 0.01, n)
            noise = np.triu(rng.normal(0, 0.002, (n, n)), 1)
            made.append(cell(level + own[:, None] + own + noise + noise.T, range(n), [0] * n))
        found = difference(*made)
        covered += found.low < 0.1 < found.high
        apart = welch_difference(*(x.estimates["shared_fraction"] for x in made))
        welch += apart.low < 0.1 < apart.high
    assert 0.93 <= covered / draws <= 0.99
    assert welch / draws > 0.98 if sign == 1 else welch / draws < 0.9


def test_draws_are_read_from_the_records_of_runs(monkeypatch):
    runs = list(RunStore("tests/records/outputs").runs())
    found = [run_draws(run) for run in runs]
    assert all(isinstance(draws["seed"], int) for draws in found)
    assert {draws["dataset.order_seed"] for draws in found} == {0}
    for run, draws in zip(runs, found, strict=True):
        assert draws["seed"] == run.record["init_seed"]
        assert draws["seed"] != run.record["experiment"]["seed"], "salted with the cell"
