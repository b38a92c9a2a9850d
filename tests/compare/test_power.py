"""Power of Welch's test, the seeds that it needs, and predictions of other budgets."""

from math import log, sqrt

import numpy as np
import pytest
from scipy import optimize, special, stats

from reseed.compare.power import (
    error_ratios,
    predict_budget,
    seeds_needed,
    visible_difference,
    welch_power,
)
from reseed.compare.registry import Interval


@pytest.mark.parametrize(("n", "units"), [(3, 6.07), (5, 4.66), (9, 4.25)])
def test_visible_differences_of_equal_cells_equal_the_published_ones(n, units):
    """The units are the true standard error of one cell's mean, at 80% power."""
    assert visible_difference(n, n, 1, 1) == pytest.approx(units, abs=0.02)


@pytest.mark.parametrize(
    ("n_a", "n_b", "se_a", "se_b", "confidence"),
    [(3, 3, 1, 1, 0.95), (3, 7, 1, 0.3, 0.95), (3, 7, 0.3, 1, 0.95), (4, 3, 1, 2, 0.9)],
)
def test_the_power_equals_that_of_simulated_studies(n_a, n_b, se_a, se_b, confidence):
    """The simulation uses scipy's Welch test."""
    rng, studies = np.random.default_rng(0), 60_000
    difference = 4 * np.hypot(se_a, se_b)
    a = rng.normal(difference, se_a * sqrt(n_a), (studies, n_a))
    b = rng.normal(0, se_b * sqrt(n_b), (studies, n_b))
    found = stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 1 - confidence
    error = found.std() / sqrt(studies)
    power = welch_power(difference, n_a, n_b, se_a, se_b, confidence)
    assert power == pytest.approx(found.mean(), abs=3.5 * error)


def test_without_an_error_in_one_cell_the_test_is_that_of_one_sample():
    """The degrees of freedom are then n − 1 of the other cell."""
    critical = stats.t.ppf(0.975, 4)

    def missing(shift):
        return stats.nct.sf(critical, 4, shift) + stats.nct.cdf(-critical, 4, shift) - 0.8

    wanted = optimize.brentq(missing, 1, 9)
    assert visible_difference(3, 5, 0, 2) == pytest.approx(2 * wanted, rel=1e-4)


def test_with_many_seeds_the_visible_difference_is_that_of_known_errors():
    wanted = (stats.norm.ppf(0.975) + stats.norm.ppf(0.9)) * 5
    assert visible_difference(10**6, 10**6, 3, 4, power=0.9) == pytest.approx(wanted, rel=1e-4)


def test_the_visible_difference_has_the_power_and_the_scale_of_the_errors():
    found = visible_difference(3, 6, 0.02, 0.05, power=0.7, confidence=0.9)
    assert welch_power(found, 3, 6, 0.02, 0.05, 0.9) == pytest.approx(0.7)
    assert visible_difference(6, 3, 0.5, 0.2, 0.7, 0.9) == pytest.approx(10 * found)


@pytest.mark.parametrize("n", [3, 4, 8, 30])
def test_the_larger_of_two_spreads_suffices(n):
    """`reseed power` says so of the seeds that two rows of different spread need."""
    most = visible_difference(n, n, 1, 1)
    for ratio in np.linspace(0, 0.99, 20):
        assert visible_difference(n, n, 1, ratio) < most


def test_a_standard_error_of_three_seeds_is_a_sixth_to_twice_the_true_one():
    assert error_ratios(3) == pytest.approx((0.16, 1.92), abs=0.005)
    rng, n = np.random.default_rng(1), 5
    s = rng.normal(0, 1, (100_000, n)).std(axis=1, ddof=1)
    assert error_ratios(n, 0.8) == pytest.approx(np.quantile(s, [0.1, 0.9]), rel=0.01)


@pytest.mark.parametrize(("spread", "power"), [(0.03, 0.8), (0.05, 0.8), (0.05, 0.95), (0.4, 0.8)])
def test_the_seeds_needed_are_the_fewest_that_suffice(spread, power):
    n = seeds_needed(spread, 0.05, power)
    assert n is not None
    assert n > 3

    def power_of(seeds):
        return welch_power(0.05, seeds, seeds, spread / sqrt(seeds), spread / sqrt(seeds))

    assert power_of(n - 1) < power <= power_of(n)


