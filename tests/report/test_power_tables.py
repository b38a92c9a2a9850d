"""The tables of `reseed power`: seeds that a difference needs, and predictions of other budgets."""

from dataclasses import replace
from io import StringIO
from math import log

import numpy as np
import pytest
from rich.console import Console
from scipy import special

from reseed.compare.config import ComparisonConfig
from reseed.compare.power import seeds_needed
from reseed.compare.registry import Interval
from reseed.errors import ConfigError, ReseedError
from reseed.report.power import power_result, run_seconds
from reseed.report.power_tables import Question
from reseed.report.terminal import print_tables
from reseed.store.sweeps import Sweep
from reseed.study.result import StudyResult

BUDGETS = (62_464, 124_928, 249_856, 499_968)
SHARED = Question("shared_fraction")


@pytest.fixture
def pilot(cells):
    """Return ``pilot(budgets, n, error)``: makes the cells of TopK and ReLU, whose sharing follows
    logit S = a + 0.7 log tokens exactly, with these standard errors."""
    _, made = cells[0]

    def pilot(budgets=BUDGETS, n=3, error=0.012):
        found = []
        for sae, start in (("topk", -9.5), ("relu", -8)):
            for tokens in budgets:
                mean = float(special.expit(start + 0.7 * log(tokens)))
                own = Interval(mean, mean - 0.05, mean + 0.05, error, n)
                if n < 3:
                    own = Interval(mean, None, None, None, n, "fewer than 3 seeds: no interval")
                runs = made.runs.iloc[: min(n, 3)].assign(
                    run=[f"{sae}-{tokens}-{i}" for i in range(min(n, 3))]
                )
                cell = replace(made, runs=runs, estimates=made.estimates | {"shared_fraction": own})
                found.append(({"model": "embedded", "sae": sae, "tokens": tokens}, cell))
        return found

    return pilot


def records_of(cells, seconds_per_token):
    """Return the records of runs that were trained together, in one group."""
    tokens = {run: knobs["tokens"] for knobs, cell in cells for run in cell.runs["run"]}
    took = seconds_per_token * sum(tokens.values())
    timings = {"training_s": took, "group_runs": len(tokens)}
    return {run: {"tokens": own, "timings": timings} for run, own in tokens.items()}


def test_a_cell_needs_the_seeds_of_its_spread_with_the_interval_of_the_spread(pilot):
    """s/σ of 3 seeds is .1591 to 1.9206, so that σ is .5207 to 6.285 times s."""
    found = power_result(pilot(error=0.02), {}, SHARED).seeds
    spread = 0.02 * np.sqrt(3)
    assert found["spread"].to_numpy() == pytest.approx(spread)
    wanted = [seeds_needed(spread * f, 0.05) for f in (1, 0.5207, 6.285)]
    names = ["seeds_needed", "seeds_needed_low", "seeds_needed_high"]
    assert (found[names] == wanted).all(axis=None)
    assert wanted[0] == 9


def test_sharing_on_a_curve_is_predicted_exactly(pilot):
    """Up to the sampling errors, here 1e-6."""
    question = replace(SHARED, tokens=(10_000_000,))
    found = power_result(pilot(error=1e-6), {}, question).budgets
    assert found["tokens"].tolist() == [499_968, 10_000_000] * 2
    assert found["fitted"].tolist() == [3, 4] * 2
    check = found[found["tokens"] == BUDGETS[-1]]
    assert check["predicted"].to_numpy() == pytest.approx(check["measured"].to_numpy(), abs=1e-3)
    assert check["within"].tolist() == [True, True]
    further = found[found["tokens"] == 10_000_000].set_index("sae")["predicted"]
    assert further["topk"] == pytest.approx(special.expit(-9.5 + 0.7 * log(1e7)), abs=1e-3)
    assert further["relu"] == pytest.approx(special.expit(-8 + 0.7 * log(1e7)), abs=1e-3)


def test_the_check_does_not_see_the_largest_budget(pilot):
    cells = pilot(error=0.002)
    i = len(BUDGETS) - 1
    knobs, cell = cells[i]
    low = Interval(0.1, 0.05, 0.15, 0.002, 3)
    cells[i] = (knobs, replace(cell, estimates=cell.estimates | {"shared_fraction": low}))
    before, after = (power_result(one, {}, SHARED) for one in (pilot(error=0.002), cells))
    columns = ["predicted", "predicted_low", "predicted_high"]
    assert (after.budgets[columns].iloc[0] == before.budgets[columns].iloc[0]).all()
    assert after.budgets["within"].dropna().tolist() == [False, True]
    assert "within the interval in 1 of 2 curves" in str(after).replace("\n", " ")


