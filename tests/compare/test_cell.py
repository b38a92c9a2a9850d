import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest

from reseed.compare.cell import CellResult, compare_cell
from reseed.compare.pair import compare_pair
from reseed.compare.registry import Interval, fractions
from reseed.system.integrity import read_record, write_record


@pytest.fixture
def cell(partly_shared, settings):
    return compare_cell(partly_shared(4, 12), partly_shared(4, 0), settings)


def test_a_cell_of_synthetic_runs_has_the_known_measures(cell):
    assert cell.n_seeds == 4
    assert len(cell.pairs) == 6
    assert (cell.pairs["shared_latents"] == 12).all()
    assert cell.estimates["shared_fraction"].mean == pytest.approx(12 / 40)
    assert (cell.pairs["untrained_shared_fraction"] == 0).all()
    assert cell.p == pytest.approx([28 / 40, 0, 0, 12 / 40])
    assert cell.u == pytest.approx([28 / 40] * 3)
    assert cell.estimates["fvu"].mean == pytest.approx(0.115)


def test_pairs_are_those_of_compare_pair(partly_shared, settings, cell):
    runs = partly_shared(4, 12)
    pair = compare_pair(runs[1], runs[3], settings.threshold, settings.live_at_least)
    alone = dataclasses.replace(pair, null_draws=settings.null_draws).row()
    alone = {name: value for name, value in alone.items() if "untrained" not in name}
    row = cell.pairs[(cell.pairs["a"] == "run-1") & (cell.pairs["b"] == "run-3")]
    # `repr` because NaN is not equal to itself.
    same = {name: row[name].item() for name in alone}
    assert repr(same) == repr(alone)


def test_the_latent_table_lists_the_runs_that_share_each_latent(cell):
    table = cell.latents.to_pandas()
    assert len(table) == 4 * 40
    assert table.groupby("run")["latent"].apply(list).map(lambda x: x == list(range(40))).all()
    assert table["shared_with"].value_counts().to_dict() == {0: 4 * 28, 3: 4 * 12}
    long = table.explode(["others", "partner_encoder", "partner_decoder", "shared"])
    shared = long[long["shared"].astype(bool)]
    links = set(zip(shared["run"], shared["latent"], shared["others"], strict=True))
    back = set(zip(shared["others"], shared["partner_encoder"], shared["run"], strict=True))
    assert len(links) == 4 * 12 * 3
    assert links == back, "a shared latent's partner shares it too"


def test_a_cell_is_the_same_after_writing_and_reading(cell, tmp_path):
    cell.write(tmp_path / "cell")
    again = CellResult.read(tmp_path / "cell")
    pd.testing.assert_frame_equal(again.pairs, cell.pairs)
    pd.testing.assert_frame_equal(again.runs, cell.runs)
    assert again.latents.equals(cell.latents)
    pd.testing.assert_frame_equal(again.strata, cell.strata)
    assert repr(again.estimates) == repr(cell.estimates)  # NaN is not equal to itself
    assert again.settings == cell.settings
    assert again.measures == cell.measures
    assert again.measures
    assert np.array_equal(again.p, cell.p)
    names = {"cell.json", "pairs.parquet", "latents.parquet", "strata.parquet"}
    assert {path.name for path in (tmp_path / "cell").iterdir()} == names


def test_an_interval_of_width_zero_in_an_older_file_is_not_shown(cell, tmp_path):
    """Version 0.1 wrote one if all pairs or runs were equal."""
    old = Interval(0.3, 0.3, 0.3, 0.0, 4)
    estimates = cell.estimates | {"shared_fraction": old}
    dataclasses.replace(cell, estimates=estimates).write(tmp_path)
    found = CellResult.read(tmp_path).estimates["shared_fraction"]
    assert (found.mean, found.low, found.high, found.standard_error) == (0.3, None, None, None)
    assert found.reason.startswith("all values are equal: no interval")


