"""The primary measure of a comparison, and the differences that its design could detect."""

import re
from dataclasses import replace
from itertools import combinations
from time import perf_counter

import numpy as np
import pytest
from scipy import stats

from reseed.compare.config import ComparisonConfig
from reseed.compare.registry import Interval
from reseed.report.architecture_contrasts import difference_lines, differences
from reseed.report.detectable import detectable_difference, detectable_note, detectable_range
from reseed.report.format import measure_heading
from reseed.report.table import cell_notes, main_table
from reseed.report.table_files import first_tables, summary_frame, summary_markdown


def estimate(mean, se, n=3):
    return Interval(mean, mean - 2 * se, mean + 2 * se, se, n)


@pytest.fixture
def measured(make_cell):
    """Return ``measured(sae, tokens, shared, covered)``: makes a cell of a comparison whose primary
    measure is coverage; both have a standard error of .02."""
    _, made = make_cell()
    settings = ComparisonConfig(name="t", grid={"seed": [0, 1]}, primary="coverage")

    def measured(sae, tokens, shared, covered):
        own = {"shared_fraction": estimate(shared, 0.02), "coverage": estimate(covered, 0.02)}
        cell = replace(made, estimates=made.estimates | own, settings=settings)
        return {"sae": sae, "tokens": tokens}, cell

    return measured


@pytest.mark.parametrize(
    ("name", "words"),
    [("shared_fraction", "shared"), ("shared_fraction_live", "shared\nlive"),
     ("shared_fraction_decoder_live", "shared\ndec live"), ("coverage", "covered"),
     ("index_agreement", "index\nagreement")],
)  # fmt: skip
def test_measures_have_short_column_headings(name, words):
    assert measure_heading(name) == words


def test_the_primary_measure_is_the_first_column_and_appears_once(measured, make_cell):
    cells = [measured("topk", 1000, 0.5, 0.7), measured("relu", 1000, 0.4, 0.6)]
    words = main_table(cells)
    assert words.header[1:4] == ("covered\n[95%]", "shared\n[95%]", "shared\nlive")
    assert words.rows[0][1].startswith("0.70 [")
    assert words.rows[0][2].startswith("0.50 [")
    live = [(k, replace(c, settings=replace(c.settings, primary="shared_fraction_live")))
            for k, c in [make_cell(), make_cell("relu")]]  # fmt: skip
    header = main_table(live).header
    assert header[1:4] == ("shared live\n[95%]", "shared\n[95%]", "shared\ndec")
    assert "shared\nlive" not in header
    plain = main_table([make_cell(), make_cell("relu")]).header
    assert plain[1:4] == ("shared\n[95%]", "shared\nlive", "shared\ndec")


def test_a_note_says_why_the_primary_measure_has_no_interval(measured):
    _, cell = measured("topk", 1000, 0.5, 1.0)
    reason = "every pair is 1: no interval on the logit scale"
    bare = replace(cell.estimates["coverage"], low=None, high=None, reason=reason)
    cell = replace(cell, estimates=cell.estimates | {"coverage": bare})
    assert cell_notes(cell) == [reason]
    assert (
        cell_notes(replace(cell, settings=replace(cell.settings, primary="shared_fraction"))) == []
    )


def test_differences_are_claimed_on_the_primary_measure(measured):
    """TopK covers more and shares less."""
    cells = [
        cell
        for tokens in (1000, 2000)
        for cell in (measured("topk", tokens, 0.4, 0.8), measured("relu", tokens, 0.8, 0.4))
    ]
    (line,) = difference_lines(cells)
    assert line.startswith("topk − relu: **topk has more covered than relu** (+0.40 [")
    words = differences(cells)
    assert words is not None
    assert words.header == ("difference", "tokens", "covered", "shared", "shared, dec",
                            "shared, corr")  # fmt: skip
    assert words.rows[0][2].startswith("+0.40 [")
    assert words.rows[0][3].startswith("-0.40 [")
    default = [(k, replace(c, settings=replace(c.settings, primary="shared_fraction")))
               for k, c in cells]  # fmt: skip
    assert "**relu shares more than topk**" in difference_lines(default)[0]


@pytest.mark.parametrize(("n", "units"), [(3, 6.07), (5, 4.66), (9, 4.25)])
def test_the_detectable_difference_of_two_cells_equals_the_published_one(n, units):
    """The units are the standard error of one cell, as published for 80% power."""
    found = detectable_difference(estimate(0.5, 0.01, n), estimate(0.4, 0.01, n), 0.95)
    assert found == pytest.approx(units * 0.01, abs=0.0002)


@pytest.mark.parametrize(("n", "m", "se_a", "se_b"), [(3, 3, 0.02, 0.02), (3, 6, 0.01, 0.03)])
def test_a_detectable_difference_is_detected_four_times_in_five(n, m, se_a, se_b):
    """By Welch's test, which the tables use, if the standard errors are the true ones."""
    rng, studies = np.random.default_rng(0), 40_000
    shift = detectable_difference(estimate(0.5, se_a, n), estimate(0.5, se_b, m), 0.95)
    a = rng.normal(shift, se_a * np.sqrt(n), (studies, n))
    b = rng.normal(0, se_b * np.sqrt(m), (studies, m))
    found = stats.ttest_ind(a, b, axis=1, equal_var=False)
    assert (found.pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.007)


