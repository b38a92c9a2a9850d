"""Laws of declarations: columns of a family, headings, needs, order."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from reseed.compare import registry
from reseed.compare.pair import compare_pair
from reseed.compare.registry import (
    SIDES,
    Column,
    View,
    columns,
    declared,
    evaluate,
    find,
    measure,
    measures,
)
from reseed.compare.tables import pair_estimates


@pytest.fixture
def declare(monkeypatch):
    """Let a test declare measures, which end with it; ``declare()`` returns the last one."""
    declared()
    monkeypatch.setattr(registry, "_declared", [*registry._declared])
    return lambda: registry._declared[-1]


def test_a_family_has_a_column_for_each_member(declare):
    @measure("near_{}", family=(0.5, 1000), scale="fraction", heading="near {:,}", help="near")
    def near(view, member):
        return member * 2

    own = declare()
    assert [c.name for c in own.own] == ["near_0.5", "near_1000"]
    assert [c.heading for c in own.shown] == ["near 0.5", "near 1,000"]
    assert own.values(View()) == {"near_0.5": 1.0, "near_1000": 2000}
    assert own.notes == ["**near 0.5**, **near 1,000**: near."]
    assert find("near_0.5") == (own, own.own[0])
    assert find("near_{}") is None


def test_one_sided_columns_have_no_estimate_and_only_the_first_is_shown(declare):
    measure("of{}", family=SIDES, scale="cosine", heading="of", help="o")(lambda view, side: side)
    own = declare()
    assert {c.name: c.scale for c in own.own} == {
        "of": "cosine", "of_a": None, "of_b": None, "of_live": "cosine"
    }  # fmt: skip
    assert [c.heading for c in own.own] == ["of", "of a", "of b", "of live"]
    assert [c.name for c in own.shown] == ["of"]
    assert own.notes == ["**of**: o."]


def test_the_members_that_are_shown_can_be_chosen(declare):
    measure("r{}", family=("", "_x", "_y"), heading="R", shown=("", "_y"), help="r")(len)
    assert [c.heading for c in declare().shown] == ["R", "R y"]
    measure("q_{}", family="xy", heading="Q, {}", shown=(), help="q")(len)
    assert declare().shown == []
    assert declare().notes == []


def test_a_column_of_another_package_is_shown_under_its_name(declare):
    measure("made_up", help="m")(len)
    assert [c.heading for c in declare().shown] == ["made up"]
    measure("in_files", table="counts", help="a measure that no table shows")(len)
    assert declare().shown == []


def test_one_function_computes_several_columns(declare):
    @measures(Column("low", "l", heading="low"), Column("high", "h"), level="run")
    def ends(view):
        return 1, 2

    assert declare().values(View()) == {"low": 1, "high": 2}

    measures(Column("one", "1"), Column("two", "2"), level="run")(lambda view: (1, 2, 3))
    with pytest.raises(ValueError, match="zip"):
        declare().values(View())


def test_a_column_is_empty_if_the_view_lacks_what_it_needs(declare):
    called = []
    measure("with_more", needs=("weights", "covariance"), help="m")(called.append)
    found = declare().values(View())
    assert list(found) == ["with_more"]
    assert np.isnan(found["with_more"])
    assert called == []


def test_a_name_is_declared_once_in_a_level(declare):
    with pytest.raises(ValueError, match="declares mmcs_live, which is declared already"):
        measure("mmcs_{}", family=("dead", "live"), help="again")(len)
    measure("mmcs", level="latent", help="of a latent")(len)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"needs": ("weights", "covarianc")}, "`needs` must be one of weights, covariance, "),
        ({"needs": "covarianc"}, "got 'covarianc'. Did you mean `covariance`?"),
        ({"needs": "untrained", "level": "run"}, "`needs` must be one of weights, covariance, "),
        ({"needs": ("activations", "weights")}, "`needs` must be one of activations, matched; "),
        ({"scale": "fractions"}, "`scale` must be one of fraction, cosine, number, count, mean; "),
        ({"level": "pairs"}, "`level` must be one of pair, run, latent, cell; got 'pairs'."),
    ],
)
def test_a_misspelt_option_is_refused(declare, option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure("mine", help="m", **option)


def test_a_pass_is_made_once_for_all_measures_of_a_view():
    made = []

    class Counted(View):
        pass

    def work(view):
        made.append(view)
        return len(made)

    one, two = Counted(), Counted()
    assert [one.once(work), one.once(work), two.once(work)] == [1, 1, 2]


def test_a_fraction_that_is_none_is_refused_by_name(settings):
    pairs = pd.DataFrame({"mine": [0.5, 1.2, 0.3]})
    with pytest.raises(ValueError, match=r"mine: fractions must lie between 0 and 1; got 0\.3"):
        pair_estimates(pairs, {"mine": Column("mine", "m", "fraction")}, settings, 3)
    found = pair_estimates(pairs, {"mine": Column("mine", "m", "number")}, settings, 3)
    assert found["mine"].mean == pytest.approx(2 / 3)


def test_a_new_measure_is_in_the_rows_of_pairs_at_the_end(declare, dictionary):
    @measure("mean_square", help="mean square of the decoder cosines", scale="number")
    def mean_square(pair):
        return float((pair.a.cosine_decoder**2).mean())

    a, b = (dictionary(np.random.default_rng(s).normal(size=(9, 5)), seed=s) for s in (0, 1))
    pair = compare_pair(a, b)
    assert list(pair.row())[-1] == "mean_square"
    assert pair.value("mean_square") == pytest.approx((pair.a.cosine_decoder**2).mean())
    with pytest.raises(KeyError, match="mean_sqare"):
        pair.value("mean_sqare")


def test_measures_after_the_pass_over_pairs_are_apart():
    every = set(columns("pair"))
    parts = [set(columns("pair", later)) for later in ("", "cell", "map", "activations")]
    assert set.union(*parts) == every
    assert sum(map(len, parts)) == len(every)
    assert evaluate([], View()) == {}


LAW = """
import sys
from reseed.compare.registry import columns
from reseed.compare.config import ComparisonConfig
ComparisonConfig(name="x", grid={"seed": [0, 1]})
assert not {"torch", "numpy", "pandas"} & set(sys.modules), "declarations are read when asked for"
import reseed.compare.truth, reseed.compare.subspaces
print(*columns("pair"), *columns("run"), *columns("latent"))
"""


def test_the_order_of_columns_does_not_depend_on_the_order_of_imports():
    found = subprocess.run([sys.executable, "-c", LAW], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [*columns("pair"), *columns("run"), *columns("latent")]
