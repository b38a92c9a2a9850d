"""End-to-end comparisons whose pairs differ in something other than the seed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit, logit

from reseed.cli import compare, run
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import make_plan
from reseed.errors import ConfigError, ReseedError
from reseed.study.compare import _check_weights

ROOT = Path(__file__).parents[2]
FEW = "training.tokens=1024"


@pytest.fixture
def line(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reseed.study.result.figure_drawings", lambda cells, runs: {})
    kept = [o for o in tiny_overrides if not o.startswith(("layer=", "training.tokens="))]
    return ["comparison=seeds", *kept]


def results(pattern: str = "*") -> Path:
    (sweep,) = Path("sweeps").glob(pattern)
    return sweep


def test_layers_are_paired_over_seeds(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = [*line, FEW, "layer=0,1,2", "seed=0,1,2", "comparison.pair_by=layer"]
    assert run.main(line) == 0
    said = capsys.readouterr().out
    folder = results()
    pairs = pd.read_csv(folder / "pairs.csv")
    assert pairs["differs_in"].tolist() == ["layer"] * 9
    assert sorted(pairs["seed"].unique()) == [0, 1, 2], "cells are seeds"
    found = pd.read_csv(folder / "pairings.csv")
    assert found[["first", "second"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert found["n_seeds"].tolist() == found["n_pairs"].tolist() == [3, 3, 3]
    assert (found["interval_over"] == "seed").all()
    for _, row in found.iterrows():
        own = pairs[(pairs["layer_a"] == row["first"]) & (pairs["layer_b"] == row["second"])]
        assert row["shared_fraction"] == pytest.approx(own["shared_fraction"].mean())
        assert row["coverage_a"] == pytest.approx(own["coverage_a"].mean())
    # Layers are not a sample, so their mean has no interval, with a note.
    summary = pd.read_csv(folder / "summary.csv")
    assert summary["shared_fraction_low"].isna().all()
    assert summary["note"].str.contains("runs that differ in layer are not a sample").all()
    assert (pairs["untrained_shared_fraction"] < 0.5).all(), (
        "salted, so their initialisations differ"
    )
    latents = pd.read_parquet(folder / "latents.parquet")
    assert set(zip(latents["place"], latents["seed"], strict=True)) == {
        (layer, seed) for layer in "012" for seed in range(3)
    }
    text = (folder / "summary.md").read_text()
    assert "| layer | and | seeds | shared [95%] | 1st in 2nd [95%] | 2nd in 1st [95%] |" in text
    assert "## Shared\n\n| layer | 0 | 1 | 2 |" in text
    assert "## Covered: of the latents of the row, those that the column covers" in text
    assert "## Runs of each value" in text
    assert "1st in 2nd" in said
    matrix = pd.read_csv(folder / "matrix.csv")
    covered = matrix[matrix["measure"] == "coverage"].set_index("of")
    one_sided = found.set_index(["first", "second"])
    assert covered.loc[0, "2"] == pytest.approx(one_sided.loc[(0, 2), "coverage_a"])
    assert covered.loc[2, "0"] == pytest.approx(one_sided.loc[(0, 2), "coverage_b"])


def test_architectures_and_seeds_are_paired_together(line: list[str]) -> None:
    line = [*line, FEW, "sae=topk,relu", "seed=0,1,2", "comparison.pair_by=[sae,seed]"]
    assert run.main(line) == 0
    pairs = pd.read_csv(results() / "pairs.csv")
    counts = pairs["differs_in"].value_counts().to_dict()
    assert counts == {"seed": 6, "sae": 3, "sae, seed": 6}
    across = pairs[pairs["differs_in"] == "sae"]
    assert (across["seed_a"] == across["seed_b"]).all()
    assert set(across["sae_a"]) | set(across["sae_b"]) == {"topk", "relu"}
    found = pd.read_csv(results() / "pairings.csv").set_index(["first", "second", "differs_in"])
    assert found["n_pairs"].to_dict() == {
        ("topk", "topk", "seed"): 3, ("topk", "relu", "sae"): 3,
        ("topk", "relu", "sae, seed"): 6, ("relu", "relu", "seed"): 3,
    }  # fmt: skip
    s = found["shared_fraction"]
    within = (s["topk", "topk", "seed"] + s["relu", "relu", "seed"]) / 2
    row = found.loc[("topk", "relu", "sae, seed")]
    assert row["minus_within"] == pytest.approx(row["shared_fraction"] - within)
    text = (results() / "summary.md").read_text()
    assert "| sae | and | differs in | seeds | shared [95%] |" in text
    assert "| − within |" in text
    latents = pd.read_parquet(results() / "latents.parquet")
    assert set(latents["place"]) == {f"{sae}, {seed}" for sae in ("topk", "relu") for seed in "012"}
    assert set(latents["seed"]) == {0, 1, 2}
    assert latents["others"].map(len).eq(5).all()


def test_widths_are_compared_both_ways(line: list[str]) -> None:
    assert run.main([*line, FEW, "sae.num_latents=32,64", "seed=0,1,2",
                     "comparison.pair_by=sae.num_latents"]) == 0  # fmt: skip
    pairs = pd.read_csv(results() / "pairs.csv")
    assert set(pairs["num_latents_a"]) == {32}
    assert set(pairs["num_latents_b"]) == {64}
    (row,) = pd.read_csv(results() / "pairings.csv").to_dict("records")
    assert row["shared_of_smaller"] == pytest.approx((pairs["shared_latents"] / 32).mean())
    assert row["shared_of_b"] == pytest.approx((pairs["shared_latents"] / 64).mean())
    assert row["coverage_b"] == pytest.approx(pairs["coverage_b"].mean())
    assert "| of the smaller [95%] | 1st in 2nd [95%] |" in (results() / "summary.md").read_text()


def test_budgets_of_one_seed_have_no_interval(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*line, "training.tokens=1024,2048", "comparison.grid.seed=[0]", "seed=0",
                     "comparison.pair_by=training.tokens"]) == 0  # fmt: skip
    (row,) = pd.read_csv(results() / "pairings.csv").to_dict("records")
    assert np.isnan(row["shared_fraction_low"])
    reason = "one seed: chosen values are not a sample, so there is no interval"
    assert row["note"] == reason
    assert reason in " ".join(capsys.readouterr().out.split())
    born = {json.loads(p.read_text())["init_seed"] for p in Path("outputs").glob("*/run.json")}
    assert len(born) == 2, "salted with the budget: one seed, two initialisations"


@pytest.fixture
def datasets(tmp_path: Path, tiny_text: Path) -> list[str]:
    """Return flags that add the data sets ``one`` and ``two``, the two halves of a text."""
    folder = tmp_path / "own" / "dataset"
    folder.mkdir(parents=True)
    documents = tiny_text.read_text().split("\n<|endoftext|>\n")
    for i, name in enumerate(("one", "two")):
        half = documents[i * len(documents) // 2 : (i + 1) * len(documents) // 2]
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(half))
        option = (ROOT / "conf" / "dataset" / "text_files.yaml").read_text()
        option = option.replace("path: ???", f"path: {tmp_path / name}.txt")
        (folder / f"{name}.yaml").write_text(option)
    return ["--config-dir", str(tmp_path / "own")]


def test_datasets_are_paired_over_seeds(line: list[str], datasets: list[str]) -> None:
    kept = [o for o in line if not o.startswith(("dataset=", "dataset.path="))]
    line = [*datasets, *kept, FEW, "dataset=one,two", "seed=0,1", "comparison.pair_by=dataset"]
    assert run.main(line) == 0
    (row,) = pd.read_csv(results() / "pairings.csv").to_dict("records")
    assert (row["first"], row["second"], row["n_seeds"]) == ("one", "two", 2)
    assert row["note"] == "fewer than 3 seeds: no interval"


def test_seed_and_data_order_are_paired_together(line: list[str]) -> None:
    both = "seed, dataset.order_seed"
    line = [*line, FEW, "seed=0,1,2", "dataset.order_seed=0,1,2", f"comparison.pair_by=[{both}]"]
    assert run.main(line) == 0
    found = pd.read_csv(results() / "pairings.csv").set_index("differs_in")
    assert found["n_pairs"].to_dict() == {"seed": 9, "dataset.order_seed": 9, both: 18}
    assert found.loc["dataset.order_seed", "untrained_shared_fraction"] == 1, "one initialisation"
    assert (found["interval_over"] == both).all()
    assert (found["n_seeds"] == 3).all()
    # Recompute an interval from the pairs that are left without each seed and each order.
    pairs = pd.read_csv(results() / "pairs.csv")
    pairs = pairs[pairs["differs_in"] == both]
    variances = []
    for axis in ("seed", "dataset.order_seed"):
        left = [pairs[(pairs[f"{axis}_a"] != x) & (pairs[f"{axis}_b"] != x)] for x in range(3)]
        without = [own["coverage_a"].mean() / 2 + own["coverage_b"].mean() / 2 for own in left]
        variances.append(2 / 3 * np.square(without - np.mean(without)).sum())
    freedom = sum(variances) ** 2 / sum(v**2 / 2 for v in variances)
    row = found.loc[both]
    mean = row["coverage_a"]
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances)) / (mean * (1 - mean))
    assert row["coverage_a_high"] == pytest.approx(expit(logit(mean) + reach))
    text = " ".join((results() / "summary.md").read_text().split())
    assert "| differs in | seeds | shared [95%] |" in text
    assert "| seed | 3 × 3 |" in text
    assert (
        "are over seeds and values of dataset.order_seed: all runs of one value of seed or" in text
    )
    assert "runs that differ only in dataset.order_seed have the same initial weights." in text
    assert "different values start differently" not in text
    assert "which were chosen" not in text


@pytest.mark.slow
def test_differences_are_paired_if_cells_have_the_same_draws(line: list[str]) -> None:
    """Compare two architectures at two budgets, with initial weights of their own or the same."""
    kept = [o for o in line if not o.startswith("comparison=")]
    kept += ["comparison=tokens", "sae=topk,relu", "sae.target_l0=null", "training.tokens=512,1024"]
    said = []
    for scope in ("cell", "shared"):
        assert run.main([*kept, f"seed_scope={scope}"]) == 0
        folder = max(Path("sweeps").glob("*/summary.md"), key=lambda path: path.stat().st_mtime)
        said.append(" ".join(folder.read_text().partition("## Differences")[2].split()))
    assert "interval over seeds (Welch); * if" in said[0]
    assert "(the same draw is left out of both cells at a time, because" in said[1]


def test_different_widths_of_activations_are_refused_before_training(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [o for o in line if not o.startswith(("model", "dataset", "hookpoint"))]
    line = ["model=world_easy,world_hierarchy", *kept, "comparison.pair_by=model"]
    assert run.main([*line, "dataset.held_out_tokens=1024", FEW]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: `comparison.pair_by` pairs runs of different `d_in`: model=world_easy (world_easy) "
    )
    assert "model=world_hierarchy (world_hierarchy) has " in said
    assert "vectors of different spaces and have no cosine" in said
    assert "the activations of a world are random draws without tokens" in said
    assert not Path("outputs").exists()
    assert not Path("sweeps").exists()


def test_a_run_is_not_paired_with_itself(line: list[str]) -> None:
    line = [*line, FEW, "training.tokens=1024,1050", "comparison.pair_by=training.tokens"]
    with pytest.raises(ConfigError) as caught:
        make_plan(CommandLine("run", line))
    assert str(caught.value) == (
        "`comparison.pair_by` pairs a run with itself: training.tokens=1024 and "
        "training.tokens=1050 are the same run"
    )


def test_runs_with_different_penalty_weights_are_refused() -> None:
    def one(sae: str, seed: str, weight: float) -> tuple[dict[str, str], Any]:
        return {"sae": sae, "seed": seed}, SimpleNamespace(record={"penalty_weight": weight})

    fine = [one("relu", "0", 0.1), one("relu", "1", 0.1), one("gated", "0", 0.2)]
    _check_weights(fine, "all runs")
    with pytest.raises(
        ReseedError, match=r"^all runs, relu: its runs were trained with different "
    ):
        _check_weights([*fine, one("relu", "2", 0.3)], "all runs")


def test_the_primary_measure_comes_first_and_keeps_the_folder(line: list[str]) -> None:
    line = [*line, FEW, "seed=0,1"]
    assert run.main(line) == 0
    one = results()
    assert compare.main([*line, "comparison.primary=coverage"]) == 0
    assert results() == one
    text = (one / "summary.md").read_text()
    assert "| covered [95%] | shared [95%] | shared live |" in text
    assert "Primary measure: **covered**" in text
    (row,) = pd.read_csv(one / "summary.csv").to_dict("records")
    assert row["primary"] == "coverage"
    assert compare.main(line) == 0
    assert "Primary measure: **shared**" in (one / "summary.md").read_text()
