"""Cells of runs whose activations differ in width."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from reseed.compare.cell import CellResult, compare_cell
from reseed.compare.dictionary import DIFFERENT_WIDTHS as NO_COMMON_SPACE
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.compare.registry import columns

COUNTS = {f"{word}_{x}" for word in ("num_latents", "live", "dead", "zero", "dense") for x in "ab"}


@pytest.fixture
def mixed(partly_shared, dictionary):
    """Two runs of 64 dimensions that share 30 of 40 latents, and one run of 8 dimensions."""
    rng = np.random.default_rng(1)
    firing = np.where(np.arange(30) < 4, 3, 200)
    metrics = {"fvu": 0.3, "l0": 8.0, "dead_fraction": 0.0}
    other = dictionary(*rng.standard_normal((2, 30, 8)), seed="2", firing=firing, metrics=metrics)
    return [*partly_shared(2, 30), dataclasses.replace(other, covariance=np.eye(8))]


@pytest.fixture
def chosen(settings):
    return dataclasses.replace(settings, grid={"model": ["0", "1", "2"]}, pair_by="model")


def test_measures_of_weights_without_a_common_space_are_nan(mixed, chosen):
    cell = compare_cell(mixed, mixed, chosen)
    alone = compare_cell(mixed[:2], mixed[:2], chosen)
    within, *across = cell.pairs.to_dict("records")
    assert [row[WEIGHTS_NOTE] for row in (within, *across)] == [
        "",
        NO_COMMON_SPACE,
        NO_COMMON_SPACE,
    ]
    assert WEIGHTS_NOTE not in alone.pairs
    for name, value in alone.pairs.iloc[0].to_dict().items():
        assert within[name] == pytest.approx(value, nan_ok=True), name
    for row in across:
        known = {k for k, v in row.items() if not (isinstance(v, float) and np.isnan(v))}
        assert known == {"a", "b", "seed_a", "seed_b", WEIGHTS_NOTE} | COUNTS
        assert (row["num_latents_b"], row["live_b"], row["dense_b"]) == (30, 26, 26)
    assert within["shared_fraction"] == 30 / 40


def test_latents_are_compared_only_with_runs_of_the_same_d_in(mixed, chosen):
    cell = compare_cell(mixed, [], chosen)
    frame = cell.latents.to_pandas()
    alone = compare_cell(mixed[:2], [], chosen).latents.to_pandas()
    two = frame[frame["run"] != "run-2"].reset_index(drop=True)
    for name in ("shared_with", "reproducibility", "reproducibility_low", "reproducibility_high"):
        assert np.array_equal(two[name], alone[name]), name
    lone = frame[frame["run"] == "run-2"]
    assert lone["reproducibility"].isna().all()
    assert np.stack(lone["partner_decoder"]).tolist() == [[-1, -1]] * 30
    assert np.isnan(cell.p).all()
    assert np.isnan(cell.estimates["cycle_shared"].mean)
    for name, column in columns("pair", "").items():
        if column.scale in ("fraction", "cosine"):
            assert np.isnan(cell.estimates[name].mean), name
    assert set(zip(cell.strata["a"], cell.strata["b"], strict=True)) == {("run-0", "run-1")}


def test_a_cell_without_any_comparable_pair_is_written_and_read(mixed, chosen, tmp_path):
    cell = compare_cell(mixed[1:], [], chosen)
    assert np.isnan(cell.pairs["shared_fraction"]).all()
    assert cell.null_simulated_latents == 0
    cell.write(tmp_path)
    found = CellResult.read(tmp_path)
    assert found.pairs.equals(cell.pairs)
    pd.testing.assert_frame_equal(found.latents.to_pandas(), cell.latents.to_pandas())
    assert np.isnan(found.p).all()
    assert found.strata.empty
    assert found.runs["d_in"].tolist() == [64, 8]
