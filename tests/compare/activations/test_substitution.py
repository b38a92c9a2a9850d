import numpy as np
import pytest
import torch
from scipy import optimize

from reseed.compare.activations.substitution import (
    Contribution,
    clip_quality,
    quality_by_coverage,
    random_partners,
    row_products,
    second_best_partners,
    substitution,
)


def contribution(values, residual, rows):
    """Return the contributions of dense latents, by definition."""
    return Contribution(
        (values * (residual @ rows.T)).sum(0), (values**2).sum(0) * (rows**2).sum(1)
    )


class Pair:
    """Two dense dictionaries of different width, with noise that neither reconstructs."""

    def __init__(self, seed, tokens=60, widths=(7, 5), d_in=6):
        rng = np.random.default_rng(seed)
        self.f, self.g = (
            rng.exponential(size=(tokens, n)) * (rng.random((tokens, n)) < 0.4) for n in widths
        )
        self.w, self.v = (rng.standard_normal((n, d_in)) for n in widths)
        self.x = self.f @ self.w + rng.standard_normal((tokens, d_in))

    @property
    def residual(self):
        return self.x - self.f @ self.w

    def error(self, i=None, j=None, scale=1.0):
        """Reconstruct again with i taken out and j put in; return Σ‖·‖² of A's residual."""
        f = self.f.copy()
        if i is not None:
            f[:, i] = 0
        made = f @ self.w
        if j is not None:
            made = made + scale * np.outer(self.g[:, j], self.v[j])
        return float(((self.x - made) ** 2).sum())

    def replaced(self, partner):
        there = np.array(partner)
        cross = np.where(there >= 0, (self.f * self.g[:, there]).sum(0), 0.0)
        scalar = np.where(there >= 0, (self.w * self.v[there]).sum(1), 0.0)
        r = self.residual
        own, other = contribution(self.f, r, self.w), contribution(self.g, r, self.v)
        return substitution(own, other, there, cross, scalar)


PARTNER = [2, 0, -1, 4, 4, 1, 3]


@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_equal_reconstructing_again(seed):
    pair = Pair(seed)
    found, before = pair.replaced(PARTNER), pair.error()
    for i, j in enumerate(PARTNER):
        out = pair.error(i) - before
        if j < 0:
            assert np.isnan([found.damage[i], found.quality[i]]).all()
            continue
        assert found.damage[i] == pytest.approx(out)
        assert found.repaired[i] == pytest.approx(pair.error(i) - pair.error(i, j))
        quality = 1 - (pair.error(i, j) - before) / out
        assert out <= 0 or found.quality[i] == pytest.approx(quality)
        best = optimize.minimize_scalar(lambda s, i=i, j=j: pair.error(i, j, s)).x
        repaired = pair.error(i) - pair.error(i, j, max(best, 0.0))
        assert found.repaired_best[i] == pytest.approx(repaired, abs=1e-6)
    put_in = contribution(pair.g, pair.residual, pair.v).put_in
    assert put_in == pytest.approx([pair.error(j=j) - before for j in range(5)])


def test_a_latent_substitutes_for_itself_perfectly():
    pair = Pair(0)
    pair.g, pair.v = pair.f, pair.w
    found = pair.replaced(range(7))
    harmful = found.damage <= 0
    assert not harmful.all()
    assert found.quality[~harmful] == pytest.approx(1)
    assert np.isnan(found.quality[harmful]).all()


def test_substitution_equals_a_hand_computed_example():
    """One token, x = (3, 0). A has 2·(1, 0), B 1·(1, 0): error 1, taken out 9, replaced 4."""
    own = Contribution(np.array([2.0]), np.array([4.0]))  # r = (1, 0), f (r·w) = 2, f² = 4
    other = Contribution(np.array([1.0]), np.array([1.0]))
    found = substitution(own, other, np.array([0]), np.array([2.0]), np.array([1.0]))
    assert found.damage.tolist() == [8]  # 9 − 1
    assert found.repaired.tolist() == [5]  # 9 − 4
    assert found.repaired_best.tolist() == [9]  # s = 3: no error is left
    assert found.quality.tolist() == [5 / 8]
    assert clip_quality(found.quality_best).tolist() == [1]
    assert found.pooled(np.array([True])) == (5, 8)
    assert own.put_in.tolist() == [0]  # r − 2·(1, 0) = (−1, 0)
    assert other.put_in.tolist() == [-1]


