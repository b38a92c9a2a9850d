"""Tests of shared fractions by firing, and at one distribution of firing."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from reseed.compare.cell import compare_cell
from reseed.compare.statistics import leave_one_out_interval
from reseed.compare.strata import DENSITY_EDGES, shared_by_stratum, standardised, strata_table


def runs_of(dictionary, firing, tokens=100_000):
    return [
        dictionary(np.ones((len(f), 2)), firing=np.array(f), seed=str(s), tokens=tokens)
        for s, f in enumerate(firing)
    ]


def flags(*shared):
    return SimpleNamespace(shared=np.array(shared, dtype=bool))


def test_strata_of_two_runs_equal_a_hand_computed_example(dictionary):
    # Densities 0, 2e-5, 1e-4, 1e-4 and .5; 0, 3e-5, 5e-4, .1 and .2.
    runs = runs_of(dictionary, [[0, 2, 10, 10, 50_000], [0, 3, 50, 10_000, 20_000]])
    sides = {(0, 1): flags(0, 0, 0, 1, 1), (1, 0): flags(0, 0, 1, 0, 1)}
    table = strata_table(runs, sides, 10)
    density = table[table["kind"] == "density"]
    assert density["low"].tolist()[1:] == [0, *DENSITY_EDGES]
    filled = density[density["latents"] > 0]
    assert filled["latents"].tolist() == [2, 2, 2, 1, 1, 2]
    assert filled["shared"].tolist() == [0, 0, 1, 1, 0, 2]
    assert filled["high"].tolist() == pytest.approx([0, 10**-4.5, 1e-4, 1e-3, 0.1, 1])
    decile = table[table["kind"] == "decile"]
    assert decile["latents"].tolist()[:2] == [2, 2]
    assert decile["latents"].sum() == density["latents"].sum() == 10
    assert decile["shared"].sum() == 4
    shown = shared_by_stratum(table, "density")
    assert shown["latents"].sum() == 5
    assert shown["shared_fraction"].tolist()[-1] == 1
    assert np.isnan(shown["shared_low"]).all(), "two seeds have no interval"


def test_deciles_pool_the_live_latents_of_all_runs(dictionary):
    rng = np.random.default_rng(0)
    firing = [rng.permutation(np.arange(10, 1010) * (s + 1)) for s in range(3)]
    firing = [np.concatenate([f, np.arange(0, 9)]) for f in firing]
    runs = runs_of(dictionary, firing)
    every = {(s, t): flags(*np.ones(1009)) for s in range(3) for t in range(3) if s != t}
    table = strata_table(runs, every, 10)
    shown = shared_by_stratum(table, "decile")
    assert shown["latents"].tolist()[:2] == [1, 8]
    # Equal counts of two runs stay together, so deciles differ by a few latents.
    assert shown["latents"].tolist()[2:] == pytest.approx([100] * 10, abs=2)
    assert shown["shared_fraction"].tolist() == [1] * 12
    assert shown["low"].tolist()[2] == 10


@pytest.fixture
def cells(partly_shared, settings):
    """Return two cells that differ in firing; in both, frequent latents are shared more often."""

    def make(shift):
        rng = np.random.default_rng(int(100 * shift))
        runs = []
        for s, x in enumerate(partly_shared(4, 20)):
            order = np.random.default_rng(100 + s)  # common latents, drawn as in the fixture
            order.standard_normal((2, 40, 64))
            common = order.permutation(40) < 20
            often = rng.random(40) < np.where(common, 0.5 + shift, 0.2 + shift)
            firing = np.where(often, rng.integers(400, 900, 40), rng.integers(40, 90, 40))
            runs.append(dataclasses.replace(x, firing=firing, held_out_tokens=1_000_000))
        return compare_cell(runs, [], settings)

    return [make(0), make(0.25)]


def test_standardised_fractions_equal_their_definition(cells):
    found = standardised([cell.strata for cell in cells])
    shares, fractions = [], []
    for cell in cells:
        table = shared_by_stratum(cell.strata, "density")
        filled = table[table["latents"] > 0]
        assert len(filled) == 2
        shares.append(filled["latents"].to_numpy() / 40)
        fractions.append(filled["shared_fraction"].to_numpy())
    assert abs(shares[0][0] - shares[1][0]) > 0.1
    weights = np.mean(shares, axis=0)
    for cell, fraction, one in zip(cells, fractions, found, strict=True):
        assert one.estimate.mean == pytest.approx(fraction @ weights)
        assert one.coverage == pytest.approx(1)
        assert one.estimate.mean != pytest.approx(cell.estimates["shared_fraction"].mean, abs=1e-3)
        without = []
        for run in cell.runs["run"]:
            table = cell.strata[(cell.strata["a"] != run) & (cell.strata["b"] != run)]
            rest = shared_by_stratum(table, "density")
            rest = rest[rest["latents"] > 0]
            without.append(rest["shared_fraction"].to_numpy() @ weights)
        wanted = leave_one_out_interval(fraction @ weights, without, 0.95, "logit")
        assert one.estimate.low == pytest.approx(wanted.low)
        assert one.estimate.high == pytest.approx(wanted.high)


def test_cells_that_differ_only_in_firing_are_equal_when_standardised(dictionary):
    def cell(rare, often):
        """Share a quarter of the rare latents and three quarters of the frequent ones."""
        firing = [20] * (4 * rare) + [20_000] * (4 * often)
        shared = flags(*([1, 0, 0, 0] * rare + [1, 1, 1, 0] * often))
        runs = runs_of(dictionary, [firing] * 2)
        return strata_table(runs, {(0, 1): shared, (1, 0): shared}, 10)

    one, other = cell(1, 3), cell(3, 1)
    found = standardised([one, other])
    assert [x.estimate.mean for x in found] == pytest.approx([0.5, 0.5])
    assert found[0].estimate.reason == "fewer than 3 seeds: no interval"
    # A single cell is its own reference.
    assert standardised([one])[0].estimate.mean == pytest.approx(10 / 16)


def test_densities_that_one_cell_lacks_are_left_out_for_all(dictionary):
    shared = flags(1, 0, 1, 1)
    sides = {(0, 1): shared, (1, 0): shared}
    one = strata_table(runs_of(dictionary, [[20, 20, 20_000, 20_000]] * 2), sides, 10)
    other = strata_table(runs_of(dictionary, [[0, 20, 20, 20]] * 2), sides, 10)
    first, second = standardised([one, other])
    assert first.estimate.mean == 0.5
    assert second.estimate.mean == pytest.approx(2 / 3)
    assert first.coverage == second.coverage == 0.75
    nothing = strata_table(runs_of(dictionary, [[0, 0, 0, 0]] * 2), sides, 10)
    assert np.isnan(standardised([one, nothing])[0].estimate.mean)


def test_cells_that_share_everything_have_fraction_one_and_no_interval(dictionary):
    """A weighted mean of ones must not be 1.0000000000000002, which has no logit."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tables = []
        for _ in range(2):
            firing = [10 ** rng.uniform(1, 4.5, 50) for _ in range(3)]
            runs = runs_of(dictionary, [f.astype(int) for f in firing])
            every = {(s, t): flags(*np.ones(50)) for s in range(3) for t in range(3) if s != t}
            tables.append(strata_table(runs, every, 10))
        for found in standardised(tables):
            assert found.estimate.mean == 1
            assert found.estimate.low is None
