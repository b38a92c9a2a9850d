import io
import re
from dataclasses import replace

import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from reseed.compare.registry import Interval
from reseed.errors import ReseedError
from reseed.report.cell_labels import varying_knobs
from reseed.report.format import format_number, with_interval
from reseed.report.table import NOT_SHARED, OFF_TARGET, cell_notes, main_table
from reseed.report.table_files import SUMMARY_COLUMNS, summary_frame, summary_markdown, write_tables
from reseed.report.terminal import print_summary

ISSUE_COLUMNS = [
    *("n_seeds", "shared_fraction", "shared_fraction_low", "shared_fraction_high"),
    *("shared_fraction_live", "coverage", "cosine_encoder", "cosine_decoder"),
    *("null_cosine", "null_shared_fraction", "fvu", "l0", "dead_fraction", "runs"),
]


@pytest.fixture(scope="module")
def folder(cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_tables(cells, folder)
    return folder


def printed(cells, **options):
    file = io.StringIO()
    print_summary(cells, console=Console(file=file, **options))
    return file.getvalue()


def test_summary_csv_has_the_knobs_and_the_promised_columns_first(folder):
    frame = pd.read_csv(folder / "summary.csv")
    assert list(frame.columns[:17]) == ["model", "layer", "sae", *ISSUE_COLUMNS]
    assert list(SUMMARY_COLUMNS) == ISSUE_COLUMNS
    assert len(frame) == 3


def test_a_cell_without_a_measure_has_empty_columns(cells, tmp_path):
    """So it is until `reseed compare` has added a new measure to every cell."""
    one, (knobs, cell), three = cells
    estimates = {name: found for name, found in cell.estimates.items() if name != "mmcs"}
    lacking = replace(
        cell,
        pairs=cell.pairs.drop(columns=["mmcs", "kappa"]),
        latents=cell.latents.drop_columns(["within"]),
        estimates=estimates,
    )
    write_tables([one, (knobs, lacking), three], tmp_path)
    frame = pd.read_csv(tmp_path / "summary.csv")
    assert frame[["mmcs", "kappa"]].isna().to_numpy().any(axis=1).tolist() == [False, True, False]
    latents = pd.read_parquet(tmp_path / "latents.parquet").set_index("sae")
    assert latents.loc["relu", "within"].isna().all()
    assert latents.loc["topk", "within"].notna().all()


def test_a_primary_measure_that_was_not_computed_is_an_error(cells, tmp_path):
    knobs, cell = cells[0]
    asked = replace(cell, settings=replace(cell.settings, primary="made_up"))
    with pytest.raises(ReseedError, match=r"`comparison\.primary` is made_up, which this compar"):
        write_tables([(knobs, asked)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_summary_csv_has_the_measures_of_each_cell(folder):
    frame = pd.read_csv(folder / "summary.csv").set_index("sae")
    half, none, two = frame.loc["topk"], frame.loc["relu"], frame.loc["batch_topk"]
    assert half["shared_fraction"] == pytest.approx(24 / 48)
    # Latents 10 … 47 are live, 10 … 23 of them shared; a partner fires as often as its latent.
    assert half["shared_fraction_live"] == pytest.approx(14 / 38)
    assert half["fvu"] == pytest.approx(0.21)
    assert half["l0"] == 8.25
    assert half["runs"] == "topk-0 topk-1 topk-2"
    assert half["unshared_fraction"] == pytest.approx(0.5)
    assert half["note"].startswith("all pairs are equal: no interval")
    assert half["shared_fraction_untrained"] == 0
    assert NOT_SHARED in none["note"]
    assert two["note"] == "fewer than 3 seeds: no interval"
    assert pd.isna(two["shared_fraction_low"])
    assert two["n_seeds"] == 2


def test_a_shared_fraction_near_its_null_is_marked(make_cell):
    # 3 draws of 48 latents cannot see below 1/144: ten times that is .07.
    assert cell_notes(make_cell(shared=3)[1])[0] == NOT_SHARED
    assert NOT_SHARED not in cell_notes(make_cell(shared=4)[1])


def test_pairs_csv_has_the_knobs_of_each_cell(folder, cells):
    frame = pd.read_csv(folder / "pairs.csv")
    assert frame.groupby("sae").size().to_dict() == {"topk": 3, "relu": 3, "batch_topk": 1}
    assert list(frame.columns[:7]) == ["model", "layer", "sae", "a", "b", "seed_a", "seed_b"]
    assert frame.columns[7:].tolist() == cells[0][1].pairs.columns[4:].tolist()


def test_latents_parquet_has_a_row_per_latent_of_each_run(folder):
    table = pq.read_table(folder / "latents.parquet")
    frame = table.to_pandas()
    assert len(frame) == 48 * (3 + 3 + 2)
    assert not frame.duplicated(["run", "latent"]).any()
    topk = frame[frame["sae"] == "topk"]
    assert (topk["shared_with"] == topk["latent"].lt(24) * 2).all()
    lists = ["others", "partner_encoder", "partner_decoder", "cosine_encoder", "cosine_decoder"]
    for name in [*lists, "shared"]:
        assert frame[name].map(len).tolist() == [2] * 48 * 6 + [1] * 48 * 2, name


def test_knob_values_of_different_types_share_a_column(make_cell, tmp_path):
    write_tables([make_cell(k=8), make_cell("relu", k="free")], tmp_path)
    values = pq.read_table(tmp_path / "latents.parquet")["k"].unique().to_pylist()
    assert values == ["8", "free"]


def test_a_knob_named_like_a_column_is_kept(make_cell):
    row = summary_frame([make_cell(num_latents="wide")]).iloc[0]
    assert row["num_latents"] == "wide"


def test_only_varying_knobs_are_columns(cells):
    assert varying_knobs(cells) == ["sae"]
    words = main_table(cells)
    assert words.caption.startswith("model=embedded · layer=2 · 48 latents · 2–3 seeds")
    assert words.header[:2] == ("sae", "seeds")
    assert varying_knobs(cells[:1]) == []
    assert "sae=topk" in main_table(cells[:1]).caption


def test_nothing_is_cut_off_in_a_file(make_cell):
    wide = {f"training.option_{i}": "a-rather-long-value" * 3 for i in range(3)}
    out = printed([make_cell(), make_cell("relu", n=4, **wide)])
    assert "…" not in out
    assert "\x1b" not in out, "no colour in a file"
    rows = [line.split() for line in out.splitlines()]
    for words in main_table([make_cell(), make_cell("relu", n=4, **wide)]).rows:
        assert " ".join(words).split() in rows, "each row of the table is one line"


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_number_is_cut_off_on_a_terminal(cells, width):
    out = printed(cells, width=width, force_terminal=True, color_system=None)
    assert "…" not in out
    words = main_table(cells)
    told = " ".join(out.split()).partition("in summary.md: ")[2].partition(" shared: ")[0]
    words = words.without([name for name in words.spare if name.replace("\n", " ") in told])
    numbers = {word for row in words.rows for entry in row for word in entry.split()}
    assert numbers <= set(out.split())


@pytest.fixture(scope="module")
def worlds(make_cell):
    """Return cells like those of comparison=worlds: the arm fixes model, width and L0."""
    arms = (("easy", "world_easy", 3), ("hierarchy", "world_hierarchy_small", 10))
    found = []
    for arm, model, target in arms:
        for sae in ("topk", "batch_topk", "matryoshka"):
            more = {"num_latents": 64 * target, "sparsity": f"L0≈{target}"}
            knobs, cell = make_cell(sae, model=model, **more)
            found.append(({"arm": arm} | knobs, cell))
    return found


def on_terminal(cells, width):
    return printed(cells, width=width, force_terminal=True, color_system=None)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_arms_that_fix_the_model_leave_a_table_that_fits(worlds, width):
    out = on_terminal(worlds, width)
    assert max(len(line.rstrip()) for line in out.splitlines()) <= width
    lines = [line.split() for line in out.splitlines()]
    header = next(line for line in lines if line[:1] == ["arm"])
    assert header[:2] == ["arm", "sae"]
    assert "model" not in header
    rows = [line for line in lines if line[:1] in (["easy"], ["hierarchy"])]
    assert len(rows) == 6, "a table, no paragraphs"
    told = "easy: model world_easy, 192 latents, L0≈3 · hierarchy: model world_hierarchy_small, 640"
    assert told in " ".join(out.split())
    assert ("not shown (the window is too narrow)" in out) == (width == 80)


def test_spare_columns_are_dropped_before_the_table_becomes_paragraphs(worlds):
    assert "in summary.md: cos null\n" in on_terminal(worlds, 84)
    assert "in summary.md: shared null, cos null\n" in on_terminal(worlds, 80)
    paragraphs = on_terminal(worlds, 60)
    assert "arm easy · sae topk · " in paragraphs
    for out in (paragraphs, on_terminal(worlds, 100), printed(worlds)):
        assert "not shown" not in out


@pytest.mark.parametrize("width", range(60, 100, 4))
def test_no_name_is_broken_across_lines(cells, width):
    table = on_terminal(cells, width).partition("the exact matchings")[0]
    assert table.count("batch_topk") == 1


def test_csv_and_parquet_keep_the_knobs_that_the_arm_determines(worlds):
    assert {"arm", "model", "num_latents", "sparsity"} <= set(summary_frame(worlds).columns)
    text = summary_markdown(worlds)
    assert "| arm | sae | shared [95%] |" in text
    assert "- easy: model world_easy, 192 latents, L0≈3 · hierarchy: " in text


def test_incomplete_cells_are_listed_in_the_footnotes(cells, tmp_path):
    line = "incomplete: sae=gated: 1 of 3 runs (the loss is not finite)"
    write_tables(cells, tmp_path, [line])
    text = (tmp_path / "summary.md").read_text()
    assert f"- {line}\n" in text
    assert text.index(line) < text.index("## More measures")
    assert "incomplete: sae=gated: 1 of 3" in (tmp_path / "summary.tex").read_text()
    assert "incomplete" not in summary_markdown(cells)


def test_an_l0_off_its_target_is_noted_with_its_value(make_cell):
    # Every run has an L0 of 8.25: 3.1% above 8, 5% below 8.6842, 5.2% below 8.7.
    cells = [make_cell(sparsity="L0≈8"), make_cell("relu", sparsity="L0≈8.7")]
    assert f"**{OFF_TARGET}**: relu, L0≈8.7 (8.2)" in main_table(cells).footnotes
    assert [OFF_TARGET in note for note in summary_frame(cells)["note"]] == [False, True]
    assert OFF_TARGET not in summary_markdown([make_cell(sparsity="k=3")])
    both = [make_cell(sparsity="L0≈3"), make_cell("relu", sparsity="L0≈3")]
    assert f"**{OFF_TARGET}**: topk (8.2); relu (8.2)" in main_table(both).footnotes


def test_the_mark_of_a_low_shared_fraction_states_its_rule():
    assert NOT_SHARED == "shared at most 10 × its null: not converged or not shared"


def test_one_pair_is_not_called_a_mean(make_cell):
    text = " ".join(main_table([make_cell(n=2)]).footnotes)
    assert "One pair of n = 2 seeds." in text
    assert "Mean over the 3 pairs of n = 3 seeds, with" in " ".join(
        main_table([make_cell()]).footnotes
    )


def test_a_single_latent_has_no_null(make_cell):
    knobs, cell = make_cell()
    alone = replace(cell, pairs=cell.pairs.assign(null_simulated_latents=1))
    (row,) = main_table([(knobs, alone)]).rows
    assert row[3] == "–"
    assert main_table([(knobs, cell)]).rows[0][3] == "< 1/48"
    assert NOT_SHARED not in cell_notes(alone)


def test_at_100_columns_a_row_is_a_line(cells):
    out = printed(cells, width=100, force_terminal=True, color_system=None)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for row in main_table(cells).rows:
        assert " ".join(row) in lines


def test_the_summary_explains_its_columns(cells):
    file = io.StringIO()
    print_summary(cells, title="quickstart", console=Console(file=file))
    out = " ".join(file.getvalue().split())
    assert "both cosines are at least 0.7" in out
    assert "95% interval over seeds" in out
    assert "the 1–3 pairs of n = 2–3 seeds" in out
    assert "at least 10 times in 5,000 held-out tokens" in out
    assert "< 1/48" in out, "a null that was not seen is not a null of 0"
    assert f"{NOT_SHARED}: relu" in out
    assert "fewer than 3 seeds: no interval: batch_topk" in out
    assert out.startswith("quickstart")


def test_markdown_tables_are_complete_and_equal_the_terminal_s(cells):
    text = summary_markdown(cells)
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    first = tables[0]
    assert "| shared [95%] |" in first
    for table in tables:
        lines = table.strip().splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert re.fullmatch(r"\|( :?--:? \|)+", lines[1])
        assert len(lines) == 2 + len(cells) + ("| ≥ 0.3 |" in table)
    for note in main_table(cells).footnotes:
        assert note in text
    assert "- topk: `topk-0`, `topk-1`, `topk-2`\n- relu: " in text


def test_a_vertical_bar_in_a_knob_does_not_break_the_markdown_table(make_cell):
    text = summary_markdown([make_cell(hookpoint="a|b"), make_cell("relu", hookpoint="c")])
    assert "| a\\|b |" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.4239, "0.42"), (1.0, "1.00"), (0.0042, "0.004"), (0.00996, "0.01"),
     (-0.5, "-0.50"), (float("nan"), "–"), (0.001, "0.001"), (0.00099, "< 0.001"),
     (-2e-7, "> -0.001")],
)  # fmt: skip
def test_numbers_are_formatted(value, text):
    assert format_number(value) == text


def test_an_interval_is_formatted():
    assert with_interval(Interval(0.4, 0.3, 0.52, 0.1, 3)) == "0.40 [0.30, 0.52]"
    assert with_interval(Interval(0.001, 2e-7, 0.88, 3.0, 3)) == "0.001 [<0.001, 0.88]"
    assert with_interval(Interval(0.4, None, None, None, 2, "few")) == "0.40"


def test_writing_tables_of_no_cells_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are no cells to write tables of"):
        write_tables([], tmp_path)
