from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reseed.compare import matching
from reseed.compare.matching import match, unit_rows


def total_by_enumeration(a, b):
    """The largest sum of cosines over all one-to-one assignments, by trying each."""
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    if len(a) > len(b):
        cosine = cosine.T
    rows = range(len(cosine))
    return max(
        sum(cosine[i, j] for i, j in zip(rows, chosen, strict=True))
        for chosen in permutations(range(cosine.shape[1]), len(cosine))
    )


@given(n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_assignment_is_one_to_one_and_the_best(n, m, d, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    found = match(a, b)
    partners = found.assignment[found.matched]
    assert len(set(partners.tolist())) == len(partners) == min(n, m)
    assert found.cosines.sum() == pytest.approx(total_by_enumeration(a, b), abs=1e-9)
    for i in range(n):
        j = found.assignment[i]
        wanted = a[i] @ b[j] / np.linalg.norm(a[i]) / np.linalg.norm(b[j]) if j >= 0 else 0
        assert found.cosines[i] == pytest.approx(wanted, abs=1e-9)


@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_seen_from_the_other_side_it_is_the_inverse(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, 5)), rng.standard_normal((m, 5))
    mirrored, inverse = match(b, a), match(a, b).inverse(m)
    assert np.array_equal(mirrored.assignment, inverse.assignment)
    assert np.allclose(mirrored.cosines, inverse.cosines)


def test_permuted_and_rescaled_rows_find_themselves():
    rng = np.random.default_rng(0)
    a, order = rng.standard_normal((50, 8)), rng.permutation(50)
    scaled = a[order] * rng.uniform(1e-20, 1e20, (50, 1))
    found = match(scaled, a)
    assert np.array_equal(found.assignment, order)
    assert np.allclose(found.cosines, 1)


def test_cosines_are_signed_and_about_the_origin():
    assert match(np.array([[1.0, 0]]), np.array([[-2.0, 0]])).cosines == [-1]
    # About their means these rows would be opposite.
    found = match(np.array([[1.0, 1], [1, 2]]), np.array([[1.0, 2], [1, 1]]))
    assert found.assignment.tolist() == [1, 0]


@pytest.mark.parametrize("broken", [0.0, np.nan, np.inf])
def test_rows_without_direction_stay_unmatched(broken):
    a, b = np.eye(4), np.eye(4)[[3, 2, 1, 0]]
    a[1], b[0, 2] = broken, broken
    b[0] = broken
    found = match(a, b)
    # Row 1 of a and its like (b[2]) are out of luck; b[0] was the like of row 3, which takes b[2].
    assert found.assignment.tolist() == [3, -1, 1, 2]
    assert found.cosines.tolist() == [1, 0, 1, 0]


def test_nothing_to_match():
    found = match(np.zeros((3, 2)), np.ones((2, 2)))
    assert found.assignment.tolist() == [-1, -1, -1]
    assert not found.cosines.any()


def test_repeated_rows_are_matched_once_each():
    a = np.repeat(np.eye(3), 2, axis=0)
    found = match(a, a)
    assert sorted(found.assignment) == list(range(6))
    assert np.allclose(found.cosines, 1)


def test_unit_rows_of_tiny_numbers():
    tiny = np.float32([[3e-42, 4e-42]])
    assert np.linalg.norm(unit_rows(tiny)) == pytest.approx(1)


def test_rows_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"equal length; got \[2, 3\] and \[2, 4\]"):
        match(np.ones((2, 3)), np.ones((2, 4)))


def test_too_many_latents_are_refused_with_the_memory_they_need():
    a = np.broadcast_to(np.float32(1), (40_000, 1))
    with pytest.raises(MemoryError, match=r"40,000 with 2 latents .* 0\.0 GB; .* is 32,768"):
        match(a, a[:2])


def test_a_matrix_larger_than_the_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(matching, "free_memory", lambda: 79)
    with pytest.raises(MemoryError, match=r"needs a dense matrix .* GB of memory are free"):
        match(np.ones((5, 1)), np.ones((2, 1)))
    monkeypatch.setattr(matching, "free_memory", lambda: 80)
    match(np.ones((5, 1)), np.ones((2, 1)))
    monkeypatch.setattr(matching, "free_memory", lambda: None)
    match(np.ones((5, 1)), np.ones((2, 1)))
