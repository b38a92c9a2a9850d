from math import log, sqrt

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from reseed.compare.registry import Interval
from reseed.compare.statistics import (
    crossed_interval,
    holm_intervals,
    leave_one_out_interval,
    p_value,
    run_interval,
    seed_interval,
    welch_difference,
    with_width,
)


def test_the_interval_of_three_seeds_equals_a_hand_computed_one():
    # Leaving out a seed leaves the one pair without it: .3, .5, .4, mean .4.
    values = np.array([[9, 0.4, 0.5], [0.4, 9, 0.3], [0.5, 0.3, 9]])
    error = sqrt(2 / 3 * (0.1**2 + 0.1**2))
    found = seed_interval(values)
    assert found.mean == pytest.approx(0.4)
    assert found.standard_error == pytest.approx(error)
    reach = 4.302653 * error / (0.4 * 0.6)  # t(.975, 2)
    assert found.low == pytest.approx(expit(log(0.4 / 0.6) - reach), abs=1e-6)
    assert found.high == pytest.approx(expit(log(0.4 / 0.6) + reach), abs=1e-6)
    linear = seed_interval(values, logit=False)
    assert linear.high - linear.mean == pytest.approx(4.302653 * error)


def test_the_standard_error_leaves_one_seed_out_at_a_time():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.3, 0.6, (6, 6))
    values = (values + values.T) / 2
    without = []
    for s in range(6):
        kept = [t for t in range(6) if t != s]
        without.append(np.mean([values[i, j] for i in kept for j in kept if i < j]))
    found = seed_interval(values)
    error = sqrt(5 / 6 * sum((x - np.mean(without)) ** 2 for x in without))
    assert found.standard_error == pytest.approx(error)


def simulate(rng, draws, n, level, seed_sd, interaction, pair_sd):
    """Draw shared fractions of pairs of seeds, [draws, n, n].

    logit S_ij = a + u_i + u_j + c·u_i·u_j + ε_ij: u is a seed's effect on all of its pairs, c an
    interaction of the two seeds, ε noise per pair (a fraction .4 of 400 latents has a binomial
    error of .1 on the logit scale).
    """
    u = seed_sd * rng.standard_normal((draws, n))
    noise = np.triu(rng.standard_normal((draws, n, n)), 1) * pair_sd
    both = u[:, :, None] + u[:, None, :] + interaction * u[:, :, None] * u[:, None, :]
    return expit(level + both + noise + noise.transpose(0, 2, 1))


@pytest.mark.parametrize("n", [3, 5, 9])
@pytest.mark.parametrize(
    "model", [(-0.3, 0.1, 0.5, 0.1), (1.0, 0.3, -1.0, 0.1)], ids=["balanced", "seeds-dominate"]
)
def test_the_seed_interval_covers_the_truth_at_its_confidence(n, model):
    rng = np.random.default_rng(0)
    truth = simulate(rng, 1_000_000, 2, *model)[:, 0, 1].mean()
    intervals = [seed_interval(values) for values in simulate(rng, 4000, n, *model)]
    covered = np.mean([found.low <= truth <= found.high for found in intervals])
    assert 0.93 <= covered <= 0.99


def test_an_interval_over_pairs_covers_too_rarely():
    """Pairs are not independent (methods page: coverage down to .48), so seeds are left out."""
    rng, model, n = np.random.default_rng(0), (1.0, 0.3, -1.0, 0.1), 9
    truth = simulate(rng, 1_000_000, 2, *model)[:, 0, 1].mean()
    pairs = simulate(rng, 2000, n, *model)[:, *np.triu_indices(n, 1)]
    reach = stats.t.ppf(0.975, 35) * stats.sem(pairs, axis=1)
    assert np.mean(np.abs(pairs.mean(axis=1) - truth) <= reach) < 0.8


