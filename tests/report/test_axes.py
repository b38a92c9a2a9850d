"""What tells cells apart, in order and in short."""

import pytest

from reseed.report.axes import (
    amounts,
    columns,
    identities,
    label,
    naming,
    numeric_axes,
    ordered,
    row_labels,
    telling,
    told_by_arm,
    wrapped,
)


def cells_of(*knobs):
    return [(k, None) for k in knobs]


SWEEP = cells_of(
    *(
        {"arm": arm, "model": "m", "sae": sae, "sparsity": sparsity, "tokens": tokens}
        for tokens in (4000, 800, 16000)
        for sae, sparsity in (("topk", "k=8"), ("relu", "λ=3.6"))
        for arm in ("other init", "same init")
    )
)


def test_what_another_knob_says_already_tells_nothing():
    assert telling(SWEEP) == ["arm", "sae", "tokens"]
    # λ differs within one architecture: it tells.
    more = [*SWEEP, ({**SWEEP[0][0], "sparsity": "k=16"}, None)]
    assert telling(more) == ["arm", "sae", "sparsity", "tokens"]
    both = cells_of(*({"num_latents": n, "sae.expansion_factor": n // 64} for n in (64, 128)))
    assert telling(both) == ["num_latents"], "of two that say the same the first stays"


def test_few_cells_are_called_by_all_that_varies():
    few = SWEEP[:4]
    assert naming(few) == ["arm", "sae", "sparsity"]
    assert label(few, few[0][0]) == "other init, topk, k=8"
    assert label(SWEEP, SWEEP[0][0]) == "other init, topk, 4000"
    assert label(cells_of({"sae": "topk"}), {"sae": "topk"}) == "topk"


def test_what_the_arm_determines_is_said_in_a_line_and_is_no_column():
    easy = {"arm": "easy", "model": "world_easy", "num_latents": 64, "sparsity": "L0≈3"}
    hard = {"arm": "hard", "model": "world_hard", "num_latents": 512, "sparsity": "L0≈10"}
    cells = cells_of(*(arm | {"sae": sae} for arm in (easy, hard) for sae in ("topk", "relu")))
    assert columns(cells) == ["arm", "sae"]
    assert told_by_arm(cells) == (
        "easy: model world_easy, 64 latents, L0≈3 · hard: model world_hard, 512 latents, L0≈10"
    )
    assert label(cells, cells[0][0]) == "easy, topk"
    cells[0][0]["sparsity"] = "L0≈4"
    assert columns(cells) == ["arm", "sparsity", "sae"], "two values in one arm"


def test_arms_that_stand_for_the_same_are_said_together():
    cells = cells_of(*({"arm": arm, "model": model, "sae": sae}
        for arm, model in (("one", "m"), ("two", "m"), ("null", "gaussian(m)"))
        for sae in ("topk", "relu")))  # fmt: skip
    assert told_by_arm(cells) == "one; two: model m · null: model gaussian(m)"
    # Without arms, what follows from the architecture stays a column.
    plain = cells_of({"sae": "topk", "sparsity": "k=8"}, {"sae": "relu", "sparsity": "λ=3"})
    assert (columns(plain), told_by_arm(plain)) == (["sae", "sparsity"], "")


def test_names_group_as_declared_and_numbers_ascend():
    found = [(k["arm"], k["sae"], k["tokens"]) for k, _ in ordered(SWEEP)]
    assert found == [
        (arm, sae, tokens)
        for arm in ("other init", "same init")
        for sae in ("topk", "relu")
        for tokens in (800, 4000, 16000)
    ]
    two = cells_of({"sparsity": "k=16"}, {"sparsity": "k=4"})
    assert [knobs["sparsity"] for knobs, _ in ordered(two)] == ["k=4", "k=16"]


def test_rows_leave_out_what_the_row_above_said():
    names, rows = row_labels(ordered(SWEEP))
    assert names[:4] == ["other init, topk, 800", "4000", "16000", "other init, relu, 800"]
    assert rows[:4] == [0, 1, 2, 3.5]
    one, places = row_labels(cells_of(*({"sae": sae} for sae in ("topk", "relu", "gated"))))
    assert (one, places) == (["topk", "relu", "gated"], [0, 1, 2])


def test_axes_of_numbers_have_three_values_or_more():
    assert numeric_axes(SWEEP) == ["tokens"]
    assert numeric_axes(SWEEP[:8]) == [], "two budgets"
    sparse = cells_of(*({"sparsity": s} for s in ("k=4", "k=8", "k=16")))
    assert numeric_axes(sparse) == ["sparsity"]
    assert amounts(sparse, "sparsity") == [4, 8, 16]
    mixed = cells_of(*({"sparsity": s} for s in ("k=4", "λ=8", "k=16")))
    assert numeric_axes(mixed) == [], "numbers of different things"
    words = cells_of(*({"sae.aux_alpha": w} for w in ("1e-3", "0.03125", "1")))
    assert amounts(words, "sae.aux_alpha") == [1e-3, 0.03125, 1]
    paired = cells_of(*({"tokens": w} for w in ("1|2", "3|4", "5|6")))
    assert numeric_axes(paired) == []
    with pytest.raises(ValueError, match="`sparsity` is no number in every cell"):
        amounts(mixed, "sparsity")


def test_identities_are_all_but_the_axis():
    assert identities(SWEEP, "tokens")[:2] == [("other init", "topk"), ("same init", "topk")]


def test_wrapped_breaks_between_words():
    assert wrapped("other init, topk, 4000", 12) == "other init,\ntopk, 4000"
    assert wrapped("", 12) == ""
