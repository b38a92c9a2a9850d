import io
import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import LABELS, Dictionary
from reseed.report.markup import markdown_inline
from reseed.report.table_files import summary_frame, summary_markdown, write_tables
from reseed.report.terminal import print_summary
from reseed.report.truth import TITLE, truth_tables

METRICS = {"mcc": 0.87, "f1": 0.76, "recall_energetic": 0.65, "atoms": 0.5, "composites": 0.5}


def run(seed, atoms, shared=24):
    """Return a run of 48 latents; the first ``shared`` are in every seed, ``atoms`` are atoms."""
    rows = np.random.default_rng([9, seed]).standard_normal((2, 48, 32))
    rows[:, :shared] = np.random.default_rng(0).standard_normal((2, shared, 32))
    truth = np.full(48, LABELS.index("composite"))
    truth[list(atoms[seed] if isinstance(atoms, list) else atoms)] = LABELS.index("atom")
    firing = 10 + np.arange(48) % 10  # all live; equal firing for shared and other latents
    return Dictionary(
        id=f"run-{seed}",
        seed=str(seed),
        encoder=rows[0],
        decoder=rows[1],
        firing=firing,
        held_out_tokens=5000,
        dead=np.zeros(48, dtype=bool),
        metrics={"fvu": 0.2, "l0": 8.0} | {f"truth_{k}": v for k, v in METRICS.items()},
        truth=truth,
    )


def cell(sae, atoms, n=3, **more):
    settings = ComparisonConfig(name="trial", grid={"seed": list(range(max(2, n)))}, null_draws=1)
    runs = [run(s, atoms, **more) for s in range(n)]
    return {"model": "embedded", "layer": 2, "sae": sae}, compare_cell(runs, [], settings)


@pytest.fixture(scope="module")
def mixed(make_cell):
    """Return one cell with truth, one that shares nothing, and one without labels."""
    # Each seed has one more shared atom: 18, 19 and 20 of 24. 6 of 24 orphans are atoms.
    atoms = [[*range(18 + s), *range(24, 30)] for s in range(3)]
    return [cell("topk", atoms), cell("relu", range(12), shared=0), make_cell("gated", n=2)]


def printed(cells, **options):
    file = io.StringIO()
    print_summary(cells, console=Console(file=file, **options))
    return file.getvalue()


def test_the_numbers_are_those_by_hand(mixed):
    first, second = truth_tables(mixed)
    row = dict(zip(first.header, first.rows[0], strict=True))
    assert row["sae"] == "topk"
    assert row["shared\nlive"] == "0.50"
    assert row["P(atom | shared)\n[95%]"].startswith("0.79 [")  # 19/24
    assert row["P(atom |\norphan)"] == "0.25"  # 6/24
    assert row["difference\n[95%]"].startswith("0.54 [")
    # P(shared | atom) = 57/75 over P(shared | no atom) = 15/69.
    assert row["likelihood\nratio"] == "3.50"
    row = dict(zip(second.header, second.rows[0], strict=True))
    assert row["P(shared |\natom)"] == "0.76"
    assert row["P(shared |\ncomposite)"] == "0.22"
    assert row["P(shared |\ngroup)"] == "–"
    assert (row["MCC"], row["F1"], row["recall of\nenergetic"]) == ("0.87", "0.76", "0.65")


def test_a_missing_number_has_its_reason(mixed):
    first, _ = truth_tables(mixed)
    row = dict(zip(first.header, first.rows[1], strict=True))
    assert row["P(atom | shared)\n[95%]"] == row["difference\n[95%]"] == "–"
    assert row["P(atom |\norphan)"] == "0.25"
    assert "**no live latent is shared**: relu" in first.footnotes


def test_cells_without_labels_are_left_out_and_without_any_label_nothing_changes(mixed, cells):
    assert [row[0] for row in truth_tables(mixed)[0].rows] == ["topk", "relu"]
    assert truth_tables(cells) == []
    assert TITLE not in summary_markdown(cells) + printed(cells)
    assert not [name for name in summary_frame(cells) if name.startswith("truth")]


