"""Power of Welch's test, the seeds that it needs, and predictions of other budgets."""

from math import sqrt

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
from reseed.compare.statistics import at_level, seed_interval


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


def test_an_interval_at_another_level_is_that_of_the_same_pairs():
    pairs = np.array([[9, 0.4, 0.5], [0.4, 9, 0.3], [0.5, 0.3, 9]])
    found = at_level(seed_interval(pairs, 0.95), 0.8, "logit")
    wanted = seed_interval(pairs, 0.8)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    none = seed_interval(np.zeros((3, 3)))
    assert at_level(none, 0.8, "logit") == none


def estimate(logit, error, n=3):
    """Return an estimate with this mean and standard error on the logit scale."""
    mean = float(special.expit(logit))
    return Interval(mean, None, None, error * mean * (1 - mean), n)


def curve(tokens, bend=0.0):
    """Return logits: −9 + 0.7 log tokens, or with the bend λ a line in (t^λ − 1)/λ, t in 60,000."""
    times = np.asarray(tokens) / 60_000
    return -1.3 + 0.7 * (np.log(times) if bend == 0 else (times**bend - 1) / bend)


@pytest.mark.parametrize("bend", [0, -0.25, -0.5, -1])
@pytest.mark.parametrize("budgets", [3, 5])
def test_data_on_a_curve_are_predicted_exactly(budgets, bend):
    """Up to the sampling errors, here 1e-5 on the logit scale."""
    tokens = [60_000 * 2**i for i in range(budgets)]
    made = [estimate(y, 1e-5) for y in curve(tokens, bend)]
    for at in (2 * tokens[-1], 4 * tokens[-1]):
        found = predict_budget(tokens, made, at)
        assert special.logit(found.mean) == pytest.approx(curve(at, bend), abs=2e-3)
        assert found.low < special.expit(curve(at, bend)) < found.high


def test_the_budgets_have_no_unit():
    made = [estimate(y, 0.1) for y in (-2, -1, -0.5)]
    few, many = (predict_budget([f, 2 * f, 5 * f], made, 8 * f) for f in (1, 10**9))
    assert (few.low, few.mean, few.high) == pytest.approx((many.low, many.mean, many.high))


def test_two_budgets_give_the_union_of_the_intervals_of_all_bends():
    """From budgets 1 and 2 to 4: y = y₂ + r(y₂ − y₁), where r is 1 for a line in log t (λ = 0) and
    1/2 for one in 1/t (λ = −1). The predicted mean has the mean of both sampling variances. The
    median is that of a simulation in which every λ is equally frequent."""
    found = predict_budget([1, 2], [estimate(-1, 0.2, 3), estimate(0, 0.3, 5)], 4)
    powers = np.linspace(-1, 0, 21)
    powers[-1] = -1e-9  # the limit is log t
    r = (4**powers - 2**powers) / (2**powers - 1)
    assert (r.min(), r.max()) == pytest.approx((0.5, 1))
    parts = np.stack([(r**2 + 0.5) * 0.04, ((1 + r) ** 2 + 0.5) * 0.09])
    freedom = parts.sum(0) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 4)
    error = np.sqrt(parts.sum(0))
    reach = stats.t.ppf(0.975, freedom) * error  # y₂ is 0 and y₁ is −1
    ends = special.expit([(r - reach).min(), (r + reach).max()])
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-6)
    rng, draws = np.random.default_rng(0), 400_000
    i = rng.integers(0, 21, draws)
    middle = np.median(r[i] + rng.standard_t(freedom[i]) * error[i])
    assert found.mean == pytest.approx(special.expit(middle), abs=0.004)
    assert found.n == 3


def test_scatter_about_the_curve_beyond_the_sampling_errors_widens_the_interval():
    tokens = [60_000, 120_000, 240_000, 480_000, 960_000]

    def width(size):
        moved = curve(tokens) + size * np.array([1, -1, 0, 1, -1])
        found = predict_budget(tokens, [estimate(y, 0.1) for y in moved], 2 * tokens[-1])
        return special.logit(found.high) - special.logit(found.low)

    assert width(0.6) > 2 * width(0)


def coverage(budgets, n, bend, scatter=0.0, error=0.1, ahead=1, studies=400):
    """Return how often the interval contains the mean of n seeds at the predicted budget, which is
    ``ahead`` doublings beyond the largest.

    Means are normal about the curve with the standard error ``error``; ``scatter`` moves each
    budget off the curve. The standard errors are those of n seeds.
    """
    rng = np.random.default_rng(0)
    tokens = [60_000 * 2**i for i in range(budgets)]
    at = tokens[-1] * 2**ahead
    covered = 0
    for _ in range(studies):
        logits = curve([*tokens, at], bend) + rng.normal(0, np.hypot(error, scatter), budgets + 1)
        errors = error * np.sqrt(rng.chisquare(n - 1, budgets) / (n - 1))
        made = [estimate(y, e, n) for y, e in zip(logits[:-1], errors, strict=True)]
        found = predict_budget(tokens, made, at)
        covered += found.low <= special.expit(logits[-1]) <= found.high
    return covered / studies


@pytest.mark.parametrize(
    ("budgets", "bend", "error", "ahead"),
    [(2, 0, 0.002, 1), (2, 0, 0.01, 2), (2, 0, 0.03, 2), (2, -1, 0.01, 1), (4, 0, 0.1, 1)],
)
def test_the_interval_covers_what_is_measured_at_the_predicted_budget(budgets, bend, error, ahead):
    found = coverage(budgets, 3, bend, 0, error, ahead, studies=200)
    assert found > 0.95 - 3 * sqrt(0.95 * 0.05 / 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budgets", "n", "bend", "scatter", "error", "ahead"),
    [(2, 3, -1, 0, 0.1, 1), (3, 3, 0, 0, 0.1, 1), (4, 3, 0, 0.1, 0.1, 1), (4, 5, -1, 0.1, 0.1, 1),
     (3, 3, 0, 0, 0.06, 3), (3, 3, 0, 0, 0.006, 3), (4, 3, 0, 0, 0.06, 3), (5, 3, 0, 0, 0.06, 2)],
)  # fmt: skip
def test_the_coverage_is_kept_at_the_ends_of_the_family_far_ahead_and_with_scatter(
    budgets, n, bend, scatter, error, ahead
):
    found = coverage(budgets, n, bend, scatter, error, ahead)
    assert found > 0.95 - 3 * sqrt(0.95 * 0.05 / 400)
