import pytest

from reseed.compare.config import ComparisonConfig
from reseed.config import make
from reseed.errors import ConfigError


def config(**values):
    return ComparisonConfig(**({"name": "trial", "grid": {"seed": [0, 1]}} | values))


def test_a_comparison_survives_a_round_trip_through_a_dict():
    made = config(grid={"sae": ["topk", "relu"], "seed": [0, 1]})
    assert ComparisonConfig.from_dict(made.to_dict()) == made


def test_settings_that_change_numbers_are_signed_and_name_and_grid_are_not():
    base = config().signed()
    listed = config(name="other", grid={"sae": ["topk"], "seed": [0, 1, 2]})
    assert listed.signed() == base
    for field, value in {
        "threshold": 0.6,
        "live_at_least": 1,
        "confidence": 0.9,
        "null_seed": 1,
        "null_draws": 1,
        "activation_tokens": 0,
    }.items():
        assert config(**{field: value}).signed() != base, field
    assert "activation_tokens" not in base, "comparisons older than this setting are found"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": {}}, "`comparison.grid` must have at least one axis; it is empty"),
        ({"grid": {"seed": []}}, "`comparison.grid.seed` must have at least one value"),
        ({"grid": {"seed": "0,1"}}, "`comparison.grid.seed` must be a list of values; got '0,1'"),
        ({"grid": {"seed": 3}}, "`comparison.grid.seed` must be a list of values; got 3"),
        ({"grid": {"seed": [0, 1, 0]}}, "`comparison.grid.seed` must not repeat a value; 0 occurs"),
        ({"grid": {"seed": [1, 1.0]}}, "must not repeat a value; 1.0 occurs twice"),
        ({"grid": {"seed": [1, "1"]}}, "must not repeat a value; '1' occurs twice"),
        ({"grid": {"seed": [0]}}, "`comparison.grid.seed` is a paired axis"),
        ({"pair_by": "sed"}, "`comparison.pair_by` must be an axis of `grid` (seed); got 'sed'."),
        ({"pair_by": "sed"}, "Did you mean `seed`?"),
        ({"pair_by": ["seed", "lyer"]}, "`comparison.pair_by` must be an axis of `grid` (seed); "),
        ({"pair_by": ["seed", "seed"]}, "`comparison.pair_by` must name every axis once; seed"),
        ({"pair_by": []}, "`comparison.pair_by` must name at least one axis; it is empty"),
        ({"pair_by": 3}, "`comparison.pair_by` must be a string or a list (a string each); got 3"),
        ({"threshold": 1.0}, "above 0 and below 1; got 1.0"),
        ({"live_at_least": 0}, "at least 1; got 0"),
        ({"activation_tokens": -1}, "`comparison.activation_tokens` must be an integer, at least"),
        ({"name": "a/b"}, "`comparison.name` must be a name that a folder can have"),
        ({"threshhold": 0.5}, "Did you mean `comparison.threshold`?"),
    ],
)
def test_impossible_values_are_refused(values, message):
    node = {"name": "trial", "grid": {"seed": [0, 1]}} | values
    with pytest.raises(ConfigError) as caught:
        make(ComparisonConfig, node, "comparison")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("covrage", "`comparison.primary` must be one of the fractions shared_fraction, "),
        ("covrage", "got 'covrage'. Did you mean `coverage`?"),
        ("cosine_encoder", "`comparison.primary` must be one of the fractions"),
        ("coverage_a", "`comparison.primary` must be one of the fractions"),
        ("novel_fraction", "`comparison.primary` must be one of the fractions"),
    ],
)
def test_the_primary_measure_must_be_a_declared_fraction_of_weights(name, message):
    with pytest.raises(ConfigError) as caught:
        config(primary=name).check_primary()
    assert message in str(caught.value)
    assert config(primary="coverage").check_primary() == config(primary="coverage")


def test_several_axes_pair_up_and_the_others_make_cells():
    grid = {"sae": ["topk", "relu"], "layer": [1, 2], "seed": [0, 1]}
    made = config(grid=grid, pair_by=["sae", "seed"])
    (arm,) = made.each_arm()
    assert (made.pair_by, arm.cell_axes) == (("sae", "seed"), ("layer",))
    assert ComparisonConfig.from_dict(made.to_dict()) == made
    assert made.signed() != config(grid=grid).signed()
    assert not made.pairs_are_a_sample
    assert not config(grid=grid, pair_by="layer").pairs_are_a_sample
    assert made.pair_words == "sae and seed"


