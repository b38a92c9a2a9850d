from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from reseed.compare.dictionary import unit_rows
from reseed.compare.matching import exact, match
from reseed.compare.matching.pricing import OpenBlock, Pricer, Prices
from reseed.compare.matching.rows import distinct_rows


def total_by_enumeration(a, b):
    """Return the largest sum of cosines over all one-to-one assignments, by trying each."""
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    if len(a) > len(b):
        cosine = cosine.T
    rows = range(len(cosine))
    return max(
        sum(cosine[i, j] for i, j in zip(rows, chosen, strict=True))
        for chosen in permutations(range(cosine.shape[1]), len(cosine))
    )


def check_certificate(a, b, found, absolute=False):
    """Raise AssertionError unless rows, assignment and prices prove that it is optimal."""
    sides = []
    for rows, prices in ((a, found.row_prices), (b, found.column_prices)):
        rows = np.asarray(rows, dtype=np.float64)
        directed = np.flatnonzero(np.isfinite(rows).all(axis=1) & rows.any(axis=1))
        rows = rows[directed] / np.abs(rows[directed]).max(axis=1, keepdims=True, initial=0)
        assert np.isfinite(prices[directed]).all()
        assert np.isnan(np.delete(prices, directed)).all()
        sides.append((directed, rows / np.linalg.norm(rows, axis=1, keepdims=True)))
    (rows_a, unit_a), (rows_b, unit_b) = sides
    row_prices, column_prices = found.row_prices[rows_a], found.column_prices[rows_b]
    bound, worst = row_prices.sum() + column_prices.sum(), -np.inf
    for start in range(0, len(unit_a), 1024):
        cosine = unit_a[start : start + 1024] @ unit_b.T
        cosine = np.abs(cosine) if absolute else cosine
        worst = max(
            worst,
            (cosine - row_prices[start : start + 1024, None] - column_prices).max(initial=-np.inf),
        )
    assert worst < 1e-11, "a cosine exceeds the sum of its prices"
    for few, many, prices in (
        (rows_a, rows_b, column_prices),
        (rows_b, rows_a, row_prices),
    ):
        if len(few) < len(many):
            assert prices.min() >= 0, "a price of the longer side is negative"
    pairs = np.flatnonzero(found.assignment >= 0)
    partners = found.assignment[pairs]
    assert len(set(partners.tolist())) == len(pairs) == min(len(rows_a), len(rows_b))
    place_a, place_b = np.searchsorted(rows_a, pairs), np.searchsorted(rows_b, partners)
    total = (unit_a[place_a] * unit_b[place_b]).sum(axis=1)
    total = np.abs(total).sum() if absolute else total.sum()
    assert abs(bound - total) < 1e-9 * max(1, len(pairs)), "the sum falls short of the bound"
    assert found.gap == pytest.approx(bound - total, abs=1e-9)


@given(n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_assignment_is_one_to_one_and_optimal(n, m, d, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    found = match(a, b)
    partners = found.assignment[found.matched]
    assert len(set(partners.tolist())) == len(partners) == min(n, m)
    assert found.cosines.sum() == pytest.approx(total_by_enumeration(a, b), abs=1e-9)
    check_certificate(a, b, found)
    for i in range(n):
        j = found.assignment[i]
        wanted = a[i] @ b[j] / np.linalg.norm(a[i]) / np.linalg.norm(b[j]) if j >= 0 else 0
        assert found.cosines[i] == pytest.approx(wanted, abs=1e-9)


@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_exchanging_the_sides_gives_the_inverse(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, 5)), rng.standard_normal((m, 5))
    mirrored, inverse = match(b, a), match(a, b).inverse()
    assert np.array_equal(mirrored.assignment, inverse.assignment)
    assert np.allclose(mirrored.cosines, inverse.cosines)


def test_permuted_and_rescaled_rows_match_themselves():
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
    # Row 1 of a has no direction, so b[2], its equal, is free. b[0], the equal of row 3, has no
    # direction either, so row 3 gets b[2].
    assert found.assignment.tolist() == [3, -1, 1, 2]
    assert found.cosines.tolist() == [1, 0, 1, 0]


def test_a_side_without_directions_gives_an_empty_matching():
    found = match(np.zeros((3, 2)), np.ones((2, 2)))
    assert found.assignment.tolist() == [-1, -1, -1]
    assert not found.cosines.any()


def test_repeated_rows_are_matched_once_each():
    a = np.repeat(np.eye(3), 2, axis=0)
    found = match(a, a)
    assert sorted(found.assignment) == list(range(6))
    assert np.allclose(found.cosines, 1)


def test_unit_rows_of_tiny_numbers_have_length_1():
    tiny = np.float32([[3e-42, 4e-42]])
    assert np.linalg.norm(unit_rows(tiny)) == pytest.approx(1)


def test_rows_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"equal length; got \[2, 3\] and \[2, 4\]"):
        match(np.ones((2, 3)), np.ones((2, 4)))


