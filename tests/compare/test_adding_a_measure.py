"""The example of docs/measures.md: one file adds a measure, also from another package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "measures.md"
MORE = """
from reseed.compare.pair import RunInCell


@measure("mean_norm_{}", level="run", family=("encoder", "decoder"), scale="number",
         help="mean length of the rows")
def mean_norm(run: RunInCell, rows: str) -> float:
    return float((getattr(run.dictionary, rows) ** 2).sum(1).mean() ** 0.5)


@measure("times_shared", level="latent", help="twice the number of other runs that share it")
def times_shared(run: RunInCell):
    return 2 * run.shared_with
"""


def example() -> str:
    """Return the code in the page's section on new measures."""
    section = PAGE.read_text().partition("## Add a measure")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_one_file_adds_a_measure(tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_measures.py").write_text(example() + MORE)
    # The metadata of an installed package.
    about = tmp_path / "my_measures-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-measures\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[reseed.measures]\nmine = my_measures\n")
    # Prepended, because the tested package itself may be found through PYTHONPATH.
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))

    def reseed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reseed", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    line = ["comparison=seeds", *tiny_overrides, "seed=0,1,2"]
    found = reseed("run", *line, "comparison.primary=shared_of_smaller")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Primary measure: of the smaller." in " ".join(found.stdout.split())

    (sweep,) = (tmp_path / "sweeps").iterdir()
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
    assert (latents["times_shared"] == 2 * latents["shared_with"]).all()
    summary = (sweep / "summary.md").read_text()
    page = (sweep / "report" / "index.html").read_text()
    for text in (summary, page):
        assert "shared latents as a fraction of the smaller dictionary." in text
        assert "mean norm decoder" in text
    assert "| of the smaller [95%] | shared [95%] |" in summary

    wrong = reseed("run", *line, "comparison.primary=shared_of_smaler")
    assert "Did you mean `shared_of_smaller`?" in wrong.stderr
