"""Tests of the subspaces that groups of latents span."""

from itertools import combinations

import numpy as np
import pytest
from scipy.linalg import qr, subspace_angles

from reseed.compare import subspaces as module
from reseed.compare.cell import compare_cell
from reseed.compare.subspaces import mean_squared_principal_cosine, moment, overlap, subspaces


def basis(rng, d, k):
    return qr(rng.standard_normal((d, k)), mode="economic")[0]


def test_angles_are_the_principal_angles():
    rng = np.random.default_rng(0)
    a, b = basis(rng, 20, 4), basis(rng, 20, 7)
    assert mean_squared_principal_cosine(a, b) == pytest.approx(
        np.mean(np.cos(subspace_angles(a, b)) ** 2)
    )
    assert mean_squared_principal_cosine(a, b) == pytest.approx(mean_squared_principal_cosine(b, a))
    assert mean_squared_principal_cosine(b[:, :3], b) == pytest.approx(1)
    assert np.isnan(mean_squared_principal_cosine(a, b[:, :0]))


def test_angles_of_random_spans_equal_their_expectation():
    rng = np.random.default_rng(0)
    found = [
        mean_squared_principal_cosine(basis(rng, 30, 5), basis(rng, 30, 12)) for _ in range(200)
    ]
    assert np.mean(found) == pytest.approx(12 / 30, abs=0.01)


def test_the_moment_uses_unit_rows():
    rows = np.array([[2.0, 0, 0], [0, 3, 4], [0, 0, -5]])
    wanted = (np.diag([1, 0, 0]) + np.outer([0, 0.6, 0.8], [0, 0.6, 0.8]) + np.diag([0, 0, 1])) / 3
    assert moment(rows) == pytest.approx(wanted)
    assert moment(-7 * rows) == pytest.approx(wanted)
    many = np.random.default_rng(0).standard_normal((10_000, 3))
    unit = many / np.linalg.norm(many, axis=1, keepdims=True)
    assert moment(many) == pytest.approx(unit.T @ unit / 10_000)


def test_overlap_is_the_cosine_of_moments():
    a, b = np.diag([1.0, 1, 0, 0]), np.diag([0, 0, 2.0, 1])
    assert overlap(a, 5 * a) == pytest.approx(1)
    assert overlap(a, b) == 0
    assert overlap(a, np.eye(4)) == pytest.approx(2 / np.sqrt(2 * 4))
    assert np.isnan(overlap(a, 0 * a))


def turned(dictionary, seeds=3, d=40, plane=5):
    """Return runs with shared latents, and others that span one plane, rotated in every seed."""
    common = np.random.default_rng(0).standard_normal((30, d))
    common[:, :plane] = 0
    runs = []
    for s in range(seeds):
        own = np.zeros((60, d))
        own[:, :plane] = np.random.default_rng([1, s]).standard_normal((60, plane))
        decoder = np.concatenate([common, own])
        # Encoders of the plane's latents have nothing in common, so none is shared.
        turned = np.random.default_rng([2, s]).standard_normal((60, d))
        encoder = np.concatenate([common, turned])
        firing = np.where(np.arange(90) < 4, 500, 50)
        runs.append(dictionary(encoder, decoder, firing=firing, seed=str(s)))
    return runs


def test_orphans_can_span_one_subspace(dictionary, settings):
    cell = compare_cell(turned(dictionary), [], settings)
    assert (cell.pairs["shared_latents"] == 30).all()
    assert (cell.runs["directions_orphan"] <= 5).all()
    assert (cell.runs["directions_orphan"] >= 4).all()
    assert (cell.pairs["subspace_overlap_orphan"] > 0.9).all()
    assert (cell.pairs["subspace_angles_orphan"] > 0.75).all()
    # Random spans of so few directions hardly overlap.
    assert (cell.pairs["null_subspace_angles_orphan"] <= 5 / 40).all()
    # Two thirds of the random live latents, as many as the shared ones, are in the plane.
    assert (cell.pairs["null_subspace_overlap_shared"] < 0.97).all()
    assert cell.pairs["subspace_overlap_shared"].tolist() == pytest.approx([1] * 3)
    assert cell.pairs["subspace_angles_shared"].tolist() == pytest.approx([1] * 3)
    assert cell.pairs["subspace_overlap_dense"].tolist() == pytest.approx([1] * 3)
    assert (cell.runs["directions_dense"] <= 4).all()
    assert cell.estimates["subspace_overlap_orphan"].low is not None


