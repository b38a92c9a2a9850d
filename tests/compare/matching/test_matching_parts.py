"""Invariants of each part of the exact assignment, checked with dense float64 cosines."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from reseed.compare.matching import candidates as listing
from reseed.compare.matching.candidates import ROUNDING, candidates, product_error
from reseed.compare.matching.graph import Assignment, Edges, add_edges, no_edges
from reseed.compare.matching.paths import augment, release
from reseed.compare.matching.pricing import Bounds, Pricer, Prices, centre_prices, open_pairs
from reseed.compare.matching.rows import distinct_rows
from reseed.compare.matching.solve import auction, solve
from reseed.system.compiling import in_ranges

CPU = torch.device("cpu")


def dense(a, b, absolute=False):
    cosine = (a.values * a.inverse_norms[:, None]) @ (b.values * b.inverse_norms[:, None]).T
    return np.abs(cosine) if absolute else cosine


def two_sides(n=300, m=260, d=12, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, d)) + shift, rng.standard_normal((m, d)) - shift
    return distinct_rows(a.astype(np.float32)), distinct_rows(b)


def whole_graph(a, b):
    i, j = np.indices((len(a), len(b)))
    return add_edges(a, b, i.ravel(), j.ravel(), absolute=False, existing=no_edges(len(a), len(b)))


# Rows


def test_distinct_rows_groups_copies_and_leaves_out_rows_without_direction():
    rows = np.array([[1.0, 2], [0, 0], [np.nan, 1], [-0.0, 3], [1, 2], [0.0, 3], [2, 4]])
    found = distinct_rows(rows.astype(np.float32))
    assert found.group.tolist() == [0, -1, -1, 1, 0, 1, 2]
    assert found.copies.tolist() == [2, 2, 1]
    assert found.count == 5
    norms = np.linalg.norm(found.values.astype(float), axis=1)
    assert found.inverse_norms * norms == pytest.approx(np.ones(3))


def test_the_key_does_not_depend_on_the_order_of_the_rows():
    rows = np.random.default_rng(0).standard_normal((50, 4))
    assert distinct_rows(rows).key == distinct_rows(rows[::-1].copy()).key
    assert distinct_rows(rows).key != distinct_rows(rows + 1).key


def test_rounding_errors_are_exact():
    found = distinct_rows(np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32))
    unit = found.values.astype(float) * found.inverse_norms[:, None]
    error = np.linalg.norm(unit - found.rounded.values.double().numpy(), axis=1)
    assert found.rounded.errors == pytest.approx(error, rel=1e-12)
    assert 0 < error.max() < 2**-8


# The pass over all pairs


@pytest.mark.parametrize("shift", [0.0, 3.0])  # 3: all cosines are near −1
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("tile", [(2048, 4096), (64, 100)])
def test_no_unlisted_pair_exceeds_its_bounds(monkeypatch, shift, absolute, tile):
    monkeypatch.setattr(listing, "_TILE", tile)
    a, b = two_sides(shift=shift)
    cosine = dense(a, b, absolute)
    by_row, by_column = candidates(a, b, absolute=absolute, count=7)
    for lists, scores in ((by_row, cosine), (by_column, cosine.T)):
        for i, row in enumerate(scores):
            assert len(set(lists.best[i].tolist())) == 7
            rest = np.delete(row, lists.best[i])
            assert rest.max() <= lists.bound[i]
            # The bound is only as loose as low precision requires.
            assert lists.bound[i] <= np.sort(row)[-7] + 0.02


def test_all_pairs_are_listed_if_there_are_fewer_than_the_candidates():
    a, b = two_sides(5, 4)
    by_row, by_column = candidates(a, b, absolute=False, count=8)
    assert sorted(by_row.best[0].tolist()) == [-1, -1, -1, -1, 0, 1, 2, 3]
    assert (by_row.bound == -np.inf).all()
    assert (by_column.bound == -np.inf).all()
    assert sorted(zip(*map(np.ndarray.tolist, by_row.pairs()), strict=True)) == [
        (i, j) for i in range(5) for j in range(4)
    ]


@pytest.mark.parametrize("d", [1, 3, 700])
def test_product_errors_stay_within_the_bounds(d):
    rng = np.random.default_rng(d)
    rows = rng.standard_normal((2, 200, d)) * np.exp(3 * rng.standard_normal((2, 1, d)))
    a, b = (distinct_rows(x) for x in rows)
    stored = (a.rounded.values @ b.rounded.values.T).double().numpy()
    off = np.abs(dense(a, b) - stored) - ROUNDING * np.abs(stored)
    error = product_error(a, b)
    assert (off <= error.of_row[:, None]).all()
    assert (off <= error.of_column).all()


# The graph


def test_edges_are_sorted_and_unique_and_keep_known_cosines():
    a, b = two_sides(20, 30)
    rng = np.random.default_rng(1)
    row, column = rng.integers(0, 20, 200), rng.integers(0, 30, 200)
    first = add_edges(a, b, row[:120], column[:120], absolute=False, existing=no_edges(20, 30))
    both = add_edges(a, b, row[100:], column[100:], absolute=False, existing=first)
    assert sorted(set(zip(row.tolist(), column.tolist(), strict=True))) == list(
        zip(both.row.tolist(), both.column.tolist(), strict=True)
    )
    assert both.cosine == pytest.approx(dense(a, b)[both.row, both.column], abs=1e-14)
    start, place = both.by_column
    for j in range(30):
        assert both.row[place[start[j] : start[j + 1]]].tolist() == sorted(set(row[column == j]))
    prices = rng.random(30)
    worth = np.full((20, 30), -np.inf)
    worth[both.row, both.column] = both.cosine - prices[both.column]
    assert np.array_equal(both.profit(prices), worth.max(axis=1))
    assert np.array_equal(both.cosine_of(both.row, both.column), both.cosine)


# The auction and the paths


def test_after_an_auction_every_row_is_within_epsilon_of_its_best():
    a, b = two_sides(120, 120)
    edges, cosine, step = whole_graph(a, b), dense(a, b), 1e-3
    prices, owner, partner = np.zeros(120), np.full(120, -1), np.full(120, -1)
    without = auction(edges, prices, owner, partner, np.full(120, -np.inf), step, 10**6)
    assert without == 0
    assert np.array_equal(owner[partner], np.arange(120))
    worth = cosine - prices
    assert (worth[np.arange(120), partner] >= worth.max(axis=1) - step - 1e-12).all()
    i, j = linear_sum_assignment(cosine, maximize=True)
    assert cosine[np.arange(120), partner].sum() >= cosine[i, j].sum() - 120 * step


def test_a_row_does_not_bid_below_its_least_worth():
    a, b = two_sides(60, 60)
    edges, least = whole_graph(a, b), np.full(60, 0.6)
    prices, owner, partner = np.zeros(60), np.full(60, -1), np.full(60, -1)
    without = auction(edges, prices, owner, partner, least, 1e-3, 10**6)
    assert without == (partner < 0).sum() > 0
    worth = (dense(a, b) - prices)[partner < 0]
    assert (worth < 0.6).all()


def checked(edges, state, surplus):
    """Assert feasible prices on the graph, tight matched pairs and free columns that cost 0."""
    slack = state.row_price[edges.row] + state.column_price[edges.column] - edges.cosine
    assert slack.min() > -1e-13
    at = state.partner
    own = edges.cosine_of(state.row_of, at)
    assert state.row_price[state.row_of] + state.column_price[at] == pytest.approx(own, abs=1e-12)
    if surplus:
        assert state.column_price.min() > -1e-15
        assert not state.column_price[state.has_room].any()


@pytest.mark.parametrize(("n", "m"), [(80, 80), (70, 80), (10, 80)])
@pytest.mark.parametrize("start", ["zero", "anything"])
def test_paths_find_the_optimum_from_any_prices(n, m, start):
    a, b = two_sides(n, m, d=5)
    edges, cosine = whole_graph(a, b), dense(a, b)
    prices = np.zeros(m) if start == "zero" else np.random.default_rng(2).random(m)
    state = Assignment.empty(a.copies, b.copies, prices)
    state.take(np.arange(5), np.arange(5))  # most are not tight, so `tighten` undoes them
    state.tighten(edges)
    assert not len(augment(edges, state))
    if n < m:
        release(edges, state)
    checked(edges, state, n < m)
    i, j = linear_sum_assignment(cosine, maximize=True)
    assert cosine[np.arange(n), state.partner].sum() == pytest.approx(cosine[i, j].sum(), abs=1e-12)


def test_augment_returns_the_rows_for_which_the_graph_has_no_column():
    """Three rows compete for two columns, so exactly one is stuck."""
    a, b = two_sides(6, 6)
    row, column = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5]), np.array([0, 1, 0, 1, 0, 1, 3, 4, 5])
    edges = add_edges(a, b, row, column, absolute=False, existing=no_edges(6, 6))
    state = Assignment.empty(a.copies, b.copies, np.zeros(6))
    state.tighten(edges)
    stuck = augment(edges, state)
    assert len(stuck) == 1
    assert stuck[0] in (0, 1, 2)
    assert state.unmatched.tolist() == stuck.tolist()


# Pricing


def small_prices(a, b, seed=0):
    rng = np.random.default_rng(seed)
    return Prices(0.25 + 0.3 * rng.random(len(a)), 0.2 * rng.random(len(b)), margin=0.01)


def test_open_pairs_are_those_that_no_bound_covers():
    a, b = two_sides()
    rng = np.random.default_rng(3)
    prices = small_prices(a, b)
    bounds = Bounds(0.3 + 0.6 * rng.random(len(a)), 0.3 + 0.6 * rng.random(len(b)))
    for more in range(3):
        covered = np.minimum(bounds.row[:, None], bounds.column)
        for p, q in bounds.sums:
            covered = np.minimum(covered, p[:, None] + q)
        is_open = covered > prices.u[:, None] + prices.v - prices.margin
        seen = np.zeros_like(is_open)
        count = 0
        for block in open_pairs(bounds, prices):
            assert not seen[np.ix_(block.row, block.column)].any()
            seen[np.ix_(block.row, block.column)] = True
            count += block.count
        assert seen[is_open].all()
        assert count == is_open.sum() > 0
        bounds.add(0.4 + 0.2 * rng.random(len(a)), 0.2 * rng.random(len(b)) - 0.1 * more)


@pytest.mark.parametrize("count", [1, 4, 50])
def test_pairs_left_out_by_the_pricer_stay_within_rest(count):
    a, b = two_sides()
    prices, pricer = small_prices(a, b), Pricer(a, b, absolute=False, device=CPU)
    excess = dense(a, b) - prices.u[:, None] - prices.v
    everything = Bounds(np.ones(len(a)), np.ones(len(b)))
    for block in open_pairs(everything, prices):
        found = pricer.evaluate(block, prices, count)
        listed = np.zeros_like(excess, dtype=bool)
        listed[found.row, found.column] = True
        for i, rest in zip(block.row, found.rest, strict=True):
            assert excess[i][~listed[i]].max(initial=-1) <= rest
            assert rest >= -prices.margin
            assert rest <= max(-prices.margin + 1e-8, np.sort(excess[i])[-count - 1] + 0.03)
        proved = pricer.prove(block, prices, count)
        above = set(zip(*map(np.ndarray.tolist, np.nonzero(excess > 1e-12)), strict=True))
        assert set(zip(proved.row.tolist(), proved.column.tolist(), strict=True)) == {
            (i, j) for i, j in above if i in block.row
        }


def test_centring_keeps_prices_feasible_and_their_sum_constant():
    a, b = two_sides(100, 100)
    edges = whole_graph(a, b)
    state = Assignment.empty(a.copies, b.copies, np.zeros(100))
    state.tighten(edges)
    augment(edges, state)
    before = state.row_price.sum() + state.column_price.sum()
    u, v, partner = state.row_price, state.column_price, state.partner
    limit = Bounds(np.full(100, 0.5), np.full(100, 0.5))
    apart = np.abs(u - v[partner]).sum()
    centre_prices(edges, u, v, partner, limit, free_columns=False)
    assert np.abs(u - v[partner]).sum() < apart
    assert u.sum() + v.sum() == pytest.approx(before)
    checked(edges, state, surplus=False)


def test_solve_terminates_and_is_optimal_with_very_many_ties():
    """Signs in 16 dimensions: cosines are multiples of 1/8, and each row has hundreds of ties."""
    rows = np.random.default_rng(0).choice([-1.0, 1.0], (2, 700, 16))
    a, b = (distinct_rows(x) for x in rows)
    if a.count > b.count:
        a, b = b, a
    found = solve(a, b, count=2)
    total = found.edges.cosine_of(found.state.row_of, found.state.partner).sum()
    cosine = np.repeat(np.repeat(dense(a, b), a.copies, axis=0), b.copies, axis=1)
    i, j = linear_sum_assignment(cosine, maximize=True)
    assert total == pytest.approx(cosine[i, j].sum(), abs=1e-9)


def test_more_rows_than_columns_are_refused():
    a, b = two_sides(30, 20)
    with pytest.raises(ValueError, match=r"must not have more rows than `b`; got 30 and 20"):
        solve(a, b)


@pytest.mark.parametrize("threads", [1, 3])
def test_ranges_cover_everything_once(monkeypatch, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen = np.zeros(1000, dtype=int)

    def task(start, stop):
        seen[start:stop] += 1

    in_ranges(task, 1000)
    assert (seen == 1).all()
    with pytest.raises(ZeroDivisionError):
        in_ranges(lambda start, stop: 1 // 0, 1000)


def test_an_empty_graph_has_its_size():
    assert (no_edges(3, 4).rows, no_edges(3, 4).columns, len(no_edges(3, 4))) == (3, 4, 0)
    assert isinstance(no_edges(1, 1), Edges)
