"""Tables of pairs of runs that differ in a chosen value."""

import dataclasses
import io
from itertools import product

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from reseed.compare.alignment import Alignment
from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.pairing import across_minus_within, add_axis_columns, axis_label, pair_groups
from reseed.compare.statistics import holm_intervals
from reseed.report import value_pairs as module
from reseed.report.format import signed
from reseed.report.style import STYLE
from reseed.report.table_files import summary_markdown, write_tables
from reseed.report.terminal import print_summary
from reseed.report.value_matrix import matrix_figure, value_matrix_tables
from reseed.report.value_pairs import (
    map_table,
    pairing_frame,
    runs_by_value_table,
    value_pair_table,
)


@pytest.fixture(scope="module")
def made(make_run):
    """Return ``made(places, pair_by, grid, shared)``: makes a cell of runs at these places; any two
    share their first latents."""

    def made(places, pair_by, grid, shared=24, tag=""):
        config = ComparisonConfig(name="t", grid=grid, pair_by=pair_by, null_draws=1)
        runs, named = [], {}
        for i, place in enumerate(places):
            one = make_run("x", i, shared)
            label = axis_label(place)
            runs.append(dataclasses.replace(one, id=f"run-{tag}{label}", seed=label))
            named[runs[-1].id] = place
        cell = compare_cell(runs, [], config)
        return dataclasses.replace(cell, pairs=add_axis_columns(cell.pairs, named, config))

    return made


@pytest.fixture(scope="module")
def over_seeds(made):
    """Return a function that makes a cell per seed, for three seeds; values of an axis pair up."""

    def over_seeds(values, axis="layer", shared=(12, 24, 30), **knobs):
        grid = {axis: values, "seed": ["0", "1", "2"]}
        found = []
        for seed in range(3):
            places = [{axis: v} for v in values]
            cell = made(places, axis, grid, shared[seed], tag=f"{seed}-")
            own = {"sae": "topk", axis: "|".join(values), "seed": str(seed)}
            found.append((own | knobs, cell))
        return found

    return over_seeds


def notes(words):
    assert words is not None
    return words.footnotes


def test_each_pair_of_values_has_a_row_in_the_order_of_the_grid(over_seeds):
    words = value_pair_table(over_seeds(["6", "3", "9"]))
    assert words is not None
    assert words.header[:4] == ("layer", "and", "seeds", "shared\n[95%]")
    assert [row[:3] for row in words.rows] == [("6", "3", "3"), ("6", "9", "3"), ("3", "9", "3")]
    assert all(row[3].startswith("0.46 [") for row in words.rows), "(12 + 24 + 30)/3 of 48"
    assert words.num_knobs == 2
    assert "pairs by layer" in words.caption
    assert "sae=topk" in words.caption
    assert words.footnotes[-1] == "Primary measure: **shared**."


def test_families_are_named_by_the_knobs_that_vary(over_seeds):
    cells = [*over_seeds(["1", "2"]), *over_seeds(["1", "2"], sae="relu", shared=(6, 6, 6))]
    words = value_pair_table(cells)
    assert words is not None
    assert words.header[:3] == ("sae", "layer", "and")
    assert [row[0] for row in words.rows] == ["topk", "relu"]
    assert words.rows[1][4] == "0.12", "three equal pairs have no interval"
    assert any(note.startswith("**the same without any one of the seeds") for note in notes(words))


def test_the_matrix_has_the_numbers_of_the_table(over_seeds):
    cells = over_seeds(["1", "2", "3"])
    shared, covered = value_matrix_tables(cells)
    assert shared.header == ("layer", "1", "2", "3")
    assert [row[0] for row in shared.rows] == ["1", "2", "3"]
    entries = [row[1:] for row in shared.rows]
    assert [entries[i][i] for i in range(3)] == ["–"] * 3, "a layer's own needs seeds in pair_by"
    assert all(entries[i][j] == entries[j][i] for i in range(3) for j in range(3))
    assert shared.caption == "Shared"
    assert covered.caption.startswith("Covered: of the latents of the row")
    assert value_matrix_tables(over_seeds(["1", "2"])) == [], "two values are one number"
    two = [*cells, *over_seeds(["1", "2", "3"], sae="relu")]
    assert [words.caption for words in value_matrix_tables(two)][::2] == [
        "Shared (topk)",
        "Shared (relu)",
    ]


