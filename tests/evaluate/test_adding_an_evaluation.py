"""The example of docs/extend/evaluation.md: a package adds an evaluation by a module and a yaml."""

from __future__ import annotations

import json

import pandas as pd
import pytest

NOTE = "top share: largest activation / sum of activations, mean over tokens."


@pytest.mark.slow
def test_one_module_and_one_yaml_add_an_evaluation(tiny_overrides, made_up_package) -> None:
    made_up_package.write_page("evaluation.md")
    folder = made_up_package.folder
    own = ("comparison=seeds", *tiny_overrides, "training.tokens=2048", "sae.k=1,4", "seed=0,1,2",
           "comparison.activation_tokens=0", "comparison.null_draws=1")  # fmt: skip
    made_up_package.reseed("run", *own)
    run, *_ = sorted(path.parent for path in folder.glob("outputs/*/run.json"))
    evaluation = ("evaluation=top_share", "evaluation.tokens=500")

    shown = made_up_package.reseed("evaluate", str(run), *evaluation)
    assert "How much does the strongest latent carry?" in shown
    assert NOTE in shown
    (path,) = folder.glob("outputs/*/evaluations/top_share-*/result.json")
    alone = json.loads(path.read_text())["metrics"]
    assert alone["tokens"] == 500

    (sweep,) = folder.glob("sweeps/seeds-*")
    shown = made_up_package.reseed("evaluate", sweep.name, *evaluation)
    assert "How much does the strongest latent carry? Among shared latents and orphans" in shown
    assert NOTE in shown
    assert "1 SAE already evaluated" in shown
    runs = pd.read_csv(sweep / "evaluations.csv").set_index("run")
    assert runs.loc[run.name, "top_share_share"] == pytest.approx(alone["share"])
    by_k = runs.groupby("sparsity")["top_share_share"]
    summary = pd.read_csv(sweep / "summary.csv").set_index("sparsity")
    assert by_k.get_group("k=1").tolist() == [1, 1, 1], "a single latent carries everything"
    for sparsity, values in by_k:
        row = summary.loc[sparsity]
        # t(2) at 97.5% is 4.3027.
        reach = 4.302653 * values.std() / 3**0.5
        assert row["top_share_share"] == pytest.approx(values.mean())
        high = row["top_share_share_high"]
        if values.nunique() == 1:
            assert pd.isna(high), "runs that are all equal have no interval"
        else:
            assert high == pytest.approx(values.mean() + reach)
    text = (sweep / "summary.md").read_text()
    assert "## How much does the strongest latent carry?\n" in text
    assert "| top share |" in text
    assert "- **top share**: largest activation / sum of activations, mean over tokens." in text
    latents = pd.read_parquet(sweep / "latents.parquet")
    assert latents["top_share_first"].dtype == bool
