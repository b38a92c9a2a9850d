from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from reseed.evaluate.true_directions import (
    match_directions,
    matched_cosine,
    nonnegative_cosine,
    unit,
)

NO_GROUPS = torch.zeros(0, 2, 5)
BASIS = torch.eye(5)


def composite(row: torch.Tensor, dictionary: torch.Tensor = BASIS) -> float:
    groups = torch.zeros(0, 1, dictionary.shape[1])
    return float(match_directions(row[None], dictionary, groups).composite)


def brute_force(row: np.ndarray, dictionary: np.ndarray) -> float:
    """Find the best cosine by scipy's non-negative least squares on each set of three features."""
    best = 0.0
    for chosen in combinations(range(len(dictionary)), min(3, len(dictionary))):
        weights, _ = nnls(dictionary[list(chosen)].T, row)
        fit = weights @ dictionary[list(chosen)]
        if weights.any():
            best = max(best, float(fit @ row / np.linalg.norm(fit) / np.linalg.norm(row)))
    return best


@pytest.mark.parametrize(("features", "width"), [(12, 5), (12, 4), (7, 9), (3, 6), (2, 6), (1, 3)])
def test_the_fit_equals_scipys_on_all_sets(features: int, width: int) -> None:
    rng = np.random.default_rng(features * width)
    # A common component makes the features far from orthogonal.
    dictionary = unit(torch.from_numpy(rng.normal(size=(features, width)) + 0.7))
    rows = unit(torch.from_numpy(rng.normal(size=(40, width)) + 0.3))
    everything = torch.arange(features).expand(40, -1)
    found = nonnegative_cosine(rows, dictionary, everything)
    wanted = [brute_force(row, dictionary.numpy()) for row in rows.numpy()]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)


def test_few_candidates_are_enough_for_orthogonal_features() -> None:
    rng = np.random.default_rng(0)
    dictionary = torch.from_numpy(np.linalg.qr(rng.normal(size=(20, 20)))[0])
    rows = torch.from_numpy(rng.normal(size=(50, 20)))
    found = match_directions(rows, dictionary, torch.zeros(0, 1, 20), candidates=3).composite
    # By hand: the three largest positive coordinates.
    along = unit(rows) @ dictionary.T
    wanted = along.clamp(min=0).topk(3, dim=1).values.norm(dim=1)
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_fewer_candidates_never_find_more() -> None:
    rng = np.random.default_rng(1)
    dictionary = torch.from_numpy(rng.normal(size=(30, 6)))
    rows = torch.from_numpy(rng.normal(size=(50, 6)))
    few, more = (
        match_directions(rows, dictionary, torch.zeros(0, 1, 6), c).composite for c in (4, 12)
    )
    assert (few <= more + 1e-6).all()
    assert (few < more - 1e-3).any(), "few candidates must miss some composites here"


def test_composites_are_sums_of_at_most_three_features() -> None:
    u = BASIS
    assert composite(u[0] + u[1]) == pytest.approx(1)
    assert composite(3 * u[0] + u[2] + 2 * u[4]) == pytest.approx(1)
    assert composite(u[0] - u[1]) == pytest.approx(0.5**0.5)
    assert composite(-u[0]) == 0
    assert composite(u[:4].sum(0)) == pytest.approx(3 / 12**0.5)  # (3 of 4 equal parts) = .866
    assert composite(torch.zeros(5)) == 0


def test_duplicate_features_do_not_change_the_fit() -> None:
    twice = torch.stack([BASIS[0], BASIS[0], BASIS[1], BASIS[1]])
    assert composite(BASIS[0] + BASIS[1], twice) == pytest.approx(1)
    assert composite(BASIS[0] - BASIS[1], twice) == pytest.approx(0.5**0.5)


def test_projection_onto_groups_by_hand() -> None:
    groups = torch.stack([BASIS[:2], BASIS[2:4]])
    rows = torch.tensor([[3.0, 4, 0, 0, 0], [1, -1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 3, 0, 4]])
    found = match_directions(rows, BASIS[4:], groups).group
    assert found.tolist() == pytest.approx([1, 1, 0.5**0.5, 0.6])
    assert match_directions(rows, BASIS, NO_GROUPS).group.tolist() == [0] * 4


def test_matched_cosine_by_hand() -> None:
    # Greedy would take .9 and leave .1; the best sum is .8 + .7. Signs do not matter.
    assert matched_cosine(torch.tensor([[0.9, -0.8], [0.7, 0.1]])) == pytest.approx(0.75)
    assert matched_cosine(torch.tensor([[0.9, -0.95]])) == pytest.approx(0.95)
    assert matched_cosine(torch.tensor([[0.9], [0.2]])) == pytest.approx(0.9)


def test_zero_and_nan_rows_have_no_feature() -> None:
    rows = torch.stack([BASIS[1] * -2, torch.zeros(5), torch.full((5,), torch.nan)])
    found = match_directions(rows, BASIS, NO_GROUPS)
    assert found.feature.tolist() == [1, -1, -1]
    assert found.cosine.tolist() == [-1, 0, 0]
    assert found.mcc == pytest.approx(1 / 3)
