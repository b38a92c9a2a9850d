"""Order, names and numeric axes of cells."""

import pytest

from reseed.report.cell_labels import (
    amounts,
    arm_note,
    columns,
    distinguishing_knobs,
    label,
    label_knobs,
    numeric_axes,
    other_knob_values,
    row_labels,
    sort_cells,
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


def test_a_knob_that_an_earlier_one_determines_is_not_telling():
    assert distinguishing_knobs(SWEEP) == ["arm", "sae", "tokens"]
    # λ differs within one architecture, so it is kept.
    more = [*SWEEP, ({**SWEEP[0][0], "sparsity": "k=16"}, None)]
    assert distinguishing_knobs(more) == ["arm", "sae", "sparsity", "tokens"]
    both = cells_of(*({"num_latents": n, "sae.expansion_factor": n // 64} for n in (64, 128)))
    assert distinguishing_knobs(both) == ["num_latents"], "of two that say the same the first stays"


def test_few_cells_are_named_by_all_varying_knobs():
    few = SWEEP[:4]
    assert label_knobs(few) == ["arm", "sae", "sparsity"]
    assert label(few, few[0][0]) == "other init, topk, k=8"
    assert label(SWEEP, SWEEP[0][0]) == "other init, topk, 4000"
    assert label(cells_of({"sae": "topk"}), {"sae": "topk"}) == "topk"


def test_knobs_that_the_arm_determines_are_in_a_footnote_instead_of_columns():
    easy = {"arm": "easy", "model": "world_easy", "num_latents": 64, "sparsity": "L0≈3"}
    hard = {"arm": "hard", "model": "world_hard", "num_latents": 512, "sparsity": "L0≈10"}
    cells = cells_of(*(arm | {"sae": sae} for arm in (easy, hard) for sae in ("topk", "relu")))
    assert columns(cells) == ["arm", "sae"]
    assert arm_note(cells) == (
        "easy: model world_easy, 64 latents, L0≈3 · hard: model world_hard, 512 latents, L0≈10"
    )
    assert label(cells, cells[0][0]) == "easy, topk"
    cells[0][0]["sparsity"] = "L0≈4"
    assert columns(cells) == ["arm", "sparsity", "sae"], "two values in one arm"


def test_arms_with_equal_knobs_are_listed_together():
    cells = cells_of(*({"arm": arm, "model": model, "sae": sae}
        for arm, model in (("one", "m"), ("two", "m"), ("null", "gaussian(m)"))
        for sae in ("topk", "relu")))  # fmt: skip
    assert arm_note(cells) == "one; two: model m · null: model gaussian(m)"
    # Without arms, a knob that the architecture determines stays a column.
    plain = cells_of({"sae": "topk", "sparsity": "k=8"}, {"sae": "relu", "sparsity": "λ=3"})
    assert (columns(plain), arm_note(plain)) == (["sae", "sparsity"], "")


def test_cells_are_sorted_by_names_as_declared_and_numbers_ascending():
    found = [(k["arm"], k["sae"], k["tokens"]) for k, _ in sort_cells(SWEEP)]
    assert found == [
        (arm, sae, tokens)
        for arm in ("other init", "same init")
        for sae in ("topk", "relu")
        for tokens in (800, 4000, 16000)
    ]
    two = cells_of({"sparsity": "k=16"}, {"sparsity": "k=4"})
    assert [knobs["sparsity"] for knobs, _ in sort_cells(two)] == ["k=4", "k=16"]


def test_row_labels_leave_out_the_knobs_of_the_row_above():
    names, rows = row_labels(sort_cells(SWEEP))
    assert names[:4] == ["other init, topk, 800", "4000", "16000", "other init, relu, 800"]
    assert rows[:4] == [0, 1, 2, 3.5]
    one, places = row_labels(cells_of(*({"sae": sae} for sae in ("topk", "relu", "gated"))))
    assert (one, places) == (["topk", "relu", "gated"], [0, 1, 2])


def test_numeric_axes_have_three_values_or_more():
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
    with pytest.raises(ValueError, match="`sparsity` is not a number in every cell"):
        amounts(mixed, "sparsity")


def test_identities_are_all_telling_knobs_but_the_axis():
    assert other_knob_values(SWEEP, "tokens")[:2] == [("other init", "topk"), ("same init", "topk")]


def test_wrapped_breaks_between_words():
    assert wrapped("other init, topk, 4000", 12) == "other init,\ntopk, 4000"
    assert wrapped("", 12) == ""