def test_runs_of_a_group_share_its_seconds_by_their_tokens(pilot):
    one = {"training_s": 60.0, "group_runs": 1}
    half = {"training_s": 100.0, "group_runs": 4}  # two runs of the group are of another sweep
    records = {
        "a": {"tokens": 1_000, "timings": one},
        "b": {"tokens": 3_000, "timings": one},  # a group of its own that took as long
        "c": {"tokens": 1_000, "timings": half},
        "d": {"tokens": 4_000, "timings": half},
        "e": {"tokens": 0, "timings": one | {"training_s": 1.0}, "pretrained": {"source": "x"}},
    }
    found = run_seconds(records)
    assert found["c"] == pytest.approx(10)
    assert found["d"] == pytest.approx(40)
    assert found["a"] + found["b"] == pytest.approx(120)
    assert "e" not in found

    cells = pilot(error=0.02)
    result = power_result(cells, records_of(cells, 0.001), SHARED)
    assert result.seeds["seconds_per_run"].to_numpy()[:4] == pytest.approx(
        [b / 1_000 for b in BUDGETS]
    )
    assert result.budgets["seconds_per_run"].to_numpy()[:3] == pytest.approx(
        [b / 1_000 for b in (499_968, 999_936, 1_999_872)]
    )
    assert result.tables[0].rows[0][-1] == "9 min"  # 9 seeds of 62,464 tokens
    assert power_result(cells, {}, SHARED).tables[0].rows[0][-1] == "–"


def test_the_tables_fit_into_80_columns_and_state_what_they_assume(pilot):
    cells = pilot(error=0.02)
    found = power_result(cells, records_of(cells, 0.001), SHARED)
    shown = printed(found, 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "not shown" not in shown
    words = " ".join(shown.split())
    for part in ("Welch's test (two-sided, 95% level)", "0.16 to 1.92 times the true one",
                 "the standard error falls with 1/√n",
                 "It does not contain curves of another shape",
                 "predict the largest within the interval in 2 of 2 curves"):  # fmt: skip
        assert part in words
    assert "<table" in found._repr_html_()


def test_three_budgets_are_checked_from_two_and_say_what_that_means(pilot):
    found = power_result(pilot(BUDGETS[:3]), {}, SHARED)
    assert found.budgets["fitted"].tolist() == [2, 3, 3] * 2
    assert "Two budgets fit all of these curves" in str(found)
    assert "Two budgets fit all of these curves" not in str(power_result(pilot(), {}, SHARED))


def test_with_fewer_budgets_there_is_no_curve(pilot):
    found = power_result(pilot(BUDGETS[:2]), {}, SHARED)
    assert len(found.tables) == 1
    assert found.budgets.empty
    with pytest.raises(ConfigError, match="`tokens` needs a curve over at least 3 budgets"):
        power_result(pilot(BUDGETS[:2]), {}, replace(SHARED, tokens=(1_000_000,)))


def test_a_cell_without_a_spread_says_why(pilot):
    cells = pilot()
    knobs, cell = cells[0]
    reason = "every pair is 0: no interval on the logit scale"
    none = Interval(0.0, None, None, 0.0, 3, reason)
    cells[0] = (knobs, replace(cell, estimates=cell.estimates | {"shared_fraction": none}))
    found = power_result(cells, {}, SHARED)
    assert found.seeds["note"].tolist() == [reason] + [""] * 7
    assert found.tables[0].rows[0][-2] == "–"
    words = " ".join(str(found).split())
    assert f"no spread in topk, 62464: {reason}." in words
    assert f"not fitted: topk, 62464 tokens: {reason}." in words
    assert found.budgets["fitted"].tolist() == [2, 3, 3, 3, 4, 4]  # without the first budget


def test_a_pilot_of_two_seeds_or_of_chosen_values_is_refused(pilot):
    with pytest.raises(ReseedError, match=r"needs at least 3 seeds .* the pilot has 2"):
        power_result(pilot(n=2), {}, SHARED)
    layers = ComparisonConfig(name="t", grid={"layer": [0, 1]}, pair_by="layer")
    cells = [(knobs, replace(cell, settings=layers)) for knobs, cell in pilot()]
    with pytest.raises(ReseedError, match="the runs of a pair differ in layer"):
        power_result(cells, {}, SHARED)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"difference": 0}, "`difference` must be above 0 and below 1; got 0"),
        ({"difference": 1.0}, "`difference` must be above 0 and below 1; got 1"),
        ({"difference": float("nan")}, "`difference` must be above 0 and below 1; got nan"),
        ({"power": 1.0}, "`power` must be above 1 − confidence and below 1; got 1"),
        ({"power": 0.05}, "`power` must be above 1 − confidence and below 1; got 0.05"),
        ({"confidence": 95}, "`confidence` must be above 0 and below 1; got 95"),
        ({"tokens": (0,)}, "`tokens` must be at least 1; got 0"),
        ({"tokens": [1e6, 1.5]}, "`tokens` must be an integer; got 1.5"),
        ({"tokens": "1e6"}, "`tokens` must be an integer; got '1e6'"),
        ({"tokens": float("inf")}, "`tokens` must be an integer; got inf"),
        ({"difference": "a"}, "`difference` must be above 0 and below 1; got 'a'"),
        ({"confidence": "95%"}, "`confidence` must be above 0 and below 1; got '95%'"),
        ({"power": True}, "`power` must be above 1 − confidence and below 1; got True"),
        ({"differences": 0}, "`differences` must be at least 1; got 0"),
        ({"differences": 1.5}, "`differences` must be an integer; got 1.5"),
        ({"measure": "shared_fractoin"}, "got 'shared_fractoin'. Did you mean `shared_fraction`?"),
        ({"measure": "fvu"}, "`measure` must be one of the fractions shared_fraction, "),
    ],
)
def test_bad_values_are_refused(pilot, tmp_path, given, message):
    result = StudyResult(Sweep(tmp_path), pilot()[0][1].settings, pilot(), {}, [])
    with pytest.raises(ConfigError) as error:
        result.power(**given)
    assert message in str(error.value)