def test_fewer_than_three_seeds_have_no_interval_and_the_reason():
    found = seed_interval(np.full((2, 2), 0.5))
    wanted = Interval(0.5, None, None, None, 2, "fewer than 3 seeds: no interval")
    assert found == run_interval([0.4, 0.6]) == wanted


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_fractions_of_0_and_1_have_no_logit_interval(value):
    found = seed_interval(np.full((4, 4), value))
    assert (found.mean, found.low, found.high) == (value, None, None)
    assert found.reason == f"every pair is {value:g}: no interval on the logit scale"


def test_an_undefined_pair_leaves_the_mean_undefined():
    values = np.full((3, 3), 0.5)
    values[0, 1] = values[1, 0] = np.nan
    found = seed_interval(values)
    assert np.isnan(found.mean)
    assert found.reason == "undefined in at least one pair"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 0.1, 0.2], [0.1, 0, 0.3], [0.25, 0.3, 0]]), "must be symmetric"),
        (np.zeros((1, 1)), r"\[n, n\] with n ≥ 2; got \[1, 1\]"),
        (np.zeros((3, 2)), r"got \[3, 2\]"),
        (np.full((3, 3), 1.2), "between 0 and 1"),
    ],
)
def test_invalid_pair_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        seed_interval(values)


def test_the_run_interval_is_the_t_interval():
    values = [0.21, 0.25, 0.2, 0.3]
    low, high = stats.t.interval(0.9, 3, np.mean(values), stats.sem(values))
    found = run_interval(values, 0.9)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_welch_difference_equals_that_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.1, 4), rng.normal(0.4, 0.03, 7)
    found = welch_difference(run_interval(a), run_interval(b))
    wanted = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_the_welch_difference_needs_both_standard_errors():
    few, many = run_interval([0.1, 0.2]), run_interval([0.3, 0.4, 0.6])
    assert welch_difference(many, few).reason == (
        "in the second cell, fewer than 3 seeds: no interval"
    )
    assert welch_difference(few, few).reason == "fewer than 3 seeds: no interval"


def test_two_crossed_axes_add_their_variances():
    # Without each of three seeds: .3, .4, .5, so V = 2/3 · (.1² + 0 + .1²); without each of four
    # orders: .37, .41, .41, .41, mean .4, so V = 3/4 · (.03² + 3 · .01²).
    without = {"seed": [0.3, 0.4, 0.5], "dataset.order_seed": [0.37, 0.41, 0.41, 0.41]}
    of_seeds, of_orders = 2 / 3 * 0.02, 3 / 4 * 0.0012
    freedom = (of_seeds + of_orders) ** 2 / (of_seeds**2 / 2 + of_orders**2 / 3)
    found = crossed_interval(0.4, without)
    error = sqrt(of_seeds + of_orders)
    assert found.standard_error == pytest.approx(error)
    assert found.degrees_of_freedom == pytest.approx(freedom)
    assert found.high == pytest.approx(0.4 + stats.t.ppf(0.975, freedom) * error)
    assert found.n == 3


def crossed_pairs(rng, draws, sizes, kind, sds):
    """Draw the values of the pairs of crossed runs that differ in the axes ``kind``.

    The value of a pair is .5 plus the effects of both runs; a run has the effects of its seed, of
    its order, and of both together. Returns the values [draws, pairs] and the levels [pairs, 2, 2]
    of each pair's runs.
    """
    seed_sd, order_sd, both_sd = sds
    runs = [(s, o) for s in range(sizes[0]) for o in range(sizes[1])]
    pairs = np.array([(a, b) for i, a in enumerate(runs) for b in runs[i + 1 :]])
    differs = pairs[:, 0] != pairs[:, 1]
    pairs = pairs[(differs == np.array(["seed" in kind, "order" in kind])).all(1)]
    effects = rng.normal(0, seed_sd, (draws, sizes[0], 1)) + rng.normal(
        0, order_sd, (draws, 1, sizes[1])
    )
    effects = effects + rng.normal(0, both_sd, (draws, *sizes))
    a, b = pairs[:, 0].T, pairs[:, 1].T
    return 0.5 + effects[:, a[0], a[1]] + effects[:, b[0], b[1]], pairs


