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
    assert line.endswith("at 3,000 tokens; corrected for 3 differences)")
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
    cells = [a, b, at("topk", 2000, 0.5), at("relu", 2000, 0.2)]
    (contrast,) = contrasts(cells)
    assert contrast.budgets == (1000, 2000)
    found, other = contrast.differences["shared_fraction"]
    assert other.low > 0, "so the first, which has the larger p-value, is tested at 5%"
    # Recompute it from raw values whose means have these standard errors.
    rng = np.random.default_rng(0)
    samples = []
    for mean, se, n in ((0.5, 0.03, 3), (0.4, 0.01, 5)):
        z = rng.standard_normal(n)
        samples.append(mean + (z - z.mean()) / z.std(ddof=1) * se * np.sqrt(n))
    wanted = stats.ttest_ind(*samples, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(wanted))


def test_a_cell_that_shares_nothing_in_any_pair_leaves_no_star_and_the_reason(at):
    """ReLU's interval alone, .3 ± .09, would exclude 0."""
    cells = [at("topk", 1000, 0.0, se=0.0), at("relu", 1000, 0.3), *sweep(at, 0.3, 0.2)[2:]]
    table = differences(cells)
    assert table is not None
    assert table.rows[0][2] == "-0.30"
    reason = "**in the first cell, every pair is 0: no interval, because a spread of 0 is no"
    assert any(note.startswith(reason) for note in table.footnotes)
    assert contrasts(cells)[0].tested == 1


def test_a_table_corrects_its_differences_for_their_number(at):
    """Every cell has SE .02 and n = 3, so a difference has SE .028 and 4 degrees of freedom.

    The differences of the shared fraction are .3, .2, .1 and .05, with p-values .0004, .0021,
    .0242 and .15: the steps .05/4 and .05/3 reject the first two, .05/2 the third, and .05 not the
    last.
    """
    cells = sweep(at, 0.3, 0.05, 0.1, 0.2)
    (contrast,) = contrasts(cells)
    found = contrast.differences["shared_fraction"]
    error = 0.02 * np.sqrt(2)
    for one, steps in zip(found, (4, 1, 2, 3), strict=True):
        reach = stats.t.isf(0.05 / steps / 2, 4) * error
        assert (one.low, one.high) == pytest.approx((one.mean - reach, one.mean + reach))
    assert [interval_sign(one) for one in found] == [1, 0, 1, 1]
    table = differences(cells)
    assert table is not None
    assert [row[2].endswith("*") for row in table.rows] == [True, False, True, True]
    assert "corrected for the m = 4 differences of a measure" in table.footnotes[-1]
    assert "probability of at most .05" in table.footnotes[-1]
    assert "(Welch)" in table.footnotes[-1]


def test_a_claim_holds_for_the_corrected_intervals(at):
    """Alone, .1 at both of the last budgets excludes 0 (p = .024), but not among twelve."""
    two = sweep(at, 0.1, 0.1)
    assert "**topk shares more than relu**" in difference_lines(two)[0]
    many = [
        *two,
        *(at(sae, tokens, 0.45) for sae in ("gated", "jumprelu") for tokens in (1000, 2000)),
    ]
    (line, _) = difference_lines(many)
    assert line.startswith("no difference claimed (0 of 6 pairs; the others may differ by up to 0.")


def test_cells_with_the_same_draws_are_compared_by_the_same_seeds(at):
    def drawn(cell, order):
        knobs, made = cell
        runs = made.runs["run"]
        own = {
            r: {"seed": hash(r), "dataset.order_seed": o} for r, o in zip(runs, order, strict=True)
        }
        return knobs, replace(made, draws=own)

    cells = [drawn(cell, (0, 1, 2)) for cell in sweep(at, 0.1, 0.2)]
    table = differences(cells)
    assert table is not None
    assert "the same draw is left out of both cells at a time" in table.footnotes[-1]
    assert "Welch" not in table.footnotes[-1]
    mixed = differences([*cells[:2], *(drawn(cell, (0, 0, 0)) for cell in cells[2:])])
    assert mixed is not None
    assert "(the same draw is left out" in mixed.footnotes[-1], "some budget has the same draws"


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
        "(5 of 6 pairs; the others may differ by up to 0.10)"  # t(.9875, 4) · √2 · .02
    )
    assert rule == (
        "Claims are based on the last two budgets, with intervals corrected for 12 differences; "
        "summary.md has every difference."
    )
