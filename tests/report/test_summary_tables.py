"""The tables of summary.md below the first, on cells whose numbers are known by hand."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reseed.compare import registry
from reseed.compare.activations.tables import NOTE, TOKENS, with_activations
from reseed.compare.registry import Interval, columns, declared, measure
from reseed.compare.tables import RUN_COLUMNS
from reseed.report.line_figures import quality_by_rank
from reseed.report.sharing_by_firing import matched_latents, strata_frame
from reseed.report.summary_tables import (
    ELSEWHERE,
    TABLES,
    by_threshold,
    on_activations,
    summary_tables,
)
from reseed.report.table import kappa_column, measure_columns
from reseed.report.table_files import summary_frame, summary_markdown, write_tables

MEASURES = Path(__file__).parents[2] / "docs" / "measures.md"


def tables(cells, title):
    return dict(summary_tables(cells))[title]


def entries(words, row):
    return dict(zip(words.header, words.rows[row], strict=True))


def test_the_sections_are_in_order(cells):
    expected = ["More measures", "Over seeds", "By threshold", "By firing", "Nulls", "Subspaces"]
    assert [title for title, _ in summary_tables(cells)] == expected
    text = summary_markdown(cells)
    heads = re.findall("^## (.*)$", text, flags=re.MULTILINE)
    assert heads == [*expected, "Runs"]


def test_every_table_has_a_row_per_cell_and_as_many_entries_as_heads(cells):
    for title, made in summary_tables(cells):
        for words in made:
            assert len(words.rows) == len(cells) + (title == "By threshold")
            assert {len(row) for row in words.rows} == {len(words.header)}
            assert len(set(words.header)) == len(words.header), "no head twice"


def test_other_rules_agree_on_a_cell_that_shares_its_first_half(cells):
    rules, _, cycles = (entries(words, 0) for words in tables(cells, "More measures"))
    # 24 of 48 rows are equal in all runs; the others are random in 32 dimensions.
    for name in ("covered", "shared dec", "shared joint", "mutual", "mutual, dec"):
        assert rules[name].startswith("0.50"), name
    assert rules["split"] == "0"
    # Latents 0 and 1 are dead; 22 of the other 46 are shared.
    assert rules["shared not dead"].startswith(f"{22 / 46:.2f}")
    assert cycles["cycle, shared"] == "1.00"
    assert entries(tables(cells, "More measures")[0], 1)["covered"] == "0"


def test_the_table_of_thresholds_ends_with_the_paper_s_row(cells):
    words = by_threshold(cells)
    assert words.rows[-1][0].startswith("Paulo & Belrose, Pythia-160M")
    assert words.rows[-1][1:] == ("0.73", "–", "0.60", "0.52", "0.42", "0.29", "0.11")
    shared = [entry.split()[0] for entry in words.rows[0][1:]]
    assert shared[2:] == ["0.50"] * 5, "equal rows reach any threshold, random ones none of these"


def test_the_table_of_thresholds_names_a_single_cell(cells):
    words = by_threshold(cells[:1])
    assert words.header[0] == "cell"
    assert words.rows[0][0] == "topk"


def test_the_shared_fraction_by_decile_of_firing_is_that_by_hand(cells):
    """Latent i fires i times, and the first 24 are shared (12 in the third cell).

    Latents 10 … 47 are live, so the first decile ends at 10 + 37/10 = 13.7.
    """
    deciles = tables(cells, "By firing")[0]
    half, none, two = (entries(deciles, i) for i in range(3))
    assert list(half)[1:] == ["never fired", "not live", *map(str, range(1, 11))]
    assert [half[k] for k in ("never fired", "not live", "1", "2", "3")] == ["1.00"] * 5
    assert [half[k] for k in ("5", "6", "7", "8", "9", "10")] == ["0"] * 6
    assert set(none.values()) == {"relu", "0"}
    assert two["1"] == "0.50", "10 and 11 of 10, 11, 12, 13"


def test_the_shared_fraction_weighted_by_firing_is_that_by_hand(cells):
    kinds = entries(tables(cells, "By firing")[1], 0)
    total, first = sum(range(48)), sum(range(24))
    assert kinds["shared by firing"].startswith(f"{first / total:.2f}")
    assert kinds["shared dense"] == "–", "none fires on a tenth of 5,000 tokens"
    assert kinds["shared by variance"] == "–"
    assert "at equal firing" not in tables(cells[:1], "By firing")[1].header


def test_strata_csv_has_every_stratum_of_every_cell(cells, tmp_path):
    write_tables(cells, tmp_path)
    frame = pd.read_csv(tmp_path / "strata.csv")
    decile = frame[(frame["kind"] == "decile") & (frame["sae"] == "topk")]
    assert len(decile) == 12
    assert decile["latents"].sum() == 48
    assert len(strata_frame(cells[:1])) == len(frame) / 3


def test_kappa_and_its_interval_are_those_by_hand(make_cell):
    """For S = .5 [.3, .7] and a null of .2, κ is (.5 − .2)/.8, and the ends likewise."""
    _, cell = make_cell()
    shared = dataclasses.replace(cell.estimates["shared_fraction"], mean=0.5, low=0.3, high=0.7)
    cell = dataclasses.replace(
        cell,
        estimates=cell.estimates | {"shared_fraction": shared},
        pairs=cell.pairs.assign(kappa_untrained=0.375, untrained_shared_fraction=0.2),
    )
    assert kappa_column("untrained", "untrained_shared_fraction")(cell) == "0.38 [0.12, 0.62]"
    alone = dataclasses.replace(shared, low=None, high=None)
    cell = dataclasses.replace(cell, estimates=cell.estimates | {"shared_fraction": alone})
    assert kappa_column("untrained", "untrained_shared_fraction")(cell) == "0.38"


def test_the_table_of_nulls_has_the_three_nulls_of_pairs(cells):
    row = entries(tables(cells, "Nulls")[0], 0)
    assert row["isotropic S₀"] == "< 1/48"
    assert row["untrained S₀"] == "0"
    assert row["κ, untrained"] == row["shared"], "over a null of 0 κ is S"
    assert row["covariance S₀"] == row["κ, covariance"] == "–", "these runs have no covariance"


def test_subspace_overlaps_are_shown_with_their_null(cells):
    _, cell = cells[0]
    row = entries(tables(cells, "Subspaces")[0], 0)
    own, null = row["overlap, shared"].split(" / ")
    assert own.startswith("1.00"), "the same rows"
    assert null == f"{cell.pair_mean('null_subspace_overlap_shared'):.2f}"
    assert row["overlap, dense"] == "–"
    assert row["directions, dense"] == "0.0"


def test_summary_csv_has_every_estimate_with_its_ends(cells):
    frame = summary_frame(cells)
    for i, (_, cell) in enumerate(cells):
        row = frame.iloc[i]
        for name, found in cell.estimates.items():
            for column, value in ((name, found.mean), (f"{name}_low", found.low)):
                assert (
                    pd.isna(row[column])
                    if value is None
                    else np.isclose(row[column], value, equal_nan=True)
                ), column
            assert f"{name}_high" in frame
    assert {"kappa_covariance", "null_mmcs", "untrained_coverage"} <= set(frame.columns)
    assert frame["shared_fraction_standardised"].between(0, 1).all()
    assert frame.columns.is_unique


def test_measures_on_activations_have_tables(acting):
    agree, replaced = on_activations([acting])
    row = entries(agree, 0)
    assert row["Jaccard, orphan"].startswith("0.25")
    assert row["CKA, latents"].startswith("0.90")
    # Latents 10 … 47 are live; 10 … 23 of them lower the error.
    assert row["novel"].startswith(f"{14 / 38:.2f}")
    assert entries(replaced, 0)["R"].startswith(f"{np.mean(np.arange(10, 48) / 48):.2f}")
    assert "On 100 held-out tokens" in agree.footnotes[0]
    assert "On activations" in dict(summary_tables([acting]))


def test_a_table_says_why_activations_were_not_measured(acting, make_cell):
    knobs, cell = make_cell("relu")
    lacking = (knobs, with_activations(cell, None, "the text is gone"))
    (words,) = on_activations([lacking])
    assert words.rows == (("relu", "the text is gone"),)
    *_, last = on_activations([acting, lacking])
    assert last.rows == (("relu", "the text is gone"),)
    assert len(on_activations([acting, lacking])[0].rows) == 1


def test_quality_by_rank_ends_at_the_mean_and_has_the_area(acting):
    _, cell = acting
    curve = quality_by_rank(cell)
    live = np.arange(10, 48) / 48
    assert np.allclose(curve, live.cumsum() / np.arange(1, 39), atol=1e-6)
    assert curve.mean() == pytest.approx(cell.estimates["substitution_area"].mean, abs=1e-6)


def test_matched_latents_have_their_firing_rate(make_cell):
    _, cell = make_cell(n=3, shared=24)
    found = matched_latents(cell)
    assert len(found.rate) == len(found.cosine) == 3 * 2 * 48
    assert found.shared.sum() == 3 * 2 * 24
    assert np.allclose(found.cosine[found.shared], 1)
    # Latent i fires i times in 5,000 tokens.
    assert np.allclose(np.unique(found.rate), np.arange(48) * 2000.0)
    assert found.rate[found.shared].max() == pytest.approx(23 * 2000)


def test_every_declared_measure_is_in_a_table(acting):
    """A forgotten name of a table, or a table that nothing makes, would hide a measure."""
    assert {own.table for own in declared()} <= {*TABLES, *ELSEWHERE}
    headers = {
        head for _, made in summary_tables([acting]) for table in made for head in table.header
    }
    headers |= {f"shared {head}" for head in headers if head.startswith("≥")}
    for name in TABLES:
        assert measure_columns(name).keys() <= headers, name


def test_a_measure_of_another_package_has_a_table_of_its_own(cells, monkeypatch):
    monkeypatch.setattr(registry, "_declared", [*registry._declared])
    measure("zeta_{}", family=("x", "y"), scale="fraction", heading="ζ, {}", help="a made-up one")(
        len
    )
    measure("eta", level="run", help="a run's")(len)
    measure("theta", help="in no cell")(len)
    one, two, three = cells
    found = Interval(0.5, 0.4, 0.6, 0.05, 3)
    cell = dataclasses.replace(
        two[1], estimates=two[1].estimates | {"zeta_x": found, "zeta_y": found, "eta": found}
    )
    *_, own = tables([one, (two[0], cell), three], "More measures")
    assert own.header == ("sae", "ζ, x", "ζ, y", "eta")
    assert [row[1:] for row in own.rows] == [("–",) * 3, ("0.50 [0.40, 0.60]",) * 3, ("–",) * 3]
    assert own.footnotes == ("**ζ**: a made-up one.", "**eta**: a run's.")


def test_every_column_of_the_files_is_explained(acting):
    told = set(re.findall(r"`([A-Za-z_0-9.]+)`", MEASURES.read_text()))
    named = {name for level in ("pair", "run") for name in columns(level)}
    named |= {"a", "b", "seed_a", "seed_b", NOTE, TOKENS, *RUN_COLUMNS}
    assert {*acting[1].pairs, *acting[1].runs} - named <= told, "others are explained by hand"


def test_every_column_of_latents_is_explained(acting):
    told = set(re.findall(r"`([A-Za-z_0-9.]+)`", MEASURES.read_text()))
    assert set(acting[1].latents.column_names) - {"run", "seed", "latent"} - told == set()
