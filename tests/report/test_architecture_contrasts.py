"""Claims of differences between architectures."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from reseed.compare.registry import Interval
from reseed.report.architecture_contrasts import contrasts, difference_lines, differences
from reseed.report.format import interval_sign, signed
from reseed.report.table_files import summary_markdown


@pytest.fixture
def at(make_cell):
    """Return ``at(sae, tokens, mean, se)``: makes a cell with this shared fraction."""
    _, made = make_cell()

    def at(sae, tokens, mean, se=0.02, n=3, **knobs):
        if se is not None:
            found = Interval(mean, mean - 2 * se, mean + 2 * se, se, n)
        else:
            found = Interval(mean, None, None, None, n, "fewer than 3 seeds: no interval")
        cell = replace(made, estimates=made.estimates | {"shared_fraction": found})
        return {"sae": sae, "sparsity": f"of {sae}", "tokens": tokens} | knobs, cell

    return at


def sweep(at, *differences, **more):
    """Return two architectures whose shared fractions differ this much at budgets 1000, 2000, …"""
    return [
        at(sae, 1000 * (i + 1), 0.4 + (d if sae == "topk" else 0), **more)
        for i, d in enumerate(differences)
        for sae in ("topk", "relu")
    ]


def test_a_difference_at_the_last_two_budgets_is_claimed(at):
    (line,) = difference_lines(sweep(at, -0.3, 0.2, 0.3))
    assert line.startswith("topk − relu: **topk shares more than relu** (+0.20 [")
    assert "at 2,000 and +0.30 [" in line
    assert line.endswith("at 3,000 tokens)")
    (line,) = difference_lines(sweep(at, 0.3, -0.2, -0.3))
    assert "**relu shares more than topk**" in line


@pytest.mark.parametrize(
    ("found", "more", "why"),
    [
        ((0.3, 0.2, 0.01), {}, "an interval at the last two budgets includes 0"),
        ((0.3, 0.01, 0.2), {}, "an interval at the last two budgets includes 0"),
        ((0.3, -0.2, 0.2), {}, "the sign changes between the last two budgets"),
        ((0.3, 0.2, 0.2), {"se": None}, "there is no interval (fewer than 3 seeds: no interval)"),
    ],
)
def test_a_difference_that_does_not_hold_at_both_budgets_is_not_claimed(at, found, more, why):
    (line,) = difference_lines(sweep(at, *found, **more))
    assert "no difference claimed" in line
    assert why in line
    assert "**" not in line


def test_the_interval_of_a_difference_is_welch_s(at):
    a, b = at("topk", 1000, 0.5, se=0.03), at("relu", 1000, 0.4, se=0.01, n=5)
    cells = [a, b, at("topk", 2000, 0.5), at("relu", 2000, 0.4)]
    (contrast,) = contrasts(cells)
    assert contrast.budgets == (1000, 2000)
    found = contrast.differences["shared_fraction"][0]
    # Recompute it from raw values whose means have these standard errors.
    rng = np.random.default_rng(0)
    samples = []
    for mean, se, n in ((0.5, 0.03, 3), (0.4, 0.01, 5)):
        z = rng.standard_normal(n)
        samples.append(mean + (z - z.mean()) / z.std(ddof=1) * se * np.sqrt(n))
    wanted = stats.ttest_ind(*samples, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(wanted))


def test_every_pair_is_compared_in_every_arm_at_common_budgets(at):
    cells = [
        at(sae, tokens, 0.5, arm=arm)
        for arm in ("one", "two")
        for sae in ("topk", "relu", "gated")
        for tokens in (1000, 2000, 4000)
        if (arm, sae, tokens) != ("two", "gated", 2000)
    ]
    found = contrasts(cells)
    pairs = ["topk − relu", "topk − gated", "relu − gated"]
    assert [c.name for c in found] == [f"{arm}: {pair}" for arm in ("one", "two") for pair in pairs]
    assert [c.budgets for c in found] == [(1000, 2000, 4000)] * 4 + [(1000, 4000)] * 2
    words = differences(cells)
    assert words is not None
    assert len(words.rows) == 4 * 3 + 2 * 2
    assert words.rows[0][:2] == ("one: topk − relu", "1,000")
    assert all(c.verdict() in words.footnotes for c in found)
    assert "## Differences" in summary_markdown(cells)


def test_without_several_budgets_or_architectures_there_are_no_contrasts(at):
    for cells in (
        [at("topk", 1000, 0.5), at("relu", 1000, 0.4)],
        [at("topk", t, 0.5) for t in (1000, 2000)],
        [at("topk", 1000, 0.5), at("relu", 2000, 0.4)],
        [at(sae, t, 0.5) for sae in ("topk", "relu") for t in ("1|2", "3|4")],
    ):
        assert difference_lines(cells) == []
        assert differences(cells) is None
        assert "## Differences" not in summary_markdown(cells)


def test_a_star_marks_intervals_that_exclude_0():
    above, below = Interval(0.2, 0.1, 0.3, 0.1, 3), Interval(-0.2, -0.3, -0.1, 0.1, 3)
    around, none = Interval(0.2, -0.1, 0.5, 0.1, 3), Interval(0.2, None, None, None, 2, "few")
    assert [interval_sign(x) for x in (above, below, around, none)] == [1, -1, 0, 0]
    assert signed(above) == "+0.20 [0.10, 0.30] *"
    assert signed(below) == "-0.20 [-0.30, -0.10] *"
    assert signed(around) == "+0.20 [-0.10, 0.50]"
    assert signed(none) == "+0.20"
    assert signed(Interval(2e-7, -2e-7, 0.5, 0.1, 3)) == "< 0.001 [>-0.001, 0.50]"


def test_many_pairs_are_summarised_in_one_line_as_a_ranking(at):
    """Architecture a is above b and c, and these are above d: 5 of 6 pairs."""
    levels = {"a": 0.9, "b": 0.5, "c": 0.5, "d": 0.1}
    cells = [at(sae, tokens, mean) for tokens in (1000, 2000) for sae, mean in levels.items()]
    order, rule = difference_lines(cells)
    assert order == (
        "**a** shares more than b, c, d; **b** shares more than d; **c** shares more than d "
        "(5 of 6 pairs)"
    )
    assert "summary.md" in rule