BOTH = {"sae": ["topk", "relu"], "seed": ["0", "1", "2"]}
PLACES = [{"sae": sae, "seed": seed} for sae in BOTH["sae"] for seed in BOTH["seed"]]


def test_pairs_across_values_are_compared_with_pairs_within_a_value(made):
    cells = [({"sae": "topk|relu"}, made(PLACES, ["sae", "seed"], BOTH))]
    words = value_pair_table(cells)
    assert words is not None
    assert words.header[:3] == ("sae", "and", "differs in")
    assert [row[:3] for row in words.rows] == [
        ("topk", "topk", "seed"), ("topk", "relu", "sae"), ("topk", "relu", "sae, seed"),
        ("relu", "relu", "seed"),
    ]  # fmt: skip
    column = words.header.index("− within")
    assert [row[column] for row in words.rows] == ["", "0", "0", ""]
    assert any(note.startswith("**− within**") for note in words.footnotes)
    (shared, _) = value_matrix_tables(cells)
    assert shared.rows == (("topk", "0.50", "0.50"), ("relu", "0.50", "0.50"))


@pytest.mark.parametrize(
    ("axes", "seeds", "said", "not_said"),
    [
        (["sae", "seed"], "3", ["over seeds: all runs of one seed are left out at a time, t",
                           "which were chosen", "different values start differently"],
         ["same initial weights", "variances"]),
        (["seed", "dataset.order_seed"], "3 × 3",
         ["over seeds and values of dataset.order_seed: all runs of one value of seed or of "
          "dataset.order_seed are left out at a time, and the variances of the axes are added",
          "differ only in dataset.order_seed have the same initial weights.",
          "pairs of runs that differ in these axes and agree in the others."],
         ["which were chosen", "start differently", "with these two values"]),
        (["sae", "seed", "dataset.order_seed"], "3 × 3",
         ["variances of the axes are added", "which were chosen", "start differently even",
          "differ only in dataset.order_seed have the same initial weights."], []),
    ],
)  # fmt: skip
def test_footnotes_say_what_holds_for_the_paired_axes(made, axes, seeds, said, not_said):
    every = {
        "sae": ["topk", "relu"],
        "seed": ["0", "1", "2"],
        "dataset.order_seed": ["0", "1", "2"],
    }
    grid = {axis: every[axis] for axis in axes}
    places = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    table = value_pair_table([({}, made(places[:9] if len(axes) == 3 else places, axes, grid))])
    text = " ".join(notes(table))
    assert [words for words in said if words not in text] == []
    assert [words for words in not_said if words in text] == []
    assert table is not None
    assert table.rows[0][table.header.index("seeds")] == seeds


def test_differences_from_within_are_corrected_for_their_number(made):
    """The table and pairings.csv have the intervals that Holm's steps give to the two rows."""
    cell = made(PLACES, ["sae", "seed"], BOTH)
    rng = np.random.default_rng(0)
    pairs = cell.pairs.assign(shared_fraction=rng.uniform(0.4, 0.5, len(cell.pairs)))
    across = pairs["sae_a"] != pairs["sae_b"]
    pairs.loc[across, "shared_fraction"] -= 0.3
    cells = [({"sae": "topk|relu"}, dataclasses.replace(cell, pairs=pairs))]
    topk, same, other, relu = pair_groups(cells)
    raw = [across_minus_within(g, (topk, relu), "shared_fraction", 0.95) for g in (same, other)]
    corrected = holm_intervals(raw)
    assert [one.low for one in corrected] != [one.low for one in raw]
    table = value_pair_table(cells)
    assert table is not None
    column = table.header.index("− within")
    assert [row[column] for row in table.rows[1:3]] == [signed(one) for one in corrected]
    assert any("corrected for the m = 2 differences" in note for note in table.footnotes)
    frame = pairing_frame(cells)
    assert frame["minus_within_low"][1:3].tolist() == [one.low for one in corrected]


RANDOM = ("seed", "dataset.order_seed")