@pytest.mark.parametrize("kind", ["seed", "seed and order"])
@pytest.mark.parametrize("sds", [(0.003, 0.01, 0), (0.01, 0.003, 0), (0.01, 0.01, 0.005),
                                 (0.01, 0, 0.001), (0, 0.01, 0.001)])  # fmt: skip
def test_the_interval_over_two_crossed_axes_covers_the_truth(sds, kind):
    rng = np.random.default_rng(1)
    values, pairs = crossed_pairs(rng, 1500, (3, 3), kind, sds)
    means, without = values.mean(1), {}
    for i, axis in enumerate(("seed", "order")):
        kept = [(pairs[:, :, i] != level).all(1) for level in range(3)]
        without[axis] = np.stack([values[:, own].mean(1) for own in kept], axis=1)
    one_axis, covered = 0, 0
    for draw, mean in enumerate(means):
        own = {axis: each[draw] for axis, each in without.items()}
        both = crossed_interval(mean, own)
        alone = leave_one_out_interval(mean, own["seed"])
        covered += both.low < 0.5 < both.high
        one_axis += alone.low < 0.5 < alone.high
    assert 0.93 <= covered / len(means) <= 0.99
    if sds == (0.003, 0.01, 0):
        assert one_axis / len(means) < 0.75, "the interval over the seeds alone"


def test_crossed_axes_need_three_values_each():
    found = crossed_interval(0.4, {"seed": [0.3, 0.4, 0.5], "dataset.order_seed": [0.3, 0.5]})
    assert (found.low, found.standard_error) == (None, None)
    assert found.reason == (
        "fewer than 3 values of dataset.order_seed: no interval over seed and dataset.order_seed"
    )


@pytest.mark.parametrize("n", [3, 4, 5])
def test_no_interval_has_a_width_of_zero(n):
    """Values from a small set are often equal: all, or in the mean without each seed."""
    rng, none = np.random.default_rng(n), 0
    for _ in range(300):
        values = rng.choice([0.1, 0.3, 0.5, 1.0], (n, n), p=[0.7, 0.1, 0.1, 0.1])
        values = np.triu(values, 1) + np.triu(values, 1).T
        each = values[0, 1:]
        fraction, number = seed_interval(values), seed_interval(values, logit=False)
        over_runs = run_interval(each)
        found = [fraction, number, over_runs, run_interval(each - each)]
        found += [leave_one_out_interval(0.3, each, 0.95, x) for x in ("linear", "logit", "log")]
        found += [crossed_interval(0.3, {"seed": each, "order": values[1]}, scale="logit")]
        found += [welch_difference(number, over_runs), welch_difference(number, number)]
        found += holm_intervals(found[-2:])
        for one in found:
            assert (one.low is None) == (one.high is None) == bool(one.reason)
            assert one.low is None or one.low < one.high
            none += one.low is None
    assert none > 300


def test_equal_pairs_have_no_interval_and_the_reason():
    """.1 has no exact binary fraction, so that sums of it are equal up to rounding only."""
    reason = "are equal: no interval, because a spread of 0 is no estimate of the error"
    values = np.full((5, 5), 0.1)
    for found in (seed_interval(values), seed_interval(values, logit=False)):
        assert (found.mean, found.low, found.standard_error) == (pytest.approx(0.1), None, None)
        assert found.reason == f"all pairs {reason}"
    assert run_interval([0.1] * 6).reason == f"all runs {reason}"
    other = run_interval([0.2, 0.3, 0.5])
    found = welch_difference(seed_interval(values), other)
    assert (found.low, found.reason) == (None, f"in the first cell, all pairs {reason}")
    # Pairs that differ may have the same mean without each seed: ab and cd .5, the others .4.
    values = np.full((4, 4), 0.4)
    values[[0, 1, 2, 3], [1, 0, 3, 2]] = 0.5
    assert seed_interval(values).reason.startswith("the same without any one of the seeds: ")


