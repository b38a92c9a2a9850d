"""The pass over all pairs of latents, checked with dense float64 matrices."""

import numpy as np
import pytest

from reseed.compare import nearest
from reseed.compare.dictionary import Rows, both_cosines, row_cosines, unit32
from reseed.compare.nearest import float32_error, scan_pairs
from reseed.compare.pair import compare_pair


def dense(unit, a, b):
    """Return c_enc and c_dec of all pairs, float64."""
    return unit(a.encoder) @ unit(b.encoder).T, unit(a.decoder) @ unit(b.decoder).T


@pytest.fixture
def pair(dictionary):
    rng = np.random.default_rng(3)
    # Latents of B are noisy copies of those of A; 13 latents of A have two copies.
    rows = rng.standard_normal((2, 60, 16))
    origin = np.concatenate([np.arange(40), np.arange(13)])
    noise = rng.uniform(0, 1.3, (1, 53, 1)) * rng.standard_normal((2, 53, 16))
    a = dictionary(*rows, seed="a", firing=rng.integers(0, 30, 60))
    return a, dictionary(*rows[:, origin] + noise, seed="b", firing=rng.integers(0, 30, 53))


@pytest.mark.parametrize("entries", [1, 50, 7 * 53, 1 << 22])
def test_the_scan_agrees_with_dense_matrices_at_any_block_size(pair, monkeypatch, entries, unit):
    monkeypatch.setattr(nearest, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(nearest, "_MOST_COLUMNS", 20)
    a, b = pair
    live_a, live_b = a.live(10), b.live(10)
    c_enc, c_dec = dense(unit, a, b)
    both = np.minimum(c_enc, c_dec)
    near = both >= 0.7
    found = scan_pairs(Rows.of(a), Rows.of(b), 0.7, live_a, live_b)
    assert found.within_a.tolist() == near.sum(axis=1).tolist()
    assert found.within_b.tolist() == near.sum(axis=0).tolist()
    assert found.live_within_a.tolist() == near[:, live_b].sum(axis=1).tolist()
    assert found.live_within_b.tolist() == near[live_a].sum(axis=0).tolist()
    assert 2 in found.within_a
    for largest, mutual, table in (
        (found.by_decoder, found.mutual_decoder, c_dec),
        (found.by_both, found.mutual_both, both),
    ):
        assert largest.a == pytest.approx(table.max(axis=1), abs=1e-6)
        assert largest.b == pytest.approx(table.max(axis=0), abs=1e-6)
        assert largest.of_a.tolist() == table.argmax(axis=1).tolist()
        wanted = [
            (i, j)
            for i, j in enumerate(table.argmax(axis=1))
            if table[:, j].argmax() == i and table[i, j] >= 0.7
        ]
        assert 5 < len(wanted) < 40
        assert sorted(zip(*mutual, strict=True)) == wanted


def test_similarity_measures_agree_with_dense_matrices(pair, unit):
    a, b = pair
    live_a, live_b = a.live(10), b.live(10)
    c_enc, c_dec = dense(unit, a, b)
    near = np.minimum(c_enc, c_dec) >= 0.7
    measures = compare_pair(a, b).measures
    best_a, best_b = c_dec.max(axis=1), c_dec.max(axis=0)
    assert measures["mmcs_a"] == pytest.approx(best_a.mean(), abs=1e-6)
    assert measures["mmcs_b"] == pytest.approx(best_b.mean(), abs=1e-6)
    assert measures["mmcs"] == pytest.approx((best_a.mean() + best_b.mean()) / 2, abs=1e-6)
    wanted = (best_a[live_a].mean() + best_b[live_b].mean()) / 2
    assert measures["mmcs_live"] == pytest.approx(wanted, abs=1e-6)
    split_a, split_b = near.sum(axis=1) >= 2, near.sum(axis=0) >= 2
    assert split_a.sum() > 1
    assert measures["split_fraction_a"] == split_a.mean()
    assert measures["split_fraction_b"] == split_b.mean()
    assert measures["split_fraction"] == (split_a.sum() + split_b.sum()) / 113
    kept = near[np.ix_(live_a, live_b)]
    split = (kept.sum(axis=1) >= 2).sum() + (kept.sum(axis=0) >= 2).sum()
    assert measures["split_fraction_live"] == split / sum(kept.shape)
    mutual = [
        (i, j) for i, j in enumerate(c_dec.argmax(axis=1))
        if c_dec[:, j].argmax() == i and c_dec[i, j] >= 0.7
    ]  # fmt: skip
    assert measures["mutual_nearest_decoder"] == 2 * len(mutual) / 113
    both = sum(live_a[i] and live_b[j] for i, j in mutual)
    assert measures["mutual_nearest_decoder_live"] == 2 * both / sum(kept.shape)


def test_thresholds_are_decided_in_float64(dictionary, unit):
    """Cosines closer to τ than float32 resolves are decided as in float64."""
    rng = np.random.default_rng(0)
    d, tau = 512, 0.7
    direction = unit(rng.standard_normal((1, d)))[0]
    other = rng.standard_normal((4000, d))
    other = unit(other - np.outer(other @ direction, direction))
    wanted = tau + rng.uniform(-2e-7, 2e-7, 4000)
    rows = wanted[:, None] * direction + np.sqrt(1 - wanted**2)[:, None] * other
    a, b = dictionary(direction[None]), dictionary(rows, seed="1")
    exact = dense(unit, a, b)[1][0] >= tau
    rough = (unit32(a.decoder) @ unit32(b.decoder).T)[0] >= np.float32(tau)
    assert (exact != rough).any(), "float32 alone must get some wrong for this to test anything"
    found = scan_pairs(Rows.of(a), Rows.of(b), tau, np.ones(1, bool), np.ones(4000, bool))
    assert found.within_b.astype(bool).tolist() == exact.tolist()


@pytest.mark.parametrize("d_in", [2, 64, 4096])
def test_the_error_of_float32_cosines_is_below_the_guard(d_in, unit):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((40, d_in)).astype(np.float32)
    b = np.concatenate([a, rng.standard_normal((40, d_in)).astype(np.float32)])
    error = np.abs(unit32(a) @ unit32(b).T - unit(a) @ unit(b).T).max()
    assert error < float32_error(d_in) / 2


def test_equal_rows_form_one_mutual_pair(dictionary):
    a = dictionary(np.repeat(np.eye(3, 5), 2, axis=0))
    measures = compare_pair(a, dictionary(np.eye(3, 5), seed="1")).measures
    assert measures["mutual_nearest"] == measures["mutual_nearest_decoder"] == 2 * 3 / 9
    assert measures["split_fraction_a"] == 0
    assert measures["split_fraction_b"] == 1
    assert measures["mmcs"] == 1


def test_latents_without_direction_have_no_near_latent(dictionary):
    rows = np.random.default_rng(0).standard_normal((2, 10, 8))
    broken = rows.copy()
    broken[0, 4], broken[1, 7] = 0, np.nan
    found = compare_pair(dictionary(*rows), dictionary(*broken, seed="1"))
    assert found.b.within.tolist() == [1, 1, 1, 1, 0, 1, 1, 0, 1, 1]
    assert found.measures["mutual_nearest"] == 2 * 8 / 20
    assert found.measures["mmcs_b"] == pytest.approx(0.8)


def test_cosines_of_chosen_pairs_agree_with_dense_matrices(unit):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30, 6)).astype(np.float32)
    i, j = rng.integers(0, 30, 100), rng.integers(0, 30, 100)
    assert row_cosines(a, b, i, j) == pytest.approx((unit(a) @ unit(b).T)[i, j], abs=1e-14)
    found = both_cosines(Rows(a, b), Rows(b, a), i, j)
    tables = unit(a) @ unit(b).T, unit(b) @ unit(a).T
    assert found == pytest.approx(np.minimum(*tables)[i, j], abs=1e-14)
