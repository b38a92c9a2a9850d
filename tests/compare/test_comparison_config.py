import pytest

from reseed.compare.config import ComparisonConfig
from reseed.config import ConfigError, make


def config(**values):
    return ComparisonConfig(**({"name": "trial", "grid": {"seed": [0, 1]}} | values))


def test_round_trip():
    made = config(grid={"sae": ["topk", "relu"], "seed": [0, 1]})
    assert ComparisonConfig.from_dict(made.to_dict()) == made


def test_name_and_grid_are_not_signed_but_what_changes_numbers_is():
    base = config().signed()
    listed = config(name="other", grid={"sae": ["topk"], "seed": [0, 1, 2]})
    assert listed.signed() == base
    for field, value in {
        "threshold": 0.6,
        "live_at_least": 1,
        "confidence": 0.9,
        "null_seed": 1,
        "null_draws": 1,
    }.items():
        assert config(**{field: value}).signed() != base, field


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": {}}, "`comparison.grid` must have at least one axis; it is empty"),
        ({"grid": {"seed": []}}, "`comparison.grid.seed` must have at least one value"),
        ({"grid": {"seed": "0,1"}}, "`comparison.grid.seed` must be a list of values; got '0,1'"),
        ({"grid": {"seed": 3}}, "`comparison.grid.seed` must be a list of values; got 3"),
        ({"grid": {"seed": [0, 1, 0]}}, "`comparison.grid.seed` must not repeat a value; 0 is"),
        ({"grid": {"seed": [1, 1.0]}}, "must not repeat a value; 1.0 is there twice"),
        ({"grid": {"seed": [1, "1"]}}, "must not repeat a value; '1' is there twice"),
        ({"grid": {"seed": [0]}}, "`comparison.grid.seed` is the axis that pairs up"),
        ({"pair_by": "sed"}, "`comparison.pair_by` must be an axis of `grid` (seed); got 'sed'."),
        ({"pair_by": "sed"}, "Did you mean `seed`?"),
        ({"threshold": 1.0}, "above 0 and below 1; got 1.0"),
        ({"live_at_least": 0}, "at least 1; got 0"),
        ({"name": "a/b"}, "`comparison.name` must be a name that a folder can have"),
        ({"threshhold": 0.5}, "Did you mean `comparison.threshold`?"),
    ],
)
def test_impossible_values_are_refused(values, message):
    node = {"name": "trial", "grid": {"seed": [0, 1]}} | values
    with pytest.raises(ConfigError) as caught:
        make(ComparisonConfig, node, "comparison")
    assert message in str(caught.value)


def test_true_is_not_one():
    assert config(grid={"seed": [0, 1], "flag": [True, 1]}).grid["flag"] == (True, 1)