def test_the_certificate_catches_a_wrong_assignment_and_wrong_prices():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 60, 8))
    found = match(a, b)
    check_certificate(a, b, found)
    swapped = found.assignment.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    with pytest.raises(AssertionError, match="falls short"):
        check_certificate(a, b, replace(found, assignment=swapped))
    lowered = found.row_prices.copy()
    lowered[7] -= 1e-6
    with pytest.raises(AssertionError, match="exceeds the sum of its prices"):
        check_certificate(a, b, replace(found, row_prices=lowered))


def total_by_scipy(a, b, absolute=False):
    """Return the largest sum of cosines, by scipy's dense solver."""
    rows = [unit_rows(x) for x in (a, b)]
    one, other = (x[x.any(axis=1)] for x in rows)
    cosine = one @ other.T
    cosine = np.abs(cosine) if absolute else cosine
    i, j = linear_sum_assignment(cosine, maximize=True)
    return cosine[i, j].sum()


def orthogonal_blocks(rng):
    """Make two equal sides, each of a block of rows repeated 40 times."""
    block = rng.standard_normal((7, 10))
    return np.tile(block, (40, 1)), np.tile(block, (40, 1))


def planted(rng, n=300, m=300, d=24, noise=0.4):
    """Make two sides: half of the rows have a counterpart, the others are in clusters."""
    common = rng.standard_normal((min(n, m) // 2, d))
    centres = rng.standard_normal((6, d))
    sides = []
    for size in (n, m):
        rest = size - len(common)
        tail = centres[rng.integers(0, 6, rest)] + 0.3 * rng.standard_normal((rest, d))
        own = common + noise * rng.standard_normal(common.shape)
        sides.append(np.r_[own, tail][rng.permutation(size)])
    return sides


def signs(rng, n=256):
    return rng.choice([-0.25, 0.25], (n, 16))


def one_hot(rng, n):
    return np.eye(20)[rng.integers(0, 20, n)]


FAMILIES = {
    "identical blocks": orthogonal_blocks,
    "A = B": lambda rng: [rng.standard_normal((300, 12))] * 2,
    "permuted A": lambda rng: (lambda a: (a, a[rng.permutation(300)]))(
        rng.standard_normal((300, 12))
    ),
    "signs in 16 dimensions": lambda rng: (signs(rng), signs(rng)),
    "signs, n ≠ m": lambda rng: (signs(rng, 180), signs(rng, 256)),
    "one-hot": lambda rng: (one_hot(rng, 250), one_hot(rng, 250)),
    "one-hot, n ≠ m": lambda rng: (one_hot(rng, 150), one_hot(rng, 250)),
    "rank 1": lambda rng: (
        rng.standard_normal((300, 1)) * rng.standard_normal(9),
        rng.standard_normal((300, 1)) * rng.standard_normal(9),
    ),
    "rank 3": lambda rng: (
        rng.standard_normal((300, 3)) @ rng.standard_normal((3, 40)),
        rng.standard_normal((300, 3)) @ rng.standard_normal((3, 40)),
    ),
    "A against −A": lambda rng: (lambda a: (a, -a))(rng.standard_normal((300, 12))),
    "all rows the same": lambda rng: (np.ones((300, 4)), np.ones((280, 4))),
    "one direction, other lengths": lambda rng: (
        rng.uniform(0.1, 9, (300, 1)) * np.ones(5),
        rng.uniform(0.1, 9, (300, 1)) * np.ones(5),
    ),
    "one row": lambda rng: (rng.standard_normal((1, 8)), rng.standard_normal((200, 8))),
    "one row against itself reversed": lambda rng: (np.ones((1, 3)), -np.ones((1, 3))),
    "one dimension": lambda rng: (rng.standard_normal((200, 1)), rng.standard_normal((150, 1))),
    "half shared": planted,
    "half shared, few more": lambda rng: planted(rng, 290, 300),
    "half shared, many more": lambda rng: planted(rng, 100, 400),
    "half shared, fewer": lambda rng: planted(rng, 330, 250),
    "a hub that all want": lambda rng: (
        np.ones(12) + 0.3 * rng.standard_normal((300, 12)),
        np.r_[np.ones((3, 12)), rng.standard_normal((297, 12))],
    ),
    "repeated and rare": lambda rng: (
        np.r_[np.repeat(rng.standard_normal((4, 12)), 50, axis=0), rng.standard_normal((100, 12))],
        np.r_[rng.standard_normal((220, 12)), np.repeat(rng.standard_normal((2, 12)), 40, axis=0)],
    ),
    "with dead rows": lambda rng: (
        rng.standard_normal((300, 12)) * (rng.random((300, 1)) > 0.4),
        np.where(rng.random((300, 1)) > 0.3, rng.standard_normal((300, 12)), np.nan),
    ),
}  # fmt: skip


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("candidates", [3, 48])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_optimum_of_scipy(family, candidates, absolute):
    a, b = FAMILIES[family](np.random.default_rng(1))
    found = match(a, b, candidates=candidates, absolute=absolute)
    check_certificate(a, b, found, absolute)
    assert found.cosines.sum() == pytest.approx(total_by_scipy(a, b, absolute), abs=1e-9)


@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    d=st.integers(1, 6),
    candidates=st.integers(1, 5),
    levels=st.sampled_from([1, 2, 5, 0]),
    absolute=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300, deadline=None)
def test_rows_with_many_ties_have_the_optimum_of_scipy(n, m, d, candidates, levels, absolute, seed):
    """Entries are from a small set, so ties, identical rows and zero rows are frequent."""
    rng = np.random.default_rng(seed)
    a, b = (
        rng.integers(-levels, levels + 1, (size, d)).astype(float)
        if levels
        else rng.standard_normal((size, d))
        for size in (n, m)
    )
    found = match(a, b, candidates=candidates, absolute=absolute)
    check_certificate(a, b, found, absolute)
    if found.matched.any():
        assert found.cosines.sum() == pytest.approx(total_by_scipy(a, b, absolute), abs=1e-9)


@pytest.mark.parametrize("columns", [1, 2])
def test_prices_stay_small_if_many_rows_compete_for_few_columns(columns):
    """1,000 rows compete for copies of a few columns; prices once rose to a million."""
    rng = np.random.default_rng(0)
    a, few = rng.standard_normal((1000, 8)), rng.standard_normal((columns, 8))
    b = few[np.arange(1000) % columns]
    for scale in (1, 2, 4, 8):  # the order of the sides depends on the bits
        found = match(scale * a.astype(np.float32), b.astype(np.float32))
        check_certificate(a.astype(np.float32), b.astype(np.float32), found)
        assert abs(found.gap) < 1e-10
        assert max(np.abs(found.row_prices).max(), np.abs(found.column_prices).max()) < 8


@pytest.mark.parametrize("size", [0.0, 1e3, 1e6])
def test_excess_and_rest_of_open_pairs_are_upper_bounds(size):
    """With large prices float32 has few digits left for a cosine, and it rounds the margin."""
    rng = np.random.default_rng(0)
    a, b = (distinct_rows(rng.standard_normal((n, 8))) for n in (60, 80))
    cosine = unit_rows(a.values) @ unit_rows(b.values).T
    v = size + rng.uniform(0, 0.3, 80)
    u = (cosine - v).max(axis=1) - rng.uniform(-0.1, 0.1, 60)
    block, prices = OpenBlock(np.arange(60), np.arange(80), 4800), Prices(u, v, 1e-3)
    pricer = Pricer(a, b, False, torch.device("cpu"))
    excess = np.concatenate([tile for _, tile in pricer._excess(block, prices)], axis=1)
    assert (excess >= cosine - u[:, None] - v).all()
    found = pricer.evaluate(block, prices, 2)
    rest = cosine - u[:, None] - v
    rest[found.row, found.column] = -np.inf
    assert (rest.max(axis=1) <= found.rest).all()
    # Pairs that were not open are only known to stay below the margin.
    assert (found.rest >= -prices.margin).all()


def test_mutual_nearest_neighbours_are_not_always_matched():
    """The first rows of both sides are equal, and yet the optimum matches them elsewhere."""
    up, down = np.array([0.5, np.sqrt(0.75)]), np.array([0.5, -np.sqrt(0.75)])
    a, b = np.array([[1.0, 0], up]), np.array([[1.0, 0], down])
    found = match(a, b)
    assert found.assignment.tolist() == [1, 0]
    assert found.cosines.sum() == pytest.approx(1.0)  # the identity would give 1 − 0.5


def test_ambiguous_counts_the_rows_with_an_equally_good_partner():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, 8))
    assert match(a, a).ambiguous == 0
    # Two equal rows may exchange their partners.
    twice = np.r_[a, a[:1]]
    assert match(twice, twice).ambiguous == 2
    # Four directions in a plane and four between them: both neighbours are equally good.
    angles = np.pi / 2 * np.arange(4)
    cross = np.c_[np.cos(angles), np.sin(angles)]
    between = np.c_[np.cos(angles + np.pi / 4), np.sin(angles + np.pi / 4)]
    assert match(cross, between).ambiguous == 4
    # One row and two equally near columns; then only one of them is nearest.
    assert match(np.array([[1.0, 0]]), np.array([[1.0, 1], [1, -1]])).ambiguous == 1
    assert match(np.array([[1.0, 0]]), np.array([[1.0, 1], [1, -2]])).ambiguous == 0