def test_an_unfinished_sweep_is_refused(pilot, tmp_path):
    problem = "incomplete: sae=relu: 2 of 3 runs"
    result = StudyResult(Sweep(tmp_path), pilot()[0][1].settings, pilot(), {}, [problem])
    with pytest.raises(ReseedError, match=r"not finished \(incomplete: sae=relu: 2 of 3 runs\)"):
        result.power()


def printed(found, width):
    """Return the tables as `reseed power` prints them in a window of this width."""
    text = StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)
    print_tables(found.tables, console=console, whole=True)
    return text.getvalue()


def test_the_interval_of_the_measure_has_the_level_that_is_asked_for(pilot):
    """t quantiles of 2 degrees of freedom: 1.8856 at 80%, on the logit scale."""
    cells = pilot(error=0.02)
    found = power_result(cells, {}, replace(SHARED, confidence=0.8))
    for row, (_, cell) in zip(found.seeds.itertuples(), cells, strict=True):
        mean = cell.estimates["shared_fraction"].mean
        reach = 1.8856 * 0.02 / (mean * (1 - mean))
        wanted = special.expit([special.logit(mean) - reach, special.logit(mean) + reach])
        low, high = row.shared_fraction_low, row.shared_fraction_high
        assert (low, high) == pytest.approx(tuple(wanted), abs=1e-5)
        assert f"[{low:.2f}, {high:.2f}]" in str(found)


def test_the_seeds_of_m_differences_are_those_of_the_first_step_of_holm(pilot):
    cells = pilot(error=0.02)
    found = power_result(cells, {}, replace(SHARED, differences=10))
    assert (found.seeds["seeds_needed"] == seeds_needed(0.02 * 3**0.5, 0.05, 0.8, 0.995)).all()
    words = " ".join(str(found).split())
    assert "Welch's test (two-sided, 99.5% level)" in words
    assert "for m = 10 differences that are tested together" in words
    assert "for m = 1 difference, without correction" in " ".join(
        str(power_result(cells, {}, SHARED)).split()
    )


def test_cells_that_are_no_sample_are_named(pilot):
    cells = [({**knobs, "arm": "seeds"}, cell) for knobs, cell in pilot()]
    layers = ComparisonConfig(name="t", grid={"layer": [0, 1]}, pair_by="layer")
    knobs, cell = cells[0]
    cells.append(({**knobs, "arm": "layers"}, replace(cell, settings=layers)))
    words = " ".join(str(power_result(cells, {}, SHARED)).split())
    assert "left out: topk, 62464, layers. Their pairs differ in layer, whose values" in words


