"""The example of docs/extend/measure.md: one file adds measures, also from another package."""

from __future__ import annotations

import pandas as pd
import pytest


@pytest.mark.slow
def test_one_file_adds_a_measure(tiny_overrides: list[str], made_up_package) -> None:
    made_up_package.write_page("measure.md", installed=False)
    line = ("comparison=seeds", *tiny_overrides, "seed=0,1,2")
    made_up_package.reseed("run", *line)
    (sweep,) = (made_up_package.folder / "sweeps").iterdir()
    assert "shared_of_smaller" not in pd.read_csv(sweep / "pairs.csv")

    made_up_package.write_page("measure.md")
    shown = made_up_package.reseed("compare", *line, "comparison.primary=shared_of_smaller")
    assert "Primary measure: of the smaller." in " ".join(shown.split())
    pairs = pd.read_csv(sweep / "pairs.csv")
    # All runs have as many latents.
    assert pairs["shared_of_smaller"].tolist() == pytest.approx(pairs["shared_fraction"].tolist())
    (row,) = pd.read_csv(sweep / "summary.csv").to_dict("records")
    for end in ("", "_low", "_high"):
        wanted = row[f"shared_fraction{end}"]
        assert row[f"shared_of_smaller{end}"] == pytest.approx(wanted, nan_ok=True)
    assert row["mean_norm_decoder"] == pytest.approx(1, abs=1e-3)
    assert row["mean_norm_encoder_low"] <= row["mean_norm_encoder"]
    latents = pd.read_parquet(sweep / "latents.parquet")
    assert (latents["not_shared_with"] == 2 - latents["shared_with"]).all()
    summary = (sweep / "summary.md").read_text()
    page = (sweep / "report" / "index.html").read_text()
    for text in (summary, page):
        assert "shared latents as a fraction of the smaller dictionary." in text
        assert "mean norm decoder" in text
    assert "| of the smaller [95%] | shared [95%] |" in summary

    wrong = "comparison.primary=shared_of_smaler"
    refused = made_up_package.reseed("compare", *line, wrong, succeeds=False)
    assert "Did you mean `shared_of_smaller`?" in refused