def test_without_standard_errors_no_detectable_difference_is_stated():
    bare = Interval(0.5, None, None, None, 2, "fewer than 3 seeds: no interval")
    assert detectable_difference(estimate(0.5, 0.01), bare, 0.95) is None
    assert detectable_difference(estimate(0.5, 0.0), estimate(0.5, 0.01), 0.95) is None
    assert detectable_note([bare], "coverage", 0.95) == ("Primary measure: **covered**.",)


def test_the_table_states_the_difference_that_it_could_detect(make_cell):
    _, made = make_cell()
    cells = []
    for sae, se in (("topk", 0.01), ("relu", 0.02), ("gated", 0.03)):
        own = made.estimates | {"shared_fraction": estimate(0.5, se)}
        cells.append(({"sae": sae}, replace(made, estimates=own)))
    (line,) = [note for note in main_table(cells).footnotes if "could detect" in note]
    # Simulated with scipy's test: .104 for (.01, .02), .160 for (.01, .03), .159 for (.02, .03).
    assert line == (
        "Primary measure: **shared**. The smallest difference in this measure between two rows "
        "that this design could detect is roughly 0.10–0.16 (80% power of Welch's test for one "
        "difference, 95% level, depending on the rows). Roughly, because a standard error that is "
        "estimated from 3 seeds lies between 0.16 and 1.92 of the true one (95%)."
    )
    assert line in summary_markdown(cells)
    frame = summary_frame(cells).set_index("sae")
    assert frame["visible_difference"].to_numpy() / (0.01, 0.02, 0.03) == pytest.approx(
        [6.07] * 3, abs=0.02
    )
    assert (frame["primary"] == "shared_fraction").all()
    (alone,) = [note for note in main_table(cells[:1]).footnotes if "could detect" in note]
    assert "between this row and one like it" in alone
    assert "is roughly 0.06 (80% power of Welch's test for one difference, 95% level)." in alone


def test_the_range_is_that_of_all_pairs_and_takes_no_longer_for_many_rows():
    rng = np.random.default_rng(0)
    errors, seeds = rng.uniform(0.001, 0.1, 8), [3, 4] * 4
    some = [estimate(0.5, se, n) for se, n in zip(errors, seeds, strict=True)]
    for tested in (1, 15):
        every = [detectable_difference(a, b, 0.95, tested) for a, b in combinations(some, 2)]
        assert detectable_range(some, 0.95, tested) == pytest.approx((min(every), max(every)))
    # 45,000 pairs of rows. Two equal errors of SE need 6.07 SE, as published.
    tight, wide = [estimate(0.5, 0.001)] * 2, [estimate(0.5, 0.1)] * 2
    many = [*tight, *wide, *(estimate(0.5, se) for se in rng.uniform(0.002, 0.09, 296))]
    start = perf_counter()
    found = detectable_range(many, 0.95)
    assert perf_counter() - start < 1
    assert found == pytest.approx((0.00607, 0.607), rel=0.002)


def test_the_line_is_for_the_first_step_of_the_correction_where_differences_are_corrected(
    make_cell,
):
    """Two architectures at three budgets have m = 3 differences: level .05/3 instead of .05."""
    _, made = make_cell()
    own = made.estimates | {"shared_fraction": estimate(0.5, 0.01)}
    cells = [
        ({"sae": sae, "tokens": tokens}, replace(made, estimates=own))
        for sae in ("topk", "relu")
        for tokens in (1000, 2000, 3000)
    ]
    (line,) = [note for note in first_tables(cells)[0].footnotes if "could detect" in note]
    assert "for one of m = 3 corrected differences, level .05/3)" in line
    shown = float(re.search(r"roughly (\d\.\d+) ", line)[1])
    found = summary_frame(cells)["visible_difference"].iloc[0]
    assert shown == pytest.approx(found, abs=0.005)
    rng, studies = np.random.default_rng(0), 40_000
    a, b = rng.normal(0, 0.01 * np.sqrt(3), (2, studies, 3))
    power = (stats.ttest_ind(a + found, b, axis=1, equal_var=False).pvalue < 0.05 / 3).mean()
    assert power == pytest.approx(0.8, abs=0.007)


def test_the_line_says_that_it_is_for_rows_with_draws_of_their_own(make_cell):
    _, made = make_cell()
    made = replace(made, estimates=made.estimates | {"shared_fraction": estimate(0.5, 0.01)})

    def line(seeds):
        draws = [
            dict(zip(made.runs["run"], ({"seed": s} for s in own), strict=True)) for own in seeds
        ]
        cells = [
            ({"sae": sae}, replace(made, draws=own)) for sae, own in zip("ab", draws, strict=True)
        ]
        return next(note for note in main_table(cells).footnotes if "could detect" in note)

    assert "some rows here have the same initial weights or data orders" in line([[1, 2, 3]] * 2)
    assert "some rows here" not in line([[1, 2, 3], [4, 5, 6]])
