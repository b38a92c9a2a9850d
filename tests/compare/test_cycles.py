"""Tests of cycles over three seeds, by enumeration."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit

from reseed.compare.cell import compare_cell
from reseed.compare.sharing_profile import CYCLES, _estimate, cycle_estimates


def matching(rng, n, m, truth_n, truth_m):
    """Return partners of both sides: latents with the same truth, or random ones."""
    forward, back = np.full(n, -1), np.full(m, -1)
    for i in rng.permutation(n):
        wanted = np.flatnonzero((truth_m == truth_n[i]) & (back < 0))
        free = np.flatnonzero(back < 0)
        chosen = wanted if wanted.size and rng.random() < 0.8 else free
        if chosen.size and rng.random() < 0.9:
            j = rng.choice(chosen)
            forward[i], back[j] = j, i
    return forward, back


@pytest.fixture
def sides():
    rng = np.random.default_rng(0)
    sizes = [30, 24, 30, 27]
    truth = [rng.permutation(40)[:size] for size in sizes]
    found = {}
    for s, t in combinations(range(4), 2):
        encoder, decoder = (matching(rng, sizes[s], sizes[t], truth[s], truth[t]) for _ in range(2))
        for pair, side in (((s, t), 0), ((t, s), 1)):
            partner, other = encoder[side], decoder[side]
            shared = (partner >= 0) & (partner == other)
            found[pair] = SimpleNamespace(
                partner_encoder=partner, partner_decoder=other, shared=shared
            )
    return found, sizes


def by_enumeration(sides, sizes, seeds):
    """Return each estimate, counted over every latent as the start."""
    counts = {name: np.zeros(2) for name in CYCLES}
    for triple in combinations(seeds, 3):
        for which in ("encoder", "decoder"):
            r, s, t = triple
            closed = 0
            for i in range(sizes[r]):
                j = getattr(sides[r, s], f"partner_{which}")[i]
                k = getattr(sides[s, t], f"partner_{which}")[j] if j >= 0 else -1
                closed += k >= 0 and getattr(sides[r, t], f"partner_{which}")[i] == k
            counts[f"cycle_{which}"] += [3 * closed, sum(sizes[x] for x in triple)]
        for middle in triple:
            a, c = (x for x in triple if x != middle)
            for j in range(sizes[middle]):
                if not (sides[middle, a].shared[j] and sides[middle, c].shared[j]):
                    continue
                i, k = sides[middle, a].partner_encoder[j], sides[middle, c].partner_encoder[j]
                by_encoder = sides[a, c].partner_encoder[i] == k
                by_decoder = sides[a, c].partner_decoder[i] == k
                counts["cycle_encoder_shared"] += [by_encoder, 1]
                counts["cycle_decoder_shared"] += [by_decoder, 1]
                counts["cycle_shared"] += [by_encoder and by_decoder, 1]
    return {name: closed / out_of for name, (closed, out_of) in counts.items()}


def test_cycle_estimates_equal_an_enumeration(sides):
    sides, sizes = sides
    found = cycle_estimates(sides)
    wanted = by_enumeration(sides, sizes, range(4))
    without = [by_enumeration(sides, sizes, [t for t in range(4) if t != s]) for s in range(4)]
    for name in CYCLES:
        assert 0 < wanted[name] < 1, "the example must not be trivial"
        assert found[name].mean == pytest.approx(wanted[name])
        values = np.array([x[name] for x in without])
        error = np.sqrt(3 / 4 * np.square(values - values.mean()).sum())
        assert found[name].standard_error == pytest.approx(error)
        assert found[name].low < found[name].mean < found[name].high


def test_permuted_copies_close_every_cycle(dictionary, settings):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 30, 12))
    runs = [dictionary(*rows[:, rng.permutation(30)], seed=str(s)) for s in range(3)]
    found = compare_cell(runs, [], settings).estimates
    assert [found[name].mean for name in CYCLES] == [1] * 5


def test_unshared_latents_close_almost_no_cycle(dictionary, settings):
    rng = np.random.default_rng(0)
    runs = [dictionary(*rng.standard_normal((2, 200, 64)), seed=str(s)) for s in range(4)]
    found = compare_cell(runs, [], settings).estimates
    assert found["cycle_encoder"].mean < 0.05
    assert np.isnan(found["cycle_shared"].mean)
    assert found["cycle_shared"].reason == "no latent is shared by two others"


def test_few_seeds_have_no_interval_and_the_reason(sides):
    sides, _ = sides
    three = {pair: side for pair, side in sides.items() if 3 not in pair}
    found = cycle_estimates(three)["cycle_encoder"]
    assert found.low is None
    assert found.reason == "fewer than 4 seeds: one triple has no interval"
    two = cycle_estimates({pair: side for pair, side in three.items() if 2 not in pair})
    assert np.isnan(two["cycle_shared"].mean)
    assert two["cycle_shared"].reason == "a cycle needs 3 seeds"


@pytest.mark.parametrize("n", [4, 5, 9])
def test_the_leave_one_out_interval_of_triples_covers_the_truth(n):
    """Simulate seeds with effects on all of their triples, and noise per triple."""
    rng = np.random.default_rng(0)

    def draw(draws, seeds):
        u = 0.2 * rng.standard_normal((draws, seeds))
        triples = list(combinations(range(seeds), 3))
        effect = np.stack([u[:, list(triple)].sum(axis=1) for triple in triples], axis=1)
        return triples, expit(0.3 + effect + 0.1 * rng.standard_normal(effect.shape))

    truth = draw(400_000, 3)[1].mean()
    triples, values = draw(600, n)
    found = [_estimate(triples, [(round(1000 * x), 1000) for x in row], n, 0.95) for row in values]
    covered = np.mean([x.low <= truth <= x.high for x in found])
    assert 0.92 <= covered <= 0.99