def test_pairs_within_a_value_differ_in_the_same_random_axes(made):
    """Within TopK pairs share .5, .6 or .7 if they differ in the seed, the order or both; within
    ReLU .3, .4 or .5. Their means are .4, .5 and .6."""
    grid = {"sae": ["topk", "relu"]} | {axis: ["0", "1", "2"] for axis in RANDOM}
    places = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    cell = made(places, [*grid], grid)
    within = {"seed": 0.5, "dataset.order_seed": 0.6, "seed, dataset.order_seed": 0.7}
    across = {"sae": 0.2, "sae, seed": 0.21, "sae, dataset.order_seed": 0.22,
              "sae, seed, dataset.order_seed": 0.23}  # fmt: skip
    shared = [
        across[kind] if kind in across else within[kind] - 0.2 * (sae == "relu")
        for kind, sae in zip(cell.pairs["differs_in"], cell.pairs["sae_a"], strict=True)
    ]
    pairs = cell.pairs.assign(shared_fraction=shared)
    cells = [({}, dataclasses.replace(cell, pairs=pairs))]
    table = value_pair_table(cells)
    assert table is not None
    column = table.header.index("− within")
    found = {row[2]: row[column] for row in table.rows if row[0] != row[1]}
    assert found == {
        "sae": "",  # no two runs of one value have equal seeds and orders
        "sae, seed": "-0.19",
        "sae, dataset.order_seed": "-0.28",
        "sae, seed, dataset.order_seed": "-0.37",
    }
    said = " ".join(notes(table))
    assert (
        "differ in the same random axes as the row's pairs: dataset.order_seed; seed; seed and "
        "dataset.order_seed (mean of the two values). Rows without such pairs have no entry."
    ) in said
    assert "pairs of seeds with the same value" not in said
    frame = pairing_frame(cells).set_index("differs_in")["minus_within"]
    assert frame["sae, seed"] == pytest.approx(-0.19)
    (runs,) = notes(runs_by_value_table(cells))
    assert "values of dataset.order_seed" in runs
    assert "the variances of the axes are added" in runs
    assert "t interval over them" not in runs


@pytest.mark.parametrize(
    ("axis", "words"),
    [("seed", "over pairs of seeds with the same value (mean of the two values). *"),
     ("dataset.order_seed", "over pairs with the same value that differ in dataset.order_seed (")],
)  # fmt: skip
def test_the_footnote_names_the_pairs_within_a_value(made, axis, words):
    places = [{"sae": sae, axis: draw} for sae in BOTH["sae"] for draw in BOTH["seed"]]
    grid = {"sae": BOTH["sae"], axis: BOTH["seed"]}
    cells = [({}, made(places, [*grid], grid))]
    (note,) = [note for note in notes(value_pair_table(cells)) if note.startswith("**− within")]
    assert words in note
    (runs,) = notes(runs_by_value_table(cells))
    assert "with the 95% t interval over them" in runs


def test_a_long_table_shows_only_the_pairs_that_differ_in_most_axes(made, monkeypatch):
    monkeypatch.setattr(module, "MANY_ROWS", 3)
    cells = [({"sae": "topk|relu"}, made(PLACES, ["sae", "seed"], BOTH))]
    words = value_pair_table(cells)
    assert words is not None
    assert len(words.rows) == 3
    assert "sae" not in [row[2] for row in words.rows]
    assert any("all 4 groups are in pairings.csv" in note for note in words.footnotes)
    assert len(pairing_frame(cells)) == 4


def test_dictionaries_of_two_widths_have_the_fraction_of_the_smaller(over_seeds):
    cells = over_seeds(["32", "48"], axis="sae.num_latents")
    narrow = []
    for knobs, cell in cells:
        pairs = cell.pairs.assign(num_latents_a=32)
        narrow.append((knobs, dataclasses.replace(cell, pairs=pairs)))
    words = value_pair_table(narrow)
    assert words is not None
    column = words.header.index("of the smaller\n[95%]")
    assert words.rows[0][column].startswith("0.69 ["), "(12 + 24 + 30)/3 of 32"
    (row,) = pairing_frame(narrow).to_dict("records")
    assert row["shared_of_smaller"] == row["shared_of_a"] == pytest.approx(22 / 32)
    assert row["shared_of_b"] == pytest.approx(22 / 48)
    alike = value_pair_table(cells)
    assert alike is not None
    assert "of the smaller\n[95%]" not in alike.header