def test_three_seeds_are_the_fewest_and_a_hundred_thousand_the_most():
    assert seeds_needed(0.001, 0.05) == 3
    assert seeds_needed(50, 0.05) is None


def estimate(logit, error, n=3):
    """Return an estimate with this mean and standard error on the logit scale."""
    mean = float(special.expit(logit))
    return Interval(mean, None, None, error * mean * (1 - mean), n)


def line(tokens, errors=0.1, n=3, bend=None):
    """Return the estimates of the line −9 + 0.7 log tokens, each moved by its ``bend``."""
    moved = np.zeros(len(tokens)) if bend is None else np.asarray(bend)
    own = np.broadcast_to(errors, len(tokens))
    return [
        estimate(-9 + 0.7 * log(t) + b, e, n) for t, b, e in zip(tokens, moved, own, strict=True)
    ]


@pytest.mark.parametrize("budgets", [2, 3, 5])
def test_data_on_the_line_are_predicted_exactly(budgets):
    tokens = [62_500 * 3**i for i in range(budgets)]
    for at in (10_000, 400_000, 10**9):
        found = predict_budget(tokens, line(tokens, np.geomspace(0.05, 0.3, budgets)), at)
        assert found.mean == pytest.approx(special.expit(-9 + 0.7 * log(at)))
        assert found.low < found.mean < found.high


def test_two_budgets_give_the_interval_computed_by_hand():
    """From budgets 1 and 2 to 4: y = −y₁ + 2 y₂, so that the variance is v₁ + 4 v₂, and (v₁ + v₂)/2
    for the sampling of the predicted mean."""
    found = predict_budget([1, 2], [estimate(-1, 0.2, 3), estimate(0, 0.3, 5)], 4)
    parts = np.array([1.5 * 0.04, 4.5 * 0.09])
    freedom = parts.sum() ** 2 / (parts**2 / [2, 4]).sum()
    reach = stats.t.ppf(0.975, freedom) * sqrt(parts.sum())
    assert found.mean == pytest.approx(special.expit(1))
    assert (found.low, found.high) == pytest.approx(tuple(special.expit([1 - reach, 1 + reach])))
    assert found.n == 3


def test_scatter_about_the_line_beyond_the_sampling_errors_widens_the_interval():
    tokens = [1, 2, 4, 8]
    straight = predict_budget(tokens, line(tokens), 16)
    bent = predict_budget(tokens, line(tokens, bend=[0.8, -0.8, -0.8, 0.8]), 16)
    assert bent.mean == pytest.approx(straight.mean)  # the bend is orthogonal to every line
    assert bent.high - bent.low > 2 * (straight.high - straight.low)
    little = predict_budget(tokens, line(tokens, bend=[0.05, -0.05, -0.05, 0.05]), 16)
    assert (little.low, little.high) == pytest.approx((straight.low, straight.high))


@pytest.mark.parametrize(
    ("budgets", "n", "scatter"),
    [(2, 3, 0), (3, 3, 0), (4, 3, 0), (4, 5, 0), (4, 3, 0.1), (4, 5, 0.1), (6, 3, 0.1)],
)
def test_the_interval_covers_the_mean_that_is_measured_at_the_predicted_budget(budgets, n, scatter):
    """Means of n seeds are normal about the line, with the standard error .1; ``scatter`` moves
    each budget off the line. The standard errors are those of n seeds."""
    rng, studies = np.random.default_rng(0), 1_500
    tokens = [2.0**i for i in range(budgets + 1)]
    covered = 0
    for _ in range(studies):
        bend = rng.normal(0, sqrt(0.1**2 + scatter**2), budgets + 1)
        errors = 0.1 * np.sqrt(rng.chisquare(n - 1, budgets + 1) / (n - 1))
        *smaller, largest = line(tokens, errors, n, bend)
        found = predict_budget(tokens[:-1], smaller, tokens[-1])
        covered += found.low <= largest.mean <= found.high
    error = sqrt(0.95 * 0.05 / studies)
    assert covered / studies > 0.95 - 3 * error
