"""The example of docs/extend/architecture.md: one file and one yaml add an architecture."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_one_file_and_one_yaml_add_an_architecture(tiny_overrides, made_up_package) -> None:
    folder = made_up_package.folder
    made_up_package.write_page("architecture.md", installed=False)
    own = ("comparison=seeds", *tiny_overrides, "sae=abstopk", "seed=0,1")
    refused = made_up_package.reseed("run", "--config-dir", "my_conf", *own, succeeds=False)
    assert "`sae`: there is no `_target_` my_architecture.AbsTopKConfig" in refused
    assert not (folder / "outputs").exists()

    made_up_package.write_page("architecture.md")
    made_up_package.reseed("run", *own)
    records = [json.loads(p.read_text()) for p in folder.glob("outputs/*/run.json")]
    assert [r["experiment"]["sae"]["type"] for r in records] == ["abstopk"] * 2
    metrics = [json.loads(p.read_text()) for p in folder.glob("outputs/*/metrics.json")]
    assert all(m["l0"] == 4 and m["fvu"] < 1 for m in metrics)

    assert "abstopk" in made_up_package.reseed("status")
    again = made_up_package.reseed("run", *own)
    assert "nothing to train: 2 runs already finished" in again
