"""Tests of the estimated probability that another seed shares a latent."""

import re

import numpy as np
import pytest
from scipy import stats

from reseed.compare.sharing_profile import JEFFREYS, fit_prior, reproducibility


def drawn(alpha, beta, others, size, seed=0):
    rng = np.random.default_rng(seed)
    chance = rng.beta(alpha, beta, size)
    return chance, rng.binomial(others, chance)


@pytest.mark.parametrize(("alpha", "beta", "others"), [(0.3, 0.5, 8), (2, 1, 4), (1.5, 6, 2)])
def test_the_fit_maximises_the_likelihood(alpha, beta, others):
    _, m = drawn(alpha, beta, others, 20_000)
    found = fit_prior(np.bincount(m, minlength=others + 1))

    def likelihood(a, b):
        return stats.betabinom.logpmf(m, others, a, b).sum()

    best = likelihood(found.alpha, found.beta)
    assert found.fitted
    assert best > likelihood(alpha, beta)
    for a, b in ((1.02, 1), (0.98, 1), (1, 1.02), (1, 0.98), (1.02, 1.02), (0.98, 0.98)):
        assert best > likelihood(found.alpha * a, found.beta * b)
    assert found[:2] == pytest.approx((alpha, beta), rel=0.25)


def test_reproducibility_is_the_beta_posterior():
    # m is 1 for all: without spread there is no fit.
    found = reproducibility(np.array([1, 1, 1, 1]), 2)
    assert found.prior == JEFFREYS
    assert found.mean == pytest.approx([1.5 / 3] * 4)
    beta = stats.beta(1.5, 1.5)
    assert found.low == pytest.approx([beta.ppf(0.025)] * 4)
    assert found.high == pytest.approx([beta.ppf(0.975)] * 4)
    _, m = drawn(0.4, 0.6, 5, 5000)
    found = reproducibility(m, 5, confidence=0.8)
    alpha, beta, _ = found.prior
    assert found.mean == pytest.approx((m + alpha) / (5 + alpha + beta))
    assert found.low == pytest.approx(stats.beta.ppf(0.1, m + alpha, 5 - m + beta))
    assert found.high == pytest.approx(stats.beta.ppf(0.9, m + alpha, 5 - m + beta))


@pytest.mark.parametrize(
    "counts",
    [[10, 20], [100, 0, 0], [0, 0, 50], [60, 0, 0, 40], [0, 0, 0], [0, 30, 0], [10, 80, 10]],
    ids=["one other", "none", "all", "all or none", "no latents", "all once", "spread too little"],
)
def test_without_a_proper_fit_the_prior_is_jeffreys(counts):
    assert fit_prior(np.array(counts)) == JEFFREYS


@pytest.mark.parametrize("others", [2, 4, 8])
def test_intervals_cover_the_probabilities_at_their_confidence(others):
    chance, m = drawn(0.6, 0.9, others, 40_000)
    found = reproducibility(m, others)
    covered = np.mean((found.low <= chance) & (chance <= found.high))
    assert covered == pytest.approx(0.95, abs=0.01)
    for value in range(others + 1):  # the estimate is the mean probability of latents with that m
        of = m == value
        assert found.mean[of][0] == pytest.approx(chance[of].mean(), abs=0.02)


def test_excluded_latents_do_not_affect_the_prior():
    _, m = drawn(2, 1, 4, 3000)
    more = np.concatenate([m, np.zeros(3000, int)])
    kept = np.arange(6000) < 3000
    found = reproducibility(more, 4, kept)
    assert found.prior == reproducibility(m, 4).prior
    assert found.prior != reproducibility(more, 4).prior
    assert len(found.mean) == 6000


def test_sharing_with_more_seeds_than_there_are_is_refused():
    message = "latents can be shared with 0 to 2 of 2 others; got 0 to 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        reproducibility(np.array([0, 3]), 2)