def test_a_silent_latent_repairs_nothing_and_an_opposed_one_does_harm():
    own = Contribution(np.zeros(2), np.ones(2))
    other = Contribution(np.zeros(2), np.array([0.0, 1.0]))
    found = substitution(own, other, np.arange(2), np.array([0.0, 1.0]), np.array([1.0, -1.0]))
    assert found.quality.tolist() == [0, -3]  # r + w + w: error 4 instead of 1
    assert found.quality_best.tolist() == [0, 0]
    assert clip_quality(found.quality).tolist() == [0, 0]


def test_row_products_are_those_of_each_row_with_its_partner():
    a, b = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([[1.0, 1], [0, 2]])
    found = row_products(a, b, torch.tensor([1, -1, 0]))
    assert found.tolist() == [4, 0, 11]


@pytest.mark.parametrize(("entries", "columns"), [(210, 11), (1, 1), (1 << 22, 2048)])
def test_second_best_is_the_nearest_allowed_latent_except_the_partner(
    monkeypatch, entries, columns
):
    """The result holds from both sides and for any size of tiles."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((n, 4))) for n in (50, 30))
    partner = rng.permutation(60)[:50]
    partner[partner >= 30] = -1
    allowed = rng.random(50) < 0.7, rng.random(30) < 0.6
    monkeypatch.setattr("reseed.compare.nearest.BLOCK_ENTRIES", entries)
    monkeypatch.setattr("reseed.compare.nearest._MOST_COLUMNS", columns)
    found = second_best_partners(a, b, torch.from_numpy(partner), *map(torch.from_numpy, allowed))
    cosines = (a @ b.T).numpy()
    back = np.full(30, -1)
    back[partner[partner >= 0]] = np.flatnonzero(partner >= 0)
    for seconds, table, taken, own, others in (
        (found[0], cosines, partner, *allowed),
        (found[1], cosines.T, back, *allowed[::-1]),
    ):
        assert (seconds.numpy()[~own] == -1).all()
        for i in np.flatnonzero(own):
            rest = [j for j in np.flatnonzero(others) if j != taken[i]]
            assert seconds[i] == max(rest, key=lambda j, i=i: table[i, j])


def test_there_is_no_second_best_without_another_allowed_latent():
    a, one, none = torch.eye(2), torch.tensor([True, False]), torch.zeros(2, dtype=torch.bool)
    both = one | True
    found = second_best_partners(a, a, torch.tensor([0, 1]), both, one)
    assert [x.tolist() for x in found] == [[-1, 0], [1, -1]]
    for allowed in ((none, both), (both, none)):
        found = second_best_partners(a, a, torch.tensor([0, 1]), *allowed)
        assert [x.tolist() for x in found] == [[-1, -1], [-1, -1]]


def test_random_partners_fire_about_as_often_and_are_not_the_match():
    rng = np.random.default_rng(0)
    firing_a, firing_b = rng.geometric(0.01, 400), rng.geometric(0.01, 300)
    allowed = firing_b >= 10
    partner = rng.permutation(400)
    partner[partner >= 300] = -1
    edges = np.quantile(firing_b[allowed], np.arange(1, 10) / 10)
    decile_a, decile_b = (np.searchsorted(edges, x, side="right") for x in (firing_a, firing_b))
    seen = []
    for seed in range(300):
        found = random_partners(firing_a, firing_b, partner, allowed, seed)
        assert (found >= 0).all()
        assert allowed[found].all()
        assert (decile_b[found] == decile_a).all()
        assert (found != partner).all()
        seen.append(found[0])
    others = np.flatnonzero(allowed & (decile_b == decile_a[0]))
    assert set(seen) == set(others) - {partner[0]}, "every other latent can be drawn"
    again = random_partners(firing_a, firing_b, partner, allowed, 299)
    assert np.array_equal(again, found)


def test_there_is_no_random_partner_without_another_allowed_latent():
    firing, allowed = np.array([5, 5]), np.array([True, False])
    partner = np.array([0, 1])
    assert random_partners(firing, firing, partner, allowed, 0).tolist() == [-1, 0]
    assert random_partners(firing, firing, partner, ~allowed & allowed, 0).tolist() == [-1, -1]


def test_quality_against_coverage_equals_a_hand_computed_example():
    quality = np.array([0.5, np.nan, 1.0, 0.0])
    found = quality_by_coverage(quality, rank=np.array([0.8, 1.0, 0.9, 0.1]))
    assert found.tolist() == [1.0, 0.75, 0.5]
    assert quality_by_coverage(np.array([np.nan]), np.ones(1)).tolist() == []