def test_data_orders_are_not_called_seeds(pilot):
    orders = ComparisonConfig(
        name="t", grid={"dataset.order_seed": [0, 1, 2]}, pair_by="dataset.order_seed"
    )
    cells = [(knobs, replace(cell, settings=orders)) for knobs, cell in pilot()]
    shown = " ".join(str(power_result(cells, {}, SHARED)).split())
    assert "runs needed" in shown
    assert "standard deviation per dataset.order_seed" in shown


def test_without_an_error_of_the_largest_budget_there_is_no_check(pilot):
    cells = pilot()
    i = len(BUDGETS) - 1
    knobs, cell = cells[i]
    none = Interval(1.0, None, None, 0.0, 3, "every pair is 1: no interval")
    cells[i] = (knobs, replace(cell, estimates=cell.estimates | {"shared_fraction": none}))
    found = power_result(cells, {}, SHARED)
    topk = found.budgets[found.budgets["sae"] == "topk"]
    assert topk["tokens"].tolist() == [2 * BUDGETS[-1], 4 * BUDGETS[-1]]
    words = " ".join(str(found).split())
    assert "no check for topk: its largest budget, 499968 tokens, has no standard error" in words
    assert "not fitted: topk, 499968 tokens: every pair is 1: no interval." in words
    assert "in 1 of 1 curves" in words


def test_no_budget_with_an_error_is_said(pilot):
    words = " ".join(str(power_result(pilot(BUDGETS[:2]), {}, SHARED)).split())
    assert "Other budgets are not predicted: no row has 3 budgets" in words


def test_one_budget_and_whole_floats_are_accepted(pilot):
    cells = pilot()
    one, several = (
        power_result(cells, {}, replace(SHARED, tokens=tokens)).budgets["tokens"].tolist()
        for tokens in (1_000_000, np.array([1e6, 2e6]))
    )
    assert one == [499_968, 1_000_000] * 2
    assert several == [499_968, 1_000_000, 2_000_000] * 2


def test_budgets_beyond_100_times_the_pilots_are_refused(pilot):
    cells = pilot()
    for tokens in (49_996_801, 624):
        with pytest.raises(ConfigError) as error:
            power_result(cells, {}, replace(SHARED, tokens=(10**6, tokens)))
        assert "at most 100 times the largest budget of the pilot and at least" in str(error.value)
        assert f"625 to 49,996,800; got {tokens:,}" in str(error.value)
    found = power_result(cells, {}, replace(SHARED, tokens=(625, 49_996_800)))
    assert found.budgets["tokens"].tolist() == [499_968, 625, 49_996_800] * 2


def test_no_prediction_is_shown_as_1(pilot):
    cells = []
    for knobs, cell in pilot():
        mean = float(special.expit(special.logit(cell.estimates["shared_fraction"].mean) + 3))
        own = Interval(mean, mean - 1e-3, mean + 1e-3, 1e-3 * mean * (1 - mean), 3)
        cells.append((knobs, replace(cell, estimates=cell.estimates | {"shared_fraction": own})))
    question = replace(SHARED, tokens=(1_000_000, 40_000_000))
    found = power_result(cells, {}, question)
    assert (found.budgets["predicted_low"] > 0.995).any()
    shown = "".join(entry for row in found.tables[1].rows for entry in row)
    assert "1.00" not in shown
    assert "1.000" not in shown
    assert "[0.99" in shown


def test_a_narrow_window_leaves_out_the_spread_before_it_breaks_an_interval(pilot):
    arms = ("the same init, another order", "other init, the same order")
    cells = [
        ({"arm": arms[knobs["sae"] == "relu"], **knobs}, cell) for knobs, cell in pilot(error=0.02)
    ]
    found = power_result(cells, records_of(cells, 0.001), SHARED)
    assert "spread" in found.tables[0].header
    for width in (80, 60):
        shown = printed(found, width)
        lines = shown.splitlines()
        assert max(map(len, lines)) <= width
        assert "not shown (the window is too narrow): spread" in shown
        rows = [line for line in lines if "[" in line and "%" not in line]
        assert all(line.count("[") == line.count("]") for line in rows)