def test_unknown_numbers_survive_writing_and_reading(partly_shared, settings, tmp_path):
    runs = [
        dataclasses.replace(x, firing=np.zeros(40, int), metrics={}) for x in partly_shared(2, 5)
    ]
    cell = compare_cell(runs, [], settings)
    assert cell.pairs["untrained_shared_fraction"].isna().all()
    cell.write(tmp_path)
    again = CellResult.read(tmp_path)
    pd.testing.assert_frame_equal(again.pairs, cell.pairs)
    live = again.estimates["shared_fraction_live"]
    assert np.isnan(live.mean)
    assert live.reason == "undefined in at least one pair"
    json.loads((tmp_path / "cell.json").read_text(), parse_constant=pytest.fail)


def test_a_failed_write_leaves_no_partial_file_and_no_record(cell, tmp_path, monkeypatch):
    cell.write(tmp_path)
    before = (tmp_path / "pairs.parquet").read_bytes()

    def fail(_, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"):
        cell.write(tmp_path)
    assert (tmp_path / "pairs.parquet").read_bytes() == before
    # The record is gone, so that tables of two writes are never read as one cell.
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(FileNotFoundError, match="holds no compared cell"):
        CellResult.read(tmp_path)


def test_the_firing_of_untrained_weights_is_ignored(partly_shared, settings, cell):
    silent = [
        dataclasses.replace(x, firing=np.zeros(40, int), held_out_tokens=0)
        for x in partly_shared(4, 0)
    ]
    again = compare_cell(partly_shared(4, 12), silent, settings)
    pd.testing.assert_frame_equal(again.pairs, cell.pairs)


def test_runs_of_different_numbers_of_latents_are_compared(dictionary, settings):
    rows = np.random.default_rng(0).standard_normal((2, 30, 64))
    runs = [dictionary(*rows[:, :n], seed=str(n)) for n in (30, 20, 25)]
    cell = compare_cell(runs, [], settings)
    assert cell.pairs["shared_latents"].tolist() == [20, 25, 20]
    assert cell.pairs["shared_fraction"].tolist() == pytest.approx([0.8, 50 / 55, 40 / 45])
    assert len(cell.latents) == 75


def test_every_fraction_has_an_interval_within_its_range(partly_shared, settings):
    runs = partly_shared(3, 12)
    rng = np.random.default_rng(0)
    noisy = [
        dataclasses.replace(x, encoder=x.encoder + rng.normal(0, 0.8, x.encoder.shape))
        for x in runs
    ]
    cell = compare_cell(noisy, [], settings)
    for name in fractions():
        found = cell.estimates[name]
        assert found.reason or 0 <= found.low <= found.mean <= found.high <= 1, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs, make: ([runs[0]], []), "at least 2 runs in a cell; got 1"),
        (lambda runs, make: ([runs[0], runs[0]], []), "each run must occur once in a cell; run-0"),
        (
            lambda runs, make: ([runs[0], dataclasses.replace(runs[1], seed="0")], []),
            "each seed must occur once in a cell; 0 occurs twice",
        ),
        (lambda runs, make: (runs, runs[::-1]), "in the same order; the values of seed are 1, 0"),
        (lambda runs, make: (runs, runs[:1]), "in the same order; the values of seed are 0 and"),
    ],
)
def test_invalid_cells_are_refused(partly_shared, dictionary, settings, change, message):
    trained, untrained = change(partly_shared(2, 5), dictionary)
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_cell(trained, untrained, settings)


def test_reading_a_folder_without_a_cell_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no compared cell: there is no cell\.json"):
        CellResult.read(tmp_path)


def test_a_cell_of_another_format_is_refused(cell, tmp_path):
    cell.write(tmp_path)
    write_record(tmp_path / "cell.json", read_record(tmp_path / "cell.json") | {"format": 0})
    with pytest.raises(ValueError, match="has format 0; this version reads 3"):
        CellResult.read(tmp_path)