def test_the_primary_measure_comes_first_with_its_interval(over_seeds):
    cells = over_seeds(["1", "2"])
    own = [(k, dataclasses.replace(c, settings=dataclasses.replace(c.settings, primary="coverage")))
           for k, c in cells]  # fmt: skip
    words = value_pair_table(own)
    assert words is not None
    assert words.header[3:5] == ("covered\n[95%]", "shared\n[95%]")


def test_models_are_compared_with_a_warning(over_seeds):
    models, layers = (value_pair_table(over_seeds(["1", "2"], axis=x)) for x in ("model", "layer"))
    assert sum("Dictionaries of two models" in note for note in notes(models)) == 1
    assert not any("Dictionaries of two models" in note for note in notes(layers))


def test_each_value_has_a_row_with_the_quality_of_its_runs(over_seeds):
    words = runs_by_value_table(over_seeds(["1", "2"]))
    assert words is not None
    assert words.header == ("layer", "runs", "latents", "FVU", "L0", "dead", "live")
    assert [row[:3] for row in words.rows] == [("1", "3", "48"), ("2", "3", "48")]
    assert words.rows[0][4] == "8.25", "three equal runs have no interval"


def test_the_matrix_is_drawn_as_a_heat_map(over_seeds):
    """The squares have the numbers of the tables, in their order; the darkest is the largest."""
    cells = over_seeds(["1", "2", "3"])
    with mpl.rc_context(STYLE):
        figure = matrix_figure(cells)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.images]
    for axes, words in zip(panels, value_matrix_tables(cells), strict=True):
        assert [t.get_text() for t in axes.texts] == [x for row in words.rows for x in row[1:]]
        assert axes.get_title().replace("\n", " ") == words.caption
        image = axes.images[0]
        assert image.get_clim() == (0, pytest.approx(0.5)), "0.46, and up to the next tenth"
        assert [t.get_text() for t in axes.get_yticklabels()] == ["1", "2", "3"]
    assert "mean over 3 seeds" in figure.get_supxlabel()


def test_without_a_matrix_there_is_no_figure(over_seeds):
    with pytest.raises(ValueError, match="there is no matrix of values to draw"):
        matrix_figure(over_seeds(["1", "2"]))


def test_pairings_are_in_files_and_on_the_terminal(over_seeds, tmp_path):
    cells = over_seeds(["1", "2", "3"])
    files = {path.name for path in write_tables(cells, tmp_path)}
    assert files == {"pairs.csv", "latents.parquet", "summary.csv", "summary.md",
                     "summary.tex", "strata.csv", "pairings.csv", "matrix.csv"}  # fmt: skip
    matrix = pd.read_csv(tmp_path / "matrix.csv")
    assert matrix["measure"].tolist() == ["shared_fraction"] * 3 + ["coverage"] * 3
    assert matrix[["1", "2", "3"]].isna().to_numpy().sum() == 6, "the diagonals"
    for width in (80, 120):
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=True, color_system=None)
        print_summary(cells, console=console)
        assert "1st in 2nd" in " ".join(file.getvalue().split())
        assert "…" not in file.getvalue()


def test_pairs_of_seeds_and_pairs_of_values_have_a_table_each(over_seeds, make_cell):
    cells = [({"arm": "seeds"} | make_cell()[0], make_cell()[1]),
             *over_seeds(["1", "2"], arm="layers")]  # fmt: skip
    text = summary_markdown(cells)
    first, other = text.index("| shared [95%] | shared live |"), text.index("## Other pairs")
    assert first < other < text.index("| layer | and | seeds | shared [95%] | 1st in 2nd [95%] |")


def test_pairs_of_seeds_alone_have_no_such_tables(make_cell, tmp_path):
    cells = [make_cell(), make_cell("relu")]
    assert (value_pair_table(cells), value_matrix_tables(cells), runs_by_value_table(cells)) == (
        None,
        [],
        None,
    )
    assert "pairings.csv" not in {path.name for path in write_tables(cells, tmp_path)}