def test_absolute_cosines_match_antipodal_rows():
    a = np.random.default_rng(0).standard_normal((50, 6))
    found = match(a, -a[::-1], absolute=True)
    assert found.assignment.tolist() == list(range(49, -1, -1))
    assert np.allclose(found.cosines, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_of_any_precision_are_accepted(dtype):
    a = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    found = match(a, a.flip(0))
    assert found.assignment.tolist() == list(range(29, -1, -1))


def test_complex_rows_and_zero_candidates_are_refused():
    with pytest.raises(ValueError, match="real numbers; got complex128"):
        match(np.ones((2, 3), dtype=complex), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"`candidates` must be at least 1; got 0"):
        match(np.ones((2, 3)), np.ones((2, 3)), candidates=0)


def test_a_matching_larger_than_the_free_memory_is_refused(monkeypatch):
    needed = exact.needed_memory(5, 2, 3)
    monkeypatch.setattr(exact, "free_memory", lambda: needed - 1)
    message = r"matching of 5 with 2 rows of 3 needs about .* GB; .* GB of memory are free"
    with pytest.raises(MemoryError, match=message):
        match(np.ones((5, 3)), np.ones((2, 3)))
    for free in (needed, None):
        monkeypatch.setattr(exact, "free_memory", lambda free=free: free)
        match(np.ones((5, 3)), np.ones((2, 3)))


def test_progress_reports_the_pass_over_the_candidates():
    said = []
    a = np.random.default_rng(0).standard_normal((300, 6))
    match(a, a[::-1], candidates=4, progress=said.append)
    assert any(message.startswith("candidates 100%") for message in said)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(8192, 8192), (6000, 8192)])
def test_thousands_of_rows_have_the_optimum_of_scipy(n, m):
    a, b = planted(np.random.default_rng(0), n, m, d=64)
    found = match(a.astype(np.float32), b.astype(np.float32))
    check_certificate(a.astype(np.float32), b.astype(np.float32), found)
    total = total_by_scipy(a.astype(np.float32), b.astype(np.float32))
    assert found.cosines.sum() == pytest.approx(total, abs=1e-9)
