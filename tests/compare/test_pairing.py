"""Tests of pairs grouped by the axes in which their runs differ, with intervals over seeds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.pairing import (
    PairGroup,
    across_minus_within,
    add_axis_columns,
    axis_label,
    pair_groups,
    runs_by_value,
    seed_of_run,
)
from reseed.compare.statistics import seed_interval

ONE_SEED = "one seed: chosen values are not a sample, so there is no interval"


def cell(runs, values, pair_by, grid, **more):
    """Return the parts of a cell that `pair_groups` reads: pairs of runs and measures.

    ``values(a, b)`` is the shared fraction of a pair; the coverage of a by b is a tenth of it.
    """
    settings = ComparisonConfig(name="t", grid=grid, pair_by=pair_by, **more)
    rows, places = [], {axis_label(run): run for run in runs}
    for a, b in combinations(runs, 2):
        row = {"a": axis_label(a), "b": axis_label(b)}
        row |= {"seed_a": row["a"], "seed_b": row["b"], "shared_fraction": values(a, b)}
        row |= {"coverage_a": values(a, b) / 10, "coverage_b": 0.5}
        rows.append(row | {"num_latents_a": 4, "num_latents_b": 8, "shared_latents": 2})
    pairs = add_axis_columns(pd.DataFrame(rows), places, settings)
    table = pd.DataFrame({"run": list(places), "seed": list(places), "fvu": range(len(places))})
    return SimpleNamespace(settings=settings, pairs=pairs, runs=table)


LAYERS = {"layer": ["2", "0"], "seed": ["0", "1", "2"]}


def layer_cells(values):
    """Return a cell per seed, in which layers pair up."""
    found = []
    for seed in LAYERS["seed"]:
        runs = [{"layer": layer} for layer in LAYERS["layer"]]
        made = cell(runs, lambda a, b, s=seed: values[int(s)], "layer", LAYERS)
        found.append(({"sae": "topk", "layer": "2|0", "seed": seed}, made))
    return found


def test_a_pair_of_chosen_values_has_the_t_interval_over_seeds():
    values = [0.2, 0.3, 0.45]
    (group,) = pair_groups(layer_cells(values))
    assert (group.first, group.second, group.differs_in) == ("2", "0", "layer")
    assert group.levels == {"seed": ["0", "1", "2"]}
    assert group.knobs == {"sae": "topk", "layer": "2|0"}
    found = group.interval("shared_fraction", 0.9, fraction=False)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), *wanted))
    assert group.mean("coverage_a") == pytest.approx(np.mean(values) / 10)


def test_the_interval_of_a_fraction_is_within_0_and_1():
    (group,) = pair_groups(layer_cells([0.01, 0.02, 0.3]))
    found = group.interval("shared_fraction", 0.95)
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.mean < found.high < 1


def test_pairs_are_oriented_in_the_order_of_the_grid():
    """Cells that list the runs in another order give the same pairs."""
    runs = [{"layer": "0"}, {"layer": "2"}]
    made = cell(runs, lambda a, b: 0.4, "layer", LAYERS)
    (group,) = pair_groups([({"seed": "0"}, made)])
    assert (group.first, group.second) == ("2", "0")
    (row,) = group.pairs.to_dict("records")
    assert (row["a"], row["b"], row["layer_a"], row["layer_b"]) == ("2", "0", "2", "0")
    assert (row["coverage_a"], row["coverage_b"]) == (0.5, pytest.approx(0.04))
    assert (row["num_latents_a"], row["num_latents_b"]) == (8, 4)
    shared = ("shared_of_a", "shared_of_b", "shared_of_smaller")
    assert [group.mean(name) for name in shared] == [2 / 8, 2 / 4, 2 / 4]


def test_one_or_two_seeds_have_no_interval():
    (one,) = pair_groups(layer_cells([0.2, 0.3, 0.4])[:1])
    assert one.interval("shared_fraction", 0.95).reason == ONE_SEED
    (two,) = pair_groups(layer_cells([0.2, 0.3, 0.4])[:2])
    found = two.interval("shared_fraction", 0.95)
    assert (found.low, found.reason) == (None, "fewer than 3 seeds: no interval")


def test_cells_that_lack_a_run_are_grouped_with_the_others():
    first, second, third = layer_cells([0.2, 0.3, 0.4])
    lacking = ({**third[0], "layer": "0|2"}, third[1])
    (group,) = pair_groups([first, second, lacking])
    assert len(group.pairs) == 3


def test_cells_that_differ_in_more_than_the_seed_are_grouped_separately():
    one = layer_cells([0.2, 0.3, 0.4])
    other = [({**knobs, "sae": "relu"}, made) for knobs, made in layer_cells([0.5, 0.6, 0.7])]
    assert [g.knobs["sae"] for g in pair_groups([*one, *other])] == ["topk", "relu"]
    assert [g.mean("shared_fraction") for g in pair_groups([*one, *other])] == pytest.approx(
        [0.3, 0.6]
    )


GRID = {"sae": ["topk", "relu"], "seed": ["0", "1", "2", "3"]}
RUNS = [{"sae": sae, "seed": seed} for sae in GRID["sae"] for seed in GRID["seed"]]


def value(a, b):
    """Return a number that depends on both runs, equal for (a, b) and (b, a)."""
    rng = np.random.default_rng(sorted([RUNS.index(a), RUNS.index(b)]))
    return float(rng.uniform(0.2, 0.6))


@pytest.fixture
def both():
    return cell(RUNS, value, ["sae", "seed"], GRID)


def test_pairs_that_differ_in_one_axis_and_in_all_are_grouped_separately(both):
    counts = both.pairs["differs_in"].value_counts().to_dict()
    assert counts == {"seed": 12, "sae": 4, "sae, seed": 12}
    across = both.pairs[both.pairs["differs_in"] == "sae"]
    assert (across["seed_a"] == across["seed_b"]).all(), "the seed, not the whole place"
    found = [(g.first, g.second, g.differs_in, len(g.pairs)) for g in pair_groups([({}, both)])]
    assert found == [
        ("topk", "topk", "seed", 6),
        ("topk", "relu", "sae", 4),
        ("topk", "relu", "sae, seed", 12),
        ("relu", "relu", "seed", 6),
    ]


def test_within_one_value_the_interval_is_the_seed_interval(both):
    within = pair_groups([({}, both)])[0]
    matrix = np.zeros((4, 4))
    for i, j in combinations(range(4), 2):
        matrix[i, j] = matrix[j, i] = value(RUNS[i], RUNS[j])
    found, wanted = within.interval("shared_fraction", 0.95), seed_interval(matrix, 0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_across_minus_within_leaves_one_seed_out_at_a_time(both):
    topk, _, across, relu = pair_groups([({}, both)])

    def difference(seeds):
        def mean(x, y):
            pairs = [
                value({"sae": x, "seed": s}, {"sae": y, "seed": t})
                for s in seeds for t in seeds if (s < t if x == y else s != t)
            ]  # fmt: skip
            return np.mean(pairs)

        return mean("topk", "relu") - (mean("topk", "topk") + mean("relu", "relu")) / 2

    seeds = GRID["seed"]
    without = np.array([difference([s for s in seeds if s != out]) for out in seeds])
    error = np.sqrt(3 / 4 * np.square(without - without.mean()).sum())
    found = across_minus_within(across, (topk, relu), "shared_fraction", 0.95)
    assert found.mean == pytest.approx(difference(seeds))
    assert found.standard_error == pytest.approx(error)
    assert found.high == pytest.approx(difference(seeds) + stats.t.ppf(0.975, 3) * error)


def test_across_minus_within_needs_the_same_seeds(both):
    topk, _, across, relu = pair_groups([({}, both)])
    units = {"seed": relu.units["seed"][:1]}
    fewer = PairGroup({}, "relu", "relu", "seed", relu.pairs.head(1), units)
    found = across_minus_within(across, (topk, fewer), "shared_fraction", 0.95)
    assert found.reason == "not every seed was run for both values"


@pytest.mark.parametrize(
    ("constant", "where"),
    [(0, "within the first value is 0"), (1, "across the values is 0"),
     (2, "within the second value is 0")],
)  # fmt: skip
def test_across_minus_within_has_no_interval_if_all_pairs_of_one_side_are_equal(
    both, constant, where
):
    topk, _, across, relu = pair_groups([({}, both)])
    groups = [topk, across, relu]
    pairs = groups[constant].pairs.assign(shared_fraction=0.0)
    groups[constant] = replace(groups[constant], pairs=pairs)
    found = across_minus_within(groups[1], groups[::2], "shared_fraction", 0.95)
    assert (found.low, found.standard_error) == (None, None)
    assert found.reason == (
        f"every pair {where}: no interval, because a spread of 0 is no estimate of the error"
    )


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_across_two_values_covers_the_truth(n):
    """Simulate runs of both values with effects of their own; pairs have their sum plus noise."""
    rng, hits, trials = np.random.default_rng(n), 0, 400
    units = tuple((str(s), str(t)) for s in range(n) for t in range(n) if s != t)
    at = np.array(units, dtype=int)
    for _ in range(trials):
        x, y = rng.normal(0, 0.05, (2, n))
        pairs = 0.5 + x[at[:, 0]] + y[at[:, 1]] + rng.normal(0, 0.02, len(at))
        frame = pd.DataFrame({"shared_fraction": pairs})
        group = PairGroup({}, "topk", "relu", "sae, seed", frame, {"seed": units})
        found = group.interval("shared_fraction", 0.95, fraction=False)
        assert found.low is not None
        assert found.high is not None
        hits += found.low < 0.5 < found.high
    assert 0.91 <= hits / trials <= 1.0


CROSSED = {"seed": ["0", "1", "2"], "dataset.order_seed": ["0", "1", "2"]}
PLACES = [{"seed": s, "dataset.order_seed": o} for s in CROSSED["seed"] for o in CROSSED["seed"]]
BOTH_AXES = "seed and dataset.order_seed"


def crossed_value(a, b):
    """Return a number that depends on both runs, equal for (a, b) and (b, a)."""
    rng = np.random.default_rng(sorted([PLACES.index(a), PLACES.index(b)]))
    return float(rng.uniform(0.2, 0.6))


def test_crossed_runs_leave_out_a_value_of_each_axis_at_a_time():
    """Recompute the intervals of each kind of pairs from the runs that are left."""
    made = cell(PLACES, crossed_value, [*CROSSED], CROSSED)
    groups = pair_groups([({}, made)])
    assert {g.differs_in for g in groups} == {*CROSSED, ", ".join(CROSSED)}
    for group in groups:
        differing = set(group.differs_in.split(", "))

        def mean(runs, differing=differing):
            return np.mean([
                crossed_value(a, b) for a, b in combinations(runs, 2)
                if {axis for axis in CROSSED if a[axis] != b[axis]} == differing
            ])  # fmt: skip

        variances = []
        for axis, levels in CROSSED.items():
            without = [mean([run for run in PLACES if run[axis] != out]) for out in levels]
            variances.append(2 / 3 * np.square(without - np.mean(without)).sum())
        freedom = sum(variances) ** 2 / sum(v**2 / 2 for v in variances)
        reach = stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances))
        found = group.interval("shared_fraction", 0.95, fraction=False)
        assert (found.mean, found.high) == pytest.approx((mean(PLACES), mean(PLACES) + reach))
        assert (group.counts, group.n) == ("3 × 3", 3)


def test_crossed_runs_need_every_combination_and_three_values_of_each_axis():
    lacking = cell(PLACES[:-1], crossed_value, [*CROSSED], CROSSED)
    for group in pair_groups([({}, lacking)]):
        found = group.interval("shared_fraction", 0.95)
        reason = f"not every combination of {BOTH_AXES} was run: no interval over them"
        assert (found.low, found.reason) == (None, reason)
    few = [run for run in PLACES if run["seed"] != "2"]
    for group in pair_groups([({}, cell(few, crossed_value, [*CROSSED], CROSSED))]):
        found = group.interval("shared_fraction", 0.95)
        reason = f"fewer than 3 seeds: no interval over {BOTH_AXES}"
        assert (found.low, found.reason, group.counts) == (None, reason, "2 × 3")


def layers_over_both_axes():
    """Return a cell per seed and order, in which two layers pair up; the shared fraction is .1 for
    every seed and .01 for every order."""
    grid = {"layer": ["2", "0"], **CROSSED}
    runs = [{"layer": layer} for layer in grid["layer"]]
    found = []
    for place in PLACES:
        value = 0.1 + 0.1 * int(place["seed"]) + 0.01 * int(place["dataset.order_seed"])
        made = cell(runs, lambda a, b, v=value: v, "layer", grid)
        made.runs = made.runs.assign(fvu=value, run=[f"{len(found)}-{x}" for x in made.runs["run"]])
        made.pairs[["a", "b"]] = f"{len(found)}-" + made.pairs[["a", "b"]]
        found.append(({"layer": "2|0", **place}, made))
    return found


def test_chosen_values_over_seeds_and_orders_have_an_interval_over_both():
    """Means without a seed: .26, .21, .16; without an order: .215, .21, .205."""
    cells = layers_over_both_axes()
    (group,) = pair_groups(cells)
    found = group.interval("shared_fraction", 0.95, fraction=False)
    of_seeds, of_orders = 2 / 3 * 2 * 0.05**2, 2 / 3 * 2 * 0.005**2
    assert found.mean == pytest.approx(0.21)
    assert found.standard_error == pytest.approx(np.sqrt(of_seeds + of_orders))
    (_, _, runs), _ = runs_by_value(cells, 0.95)
    assert runs["fvu"].standard_error == pytest.approx(found.standard_error)
    assert (runs["fvu"].n, runs["fvu"].low) == (9, pytest.approx(found.low))
    (_, _, runs), _ = runs_by_value(cells[:-1], 0.95)
    assert (
        runs["fvu"].reason == f"not every combination of {BOTH_AXES} was run: no interval over them"
    )


def test_architectures_over_seeds_and_orders_are_compared_over_both():
    """S(topk, relu) − (S(topk, topk) + S(relu, relu))/2 leaves one seed or one order out."""
    grid = {"sae": ["topk", "relu"], **CROSSED}
    runs = [{"sae": sae, **place} for sae in grid["sae"] for place in PLACES]

    def shared(a, b):
        rng = np.random.default_rng(sorted([runs.index(a), runs.index(b)]))
        return float(rng.uniform(0.2, 0.6))

    groups = pair_groups([({}, cell(runs, shared, [*grid], grid))])
    topk, across, relu = [g for g in groups if g.differs_in.endswith(", ".join(CROSSED))]

    def difference(kept):
        def mean(x, y):
            pairs = [
                shared({"sae": x, **p}, {"sae": y, **q}) for i, p in enumerate(kept)
                for j, q in enumerate(kept) if (i < j or x != y) and all(p[k] != q[k] for k in p)
            ]  # fmt: skip
            return np.mean(pairs)

        return mean("topk", "relu") - (mean("topk", "topk") + mean("relu", "relu")) / 2

    variance = 0
    for axis, levels in CROSSED.items():
        without = [difference([p for p in PLACES if p[axis] != out]) for out in levels]
        variance += 2 / 3 * np.square(without - np.mean(without)).sum()
    found = across_minus_within(across, (topk, relu), "shared_fraction", 0.95)
    assert found.mean == pytest.approx(difference(PLACES))
    assert found.standard_error == pytest.approx(np.sqrt(variance))


def test_runs_by_value_averages_the_metrics_over_each_values_runs(both):
    found = runs_by_value([({}, both)], 0.95)
    assert [(value, e["fvu"].mean, e["fvu"].n) for _, value, e in found] == [
        ("topk", 1.5, 4),
        ("relu", 5.5, 4),
    ]


@pytest.mark.parametrize(
    ("pair_by", "label", "knobs", "seed"),
    [
        ("seed", "3", {}, "3"),
        ("dataset.order_seed", "3", {}, "3"),
        ("dataset.order_seed", "3", {"seed": "7"}, "7"),
        ("sae", "topk", {}, None),
        ("sae", "topk", {"seed": "7"}, "7"),
        (["sae", "seed"], "topk, 2", {}, "2"),
    ],
)
def test_the_seed_of_a_run_is_found_from_its_label_and_knobs(pair_by, label, knobs, seed):
    grid = {name: ["0", "1"] for name in ("seed", "sae", "dataset.order_seed")}
    settings = ComparisonConfig(name="t", grid=grid, pair_by=pair_by)
    assert seed_of_run(label, settings, knobs) == seed


def test_cells_that_pair_by_seed_make_no_groups():
    runs = [{"seed": str(s)} for s in range(3)]
    made = cell(runs, lambda a, b: 0.5, "seed", {"seed": ["0", "1", "2"]})
    assert made.pairs["differs_in"].tolist() == ["seed"] * 3
    assert pair_groups([({}, made)]) == []


def test_a_cell_of_chosen_values_has_no_interval_over_them(partly_shared):
    over_seeds, over_layers = (
        compare_cell(
            partly_shared(3, 12), [],
            ComparisonConfig(name="t", grid={axis: ["0", "1", "2"]}, pair_by=axis, null_draws=1),
        )
        for axis in ("seed", "layer")
    )  # fmt: skip
    assert over_seeds.estimates["fvu"].low is not None
    for name, found in over_layers.estimates.items():
        assert (found.low, found.high, found.standard_error) == (None, None, None), name
        assert found.reason == "runs that differ in layer are not a sample: no interval over them"
        assert found.mean == over_seeds.estimates[name].mean or np.isnan(found.mean)


def test_within_one_value_the_sides_are_interchangeable(both):
    """The order in which seeds are listed does not matter: one fraction, with one interval."""
    turned = cell(RUNS[::-1], value, ["sae", "seed"], GRID)
    for made in (both, turned):
        within = next(g for g in pair_groups([({}, made)]) if g.within)
        sides = [within.interval(f"coverage_{side}", 0.95) for side in "ab"]
        assert sides[0] == sides[1]
        mean = (within.pairs["coverage_a"] + within.pairs["coverage_b"]).mean() / 2
        assert sides[0].mean == pytest.approx(mean)
        # The interval over seeds requires a symmetric kernel.
        matrix = np.zeros((4, 4))
        for i, j in combinations(range(4), 2):
            matrix[i, j] = matrix[j, i] = (value(RUNS[i], RUNS[j]) / 10 + 0.5) / 2
        wanted = seed_interval(matrix, 0.95)
        assert (sides[0].low, sides[0].high) == pytest.approx((wanted.low, wanted.high))
        assert within.mean("shared_of_a") == within.mean("shared_of_b") == (2 / 4 + 2 / 8) / 2