def test_unrelated_orphans_overlap_as_little_as_random_latents(dictionary):
    rng = np.random.default_rng(0)
    runs = [dictionary(*rng.standard_normal((2, 400, 30)), seed=s) for s in "ab"]
    found = subspaces(runs, [np.zeros(400, int)] * 2, 10).pairs
    assert found["subspace_overlap_orphan"] == pytest.approx(
        found["null_subspace_overlap_orphan"], abs=0.01
    )


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_the_order_of_the_runs_does_not_matter(dictionary, order):
    rng = np.random.default_rng(0)
    firing = np.where(np.arange(60) < 20, 500, 50)
    runs = [dictionary(*rng.standard_normal((2, 60, 12)), seed=s, firing=firing) for s in "abc"]
    shared_with = [rng.integers(0, 3, 60) for _ in runs]

    def rows(order):
        found = subspaces([runs[i] for i in order], [shared_with[i] for i in order], 10, seed=3)
        pairs = [frozenset(pair) for pair in combinations(order, 2)]
        return [
            {(name, who): columns[name][i] for name in columns for i, who in enumerate(named)}
            for columns, named in ((found.runs, order), (found.pairs, pairs))
        ]

    for found, wanted in zip(rows(order), rows((0, 1, 2)), strict=True):
        assert found == pytest.approx(wanted)


def test_measures_of_an_empty_group_are_nan(dictionary):
    rng = np.random.default_rng(0)
    runs = [dictionary(rng.standard_normal((10, 6)), seed=s, firing=50) for s in "ab"]
    found = subspaces(runs, [np.arange(10), np.full(10, 1)], 10)
    assert np.isnan(
        [value[0] for name, value in found.pairs.items() if name.endswith("dense")]
    ).all()
    assert np.isnan(found.pairs["subspace_overlap_orphan"]).all()
    assert found.runs["directions_dense"] == [0, 0]
    assert found.runs["directions_orphan"] == [1, 0]


def test_latents_that_are_not_live_or_are_zero_are_in_no_group(dictionary):
    rows = np.eye(6)
    rows[2] = 0
    runs = [dictionary(rows, seed=s, firing=[50, 50, 50, 0, 5, 900]) for s in "ab"]
    found = subspaces(runs, [np.array([0, 0, 0, 0, 0, 1])] * 2, 10)
    assert found.runs == {
        "directions_orphan": [2, 2],
        "directions_shared": [1, 1],
        "directions_dense": [1, 1],
    }


def test_spans_of_different_size_equal_a_hand_computed_example(dictionary):
    runs = [dictionary(np.eye(6)[:k], seed=s, firing=50) for k, s in ((2, "a"), (3, "b"))]
    found = subspaces(runs, [np.zeros(2, int), np.zeros(3, int)], 10)
    assert found.runs["directions_orphan"] == [2, 3]
    assert found.pairs["null_subspace_angles_orphan"] == [3 / 6]
    assert found.pairs["subspace_angles_orphan"] == pytest.approx([1])
    assert found.pairs["subspace_overlap_orphan"] == pytest.approx([2 / np.sqrt(6)])


@pytest.mark.parametrize("number", [3, 25, 400])
def test_wide_rows_are_decomposed_in_float32_with_the_same_result(monkeypatch, dictionary, number):
    """Cases: groups of far fewer latents than dimensions (40), of fewer, and of more."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 0.02, 40)
    rows = [rng.standard_normal((2, number, 40)) * scale for _ in "ab"]
    runs = [dictionary(*r, seed=s, firing=50) for r, s in zip(rows, "ab", strict=True)]
    # Half of the latents are shared: both groups have latents.
    shared_with = [np.arange(number) % 2] * 2
    exact = subspaces(runs, shared_with, 10)
    monkeypatch.setattr(module, "EXACT_WIDTH", 39)
    wide = subspaces(runs, shared_with, 10)
    assert wide.runs == exact.runs
    for name, (value,) in exact.pairs.items():
        assert wide.pairs[name] == pytest.approx([value], abs=1e-5, nan_ok=True), name
    assert not np.isnan(wide.pairs["subspace_angles_orphan"]).any()


def test_few_linearly_dependent_rows_span_their_plane(monkeypatch, dictionary):
    """Six orphans lie in one plane; the group of shared latents is empty."""
    rows = np.zeros((6, 20))
    rows[:, :2] = np.random.default_rng(0).standard_normal((6, 2))
    runs = [dictionary(rows, seed=s, firing=50) for s in "ab"]
    monkeypatch.setattr(module, "EXACT_WIDTH", 19)
    found = subspaces(runs, [np.zeros(6, int)] * 2, 10)
    assert found.runs["directions_orphan"] == [2, 2]
    assert found.pairs["subspace_angles_orphan"] == pytest.approx([1])
    assert np.isnan(found.pairs["subspace_angles_shared"]).all()