def test_all_files_have_the_truth(mixed, tmp_path):
    write_tables(mixed, tmp_path)
    frame = pd.read_csv(tmp_path / "summary.csv").set_index("sae")
    topk, relu, gated = (frame.loc[name] for name in ("topk", "relu", "gated"))
    assert topk["truth_atom_given_shared"] == pytest.approx(19 / 24)
    assert topk["truth_atom_given_shared_low"] < 19 / 24 < topk["truth_atom_given_shared_high"]
    assert topk["truth_difference"] == pytest.approx(19 / 24 - 6 / 24)
    assert topk["truth_mcc"] == pytest.approx(0.87)
    assert pd.isna(relu["truth_atom_given_shared"])
    assert pd.isna(gated["truth_mcc"])
    latents = pq.read_table(tmp_path / "latents.parquet").to_pandas()
    words = latents.groupby("sae")["truth"].unique().map(lambda x: sorted(map(str, x)))
    assert words["topk"] == words["relu"] == ["atom", "composite"]
    assert latents.loc[latents["sae"] == "gated", "truth"].isna().all()


def test_a_knob_named_like_a_column_does_no_harm(mixed, tmp_path):
    """If another axis than the seed pairs up, the seed is both a knob and a column."""
    write_tables([(knobs | {"seed": 0}, cell) for knobs, cell in mixed], tmp_path)
    schema = pq.read_schema(tmp_path / "latents.parquet")
    assert (schema.names.count("seed"), schema.names.count("truth")) == (1, 1)


def test_markdown_has_both_tables_between_the_summary_and_more_measures(mixed):
    text = summary_markdown(mixed)
    assert text.index("# Summary") < text.index(f"## {TITLE}") < text.index("## More measures")
    block = text[text.index(f"## {TITLE}") : text.index("## More measures")]
    tables = re.findall(r"(?:^\|.*\|$\n?)+", block, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        lines = table.strip().splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert len(lines) == 2 + 2
    for words in truth_tables(mixed):
        assert all(markdown_inline(note) in text for note in words.footnotes)


def test_at_120_columns_a_row_is_a_line(mixed):
    out = printed(mixed, width=120, force_terminal=True, color_system=None)
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 120
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for words in truth_tables(mixed):
        for row in words.rows:
            assert " ".join(row) in lines


def test_a_blank_line_separates_tables(mixed):
    lines = printed(mixed).splitlines()
    for words in truth_tables(mixed):
        assert lines[lines.index(words.caption) - 1] == ""


def test_tables_with_two_knobs_fit_80_columns(mixed):
    """The knobs are an arm and an architecture, as in comparison=worlds."""
    arms = [
        ({"arm": arm} | knobs | {"sae": sae}, cell)
        for arm in ("hierarchy", "subspaces")
        for sae, (knobs, cell) in zip(("matryoshka", "relu"), mixed[:2], strict=True)
    ]
    out = printed(arms, width=80, force_terminal=True, color_system=None)
    assert "arm hierarchy · sae" not in out, "no paragraphs"
    assert "in summary.md: shared live\n" in out
    assert max(len(line.rstrip()) for line in out.splitlines()) <= 80


@pytest.mark.parametrize("width", [40, 80])
def test_in_a_narrow_window_no_number_is_cut_off(mixed, width):
    out = printed(mixed, width=width, force_terminal=True, color_system=None)
    assert "…" not in out.replace("P(shared | …)", "")
    tables = truth_tables(mixed)
    numbers = {word for t in tables for row in t.rows for entry in row for word in entry.split()}
    assert numbers <= set(out.split())


def test_two_seeds_have_no_interval():
    first, _ = truth_tables([cell("topk", range(18), n=2)])
    assert first.rows[0][:2] == ("0.50", "0.75"), "one cell: no column names it"
    assert "**fewer than 3 seeds: no interval**" in first.footnotes