def test_a_cell_whose_pairs_are_all_0_or_all_1_leaves_no_interval_of_the_difference():
    """The error of the other cell alone is not that of the difference."""
    nothing, every = seed_interval(np.zeros((3, 3))), seed_interval(np.ones((3, 3)))
    other = run_interval([0.2, 0.3, 0.4])
    why = "no interval, because a spread of 0 is no estimate of the error"
    found = welch_difference(other, nothing)
    assert (found.mean, found.low, found.standard_error) == (other.mean, None, None)
    assert found.reason == f"in the second cell, every pair is 0: {why}"
    assert welch_difference(nothing, other).reason == f"in the first cell, every pair is 0: {why}"
    assert welch_difference(nothing, nothing).reason == f"every pair is 0: {why}"
    assert welch_difference(nothing, every).reason == (
        f"in the first cell, every pair is 0: {why}; in the second cell, every pair is 1: {why}"
    )
    assert holm_intervals([found])[0] is found, "no star, and not counted"


def test_an_interval_of_width_zero_in_an_old_file_is_dropped():
    old = Interval(0.1, 0.1, 0.10000000000000002, 9.8e-18, 3)
    assert with_width(old).low is None
    assert with_width(old).reason.startswith("all values are equal: no interval")
    fine = Interval(0.1, 0.09, 0.11, 0.005, 3)
    assert with_width(fine) is fine


def with_p(p, freedom=4.0, error=0.02, sign=1):
    """Return a difference whose two-sided p-value is ``p``."""
    return Interval(sign * stats.t.isf(p / 2, freedom) * error, -1, 1, error, 3, "", freedom)


def test_holm_widens_intervals_as_computed_by_hand():
    """m = 4: .005 ≤ .05/4 and .01 ≤ .05/3 are rejected; .03 > .05/2 is not, and so .04 is not."""
    p = [0.01, 0.04, 0.03, 0.005]
    freedoms = [4.0, 2.0, 3.5, 8.0]
    raw = [with_p(x, f, sign=s) for x, f, s in zip(p, freedoms, (1, -1, 1, -1), strict=True)]
    assert [p_value(d) for d in raw] == pytest.approx(p)
    few = Interval(0.3, None, None, None, 2, "fewer than 3 seeds: no interval")
    found = holm_intervals([*raw, few])
    assert found[4] is few, "not tested, so it does not count"
    for own, before, steps in zip(found, raw, (3, 2, 2, 4), strict=False):
        reach = stats.t.isf(0.05 / steps / 2, before.freedom) * 0.02
        assert (own.low, own.high) == pytest.approx((before.mean - reach, before.mean + reach))
    assert [one.low > 0 or one.high < 0 for one in found[:4]] == [True, False, False, True]


def test_an_interval_excludes_0_if_and_only_if_holm_rejects():
    rng = np.random.default_rng(0)
    for _ in range(300):
        m = int(rng.integers(1, 9))
        p = rng.uniform(0, 1, m) ** 4
        found = holm_intervals([with_p(x, rng.uniform(2, 9), sign=rng.choice([-1, 1])) for x in p])
        order = np.argsort(p)
        adjusted = np.maximum.accumulate(p[order] * np.arange(m, 0, -1))
        excluded = [one.low > 0 or one.high < 0 for one in (found[i] for i in order)]
        assert excluded == (adjusted <= 0.05).tolist()


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["no-difference", "one-of-four-differs"])
def test_a_table_has_a_false_star_at_most_as_often_as_it_says(shift):
    """Four cells of three seeds, all six differences; those among the first three are 0."""
    rng, draws = np.random.default_rng(5), 1000
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    wrong = alone = 0
    for values in rng.normal([0, 0, 0, shift], 0.05, (draws, 3, 4)):
        cells = [run_interval(column) for column in values.T]
        raw = [welch_difference(cells[i], cells[j]) for i, j in pairs]
        null = [k for k, (i, j) in enumerate(pairs) if j < 3 or not shift]
        alone += any(raw[k].low > 0 or raw[k].high < 0 for k in null)
        found = holm_intervals(raw)
        wrong += any(found[k].low > 0 or found[k].high < 0 for k in null)
    assert wrong / draws <= 0.05 + 2 * sqrt(0.05 * 0.95 / draws)
    assert alone > wrong