def test_without_a_common_space_the_table_says_why_and_shows_the_other_measures(make_run):
    """The two models differ in width; they have measures on the same tokens or not."""
    config = ComparisonConfig(
        name="t", grid={"model": ["one", "two"]}, pair_by="model", null_draws=1
    )
    one, two = (make_run("x", i, 24) for i in range(2))
    two = dataclasses.replace(two, encoder=two.encoder[:, :8], decoder=two.decoder[:, :8])
    runs = [dataclasses.replace(r, seed=v) for r, v in ((one, "one"), (two, "two"))]
    cell = compare_cell(runs, [], config)
    places = {run.id: {"model": run.seed} for run in runs}
    pairs = add_axis_columns(cell.pairs, places, config).assign(activation_note="the hub is gone")
    knobs = {"sae": "x", "model": "one|two"}
    words = value_pair_table([(knobs, dataclasses.replace(cell, pairs=pairs))])
    assert words is not None
    assert "CKA\ncodes" not in words.header
    (row,) = words.rows
    assert row[:4] == ("one", "two", "1", "–")
    said = " ".join(words.footnotes)
    assert "where no cosine is defined: runs of different `d_in` have no common space." in said
    assert said.count("was not measured: the hub is gone") == 1
    assert "undefined" not in said
    assert "cosine between them is meaningful" not in said, "there is none"
    assert value_matrix_tables([(knobs, dataclasses.replace(cell, pairs=pairs))]) == []
    made = {
        "cka_codes": 0.5, "cka_reconstructions": 0.25, "agreement_pearson_matched": 0.125,
        "agreement_fraction_matched": 0.75, "activation_note": "",
    }  # fmt: skip
    words = value_pair_table([(knobs, dataclasses.replace(cell, pairs=pairs.assign(**made)))])
    assert words is not None
    (row,) = words.rows
    shown = dict(zip(words.header, row, strict=True))
    assert [shown[h] for h in ("CKA\ncodes", "CKA\nrec", "r of\nmatched", "agree\n[95%]")] == [
        "0.50", "0.25", "0.12", "0.75"
    ]  # fmt: skip


def test_maps_between_models_have_a_table_beside_their_nulls(make_run, over_seeds):
    config = ComparisonConfig(
        name="t", grid={"model": ["one", "two"]}, pair_by="model", null_draws=1, align="procrustes"
    )
    runs = [dataclasses.replace(make_run("x", i, 24), seed=v) for i, v in enumerate(("one", "two"))]
    same = np.eye(runs[0].d_in)
    fitted = Alignment(same, same, 0.75, -0.25, float("nan"), 20_480, 5_120, 3)
    cell = compare_cell(runs, [], config, alignments={(0, 1): fitted})
    places = {run.id: {"model": run.seed} for run in runs}
    cell = dataclasses.replace(cell, pairs=add_axis_columns(cell.pairs, places, config))
    cells = [({"sae": "x", "model": "one|two"}, cell)]
    words = map_table(cells)
    assert words is not None
    assert words.header[:3] == ("model", "and", "R² of map")
    assert words.rows == (("one", "two", "0.75", "-0.25", "–", "20,480", "5,120", "3", "0.50"),), (
        "a map that changes nothing shares 24 of 48"
    )
    assert words.footnotes[-1] == "**–**: a model of the pair has random weights itself."
    said = " ".join(notes(value_pair_table(cells)))
    assert "after an orthogonal map from the basis of the first into that of the second" in said
    (row,) = pairing_frame(cells).to_dict("records")
    assert (row["map_r2"], row["map_tokens"]) == (0.75, 20_480)
    assert map_table(over_seeds(["1", "2"])) is None


@pytest.mark.parametrize("align", [None, "identity", "procrustes", "activations"])
def test_each_alignment_has_its_note(over_seeds, align):
    """The runs of these cells have one basis, whatever the setting."""
    cells = [
        (knobs, dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, align=align)))
        for knobs, cell in over_seeds(["one", "two"], axis="model")
    ]
    said = " ".join(notes(value_pair_table(cells)))
    assert ("compared without alignment" in said) == (align is None)
    assert ("nothing has checked it" in said) == (align == "identity")
    assert "in the table of the maps" not in said, "no pair has a map"


@pytest.mark.parametrize("align", ["identity", "procrustes", "activations"])
def test_an_alignment_has_no_note_where_all_runs_are_of_one_model(over_seeds, align):
    cells = [
        (knobs, dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, align=align)))
        for knobs, cell in over_seeds(["6", "3"])
    ]
    assert "comparison.align" not in " ".join(notes(value_pair_table(cells)))