def test_a_list_of_one_axis_is_that_axis():
    made = config(pair_by=["seed"])
    assert made == config()
    assert made.signed() == config().signed()
    assert made.pairs_are_a_sample
    arms = {"a": {"pair_by": ["dataset.order_seed"], "dataset.order_seed": [0, 1]}}
    (arm,) = config(arms=arms).each_arm()
    assert (arm.pair_by, arm.cell_axes) == ("dataset.order_seed", ("seed",))


def test_the_primary_measure_changes_no_number():
    assert config(primary="coverage").signed() == config().signed()
    assert ComparisonConfig.from_dict(config(primary="coverage").to_dict()).primary == "coverage"


def test_true_and_1_are_different_values_of_an_axis():
    assert config(grid={"seed": [0, 1], "flag": [True, 1]}).grid["flag"] == (True, 1)


ARMED = {
    "grid": {"sae": ["topk", "relu"], "seed": [0, 1]},
    "arms": {
        "plain": None,
        "one order": {"seed": 0, "dataset.order_seed": [3, 4], "pair_by": "dataset.order_seed"},
        "wider": {"sae.num_latents": 64, "seed": [5, 6, 7]},
    },
}


def test_an_arm_is_the_grid_with_some_keys_replaced_or_added():
    plain, one, wider = config(**ARMED).each_arm()
    assert (plain.name, plain.pair_by, plain.fixed) == ("plain", "seed", {})
    assert plain.grid == {"sae": ("topk", "relu"), "seed": (0, 1)}
    assert one.grid == {"sae": ("topk", "relu"), "dataset.order_seed": (3, 4)}
    assert (one.pair_by, one.fixed) == ("dataset.order_seed", {"seed": 0})
    assert wider.grid == {"sae": ("topk", "relu"), "seed": (5, 6, 7)}
    assert wider.fixed == {"sae.num_latents": 64}


def test_a_comparison_without_arms_is_one_arm_with_an_empty_name():
    made = config()
    (arm,) = made.each_arm()
    assert (arm.name, arm.grid, arm.pair_by, arm.fixed) == ("", made.grid, "seed", {})
    assert made.of_arm("") == made
    assert "arms" not in made.signed(), "comparisons older than arms keep their digests"


def test_arms_are_signed_and_survive_the_record():
    made = config(**ARMED)
    assert ComparisonConfig.from_dict(made.to_dict()) == made
    other = config(**ARMED | {"arms": ARMED["arms"] | {"wider": {"seed": [5, 6]}}})
    assert made.signed() != other.signed()


def test_the_settings_of_a_cell_are_those_of_its_arm():
    made = config(**ARMED, threshold=0.6).of_arm("one order")
    assert (made.pair_by, made.threshold, made.arms) == ("dataset.order_seed", 0.6, None)
    assert made.grid == {"sae": ("topk", "relu"), "dataset.order_seed": (3, 4)}
    with pytest.raises(ConfigError, match=r"has no arm 'widr'\. Did you mean `wider`"):
        config(**ARMED).of_arm("widr")


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({}, "`comparison.arms` must have at least one arm or be null; it is empty"),
        ({"": {}}, "`comparison.arms` must give every arm a name"),
        ({"a": 3}, "`comparison.arms.a` must map keys to values; got 3"),
        ({"a": {"sae": {"k": 3}}}, "`comparison.arms.a.sae` must be one value or a list; got {"),
        ({"a": {"sae": []}}, "`comparison.arms.a.sae` must have at least one value; it is empty"),
        ({"a": {"sae.k": [3, 3]}}, "`comparison.arms.a.sae.k` must not repeat a value; 3 occurs"),
        (
            {"a": {"seed": 0}},
            "`comparison.arms.a.pair_by` must be an axis of the arm's grid (sae);",
        ),
        ({"a": {"seed": [4]}}, "`comparison.arms.a.seed` is a paired axis (`pair_by`)"),
        ({"a": {"pair_by": "sed"}}, "got 'sed'. Did you mean `seed`?"),
        ({"a": {"pair_by": [3]}}, "`comparison.arms.a.pair_by` must be the name of an axis, or a"),
        ({"a": {"pair_by": ["sae", "sed"]}}, "got 'sed'. Did you mean `seed`?"),
        ({"a": {"pair_by": ["sae", "seed"], "seed": [4]}}, "`comparison.arms.a.seed` is a paired"),
    ],
)
def test_impossible_arms_are_refused(arms, message):
    node = {"name": "trial", "grid": ARMED["grid"], "arms": arms}
    with pytest.raises(ConfigError) as caught:
        make(ComparisonConfig, node, "comparison")
    assert message in str(caught.value)
