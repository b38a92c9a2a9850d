"""Table of nulls that keep more and more of the experiment, a row each."""

import io

import pytest
from rich.console import Console

from reseed.activations.synthetic import surrogate
from reseed.compare.nulls import SURROGATES
from reseed.compare.statistics import welch_difference
from reseed.report.format import format_number, signed, with_interval
from reseed.report.summary_tables import TITLE, null_table
from reseed.report.table_files import summary_markdown
from reseed.report.terminal import print_summary


@pytest.fixture(scope="module")
def rungs(make_cell, spread):
    """Return both surrogates of one architecture, not in the table's order, and one of another
    architecture."""

    def wide(made):
        knobs, cell = made
        return knobs, spread(cell, 0.1)

    return [
        wide(make_cell(shared=36, arm="trained model")),
        wide(_of(make_cell(shared=12), "random_weights")),
        _of(make_cell(shared=0), "gaussian"),
        make_cell("relu", shared=24, arm="trained model"),
        _of(make_cell("relu", shared=6), "gaussian"),
    ]


def _of(made, name):
    knobs, cell = made
    return knobs | {"model": f"embedded+{name}", "arm": SURROGATES[name]}, cell


def test_each_null_has_a_row_beginning_with_the_one_that_keeps_least(rungs):
    words = null_table(rungs)
    assert words is not None
    assert words.header[:2] == ("sae", "what is shared by")
    assert [row[:2] for row in words.rows] == [
        ("topk", "isotropic rows"),
        ("topk", "rows of the covariance"),
        ("topk", "untrained weights"),
        ("topk", "Gaussian activations"),
        ("topk", "random weights"),
        ("topk", "trained model"),
        ("relu", "isotropic rows"),
        ("relu", "rows of the covariance"),
        ("relu", "untrained weights"),
        ("relu", "Gaussian activations"),
        ("relu", "trained model"),
    ]


def test_the_numbers_are_those_of_the_cells(rungs):
    words = null_table(rungs)
    assert words is not None
    rows = {row[:2]: row[2:] for row in words.rows}
    trained, random = rungs[0][1].estimates, rungs[1][1].estimates
    assert rows["topk", "trained model"] == (
        with_interval(trained["shared_fraction"]),
        format_number(trained["cosine_encoder"].mean),
        format_number(trained["cosine_decoder"].mean),
        "",
        "",
    )  # fmt: skip
    # 36 and 12 of 48 latents: κ = (3/4 − 1/4)/(1 − 1/4).
    shared, _, _, kappa, less = rows["topk", "random weights"]
    assert shared.startswith("0.25 [")
    assert kappa == "0.67"
    # relu's pairs are all equal, and no pair of TopK shares anything in the Gaussian null.
    found = welch_difference(trained["shared_fraction"], random["shared_fraction"])
    assert less == signed(found)
    assert "corrected" not in words.footnotes[2], "there is one difference with an interval"
    assert "seeds (Welch)" in words.footnotes[2]
    assert words.footnotes[3].startswith("**in the second cell, every pair is 0: no interval")
    assert words.footnotes[4].startswith("**all pairs are equal: no interval")
    assert rows["topk", "Gaussian activations"][4] == "+0.75"
    assert rows["relu", "Gaussian activations"][4] == "+0.38"
    assert less.startswith("+0.50 [")
    assert rows["topk", "Gaussian activations"][3] == "0.75"
    cell = rungs[0][1]
    untrained = rows["topk", "untrained weights"]
    assert untrained[1] == format_number(cell.pair_mean("untrained_cosine_encoder"))
    assert untrained[3] == "0.75"
    assert rows["topk", "isotropic rows"][1] == format_number(cell.pair_mean("null_cosine"))
    assert rows["topk", "rows of the covariance"] == ("–", "–", "–", "–", "")


def test_the_table_is_on_the_terminal_and_in_the_file(rungs):
    text = summary_markdown(rungs)
    assert f"## {TITLE}\n\n| sae | what is shared by | shared [95%] |" in text
    out = io.StringIO()
    print_summary(rungs, console=Console(file=out))
    assert TITLE in out.getvalue()


def test_there_is_no_table_without_a_trained_null_or_without_the_model_itself(rungs, cells):
    assert null_table(cells) is None
    assert null_table(rungs[1:3]) is None
    assert null_table([rungs[0], rungs[4]]) is None, "of another architecture"
    assert TITLE not in summary_markdown(cells)


def test_the_table_is_left_out_if_it_would_be_too_long(rungs):
    many = [({**k, "layer": layer}, c) for layer in range(7) for k, c in rungs[:3]]
    assert null_table(many) is None
    found = null_table(many[: 3 * 6])
    assert found is not None
    assert len(found.rows) == 6 * 6


def test_the_surrogates_are_those_that_can_be_declared():
    assert ("none", *SURROGATES) == surrogate.SURROGATES
