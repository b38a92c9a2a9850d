"""A compared cell is compared again when a measure is new or has a new version."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reseed.cli.main import main
from reseed.compare import registry
from reseed.compare.cell import CellResult
from reseed.compare.pair import Pair
from reseed.compare.registry import declared, measure
from reseed.study.compare import outdated_measures

RECORDS = Path(__file__).parents[1] / "records" / "sweeps"


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``declare(version)`` declares a measure of pairs until the test ends."""
    declared()
    before = list(registry._declared)

    def add(version: int = 1) -> None:
        monkeypatch.setattr(registry, "_declared", [*before])

        @measure("made_up", scale="fraction", help="a made-up measure", version=version)
        def made_up(pair: Pair) -> float:
            return 0.25 * version

    return add


NEWER = ["shared_and_alike"]
"""Measures on activations that version 0.1 did not have."""


@pytest.fixture(scope="module")
def old_cell() -> CellResult:
    (folder,) = RECORDS.glob("*/cells/all")
    assert "measures" not in json.loads((folder / "cell.json").read_text())
    return CellResult.read(folder)


def test_a_cell_of_version_0_1_holds_the_measures_whose_columns_it_has(
    old_cell: CellResult, declare: Callable[..., None]
) -> None:
    assert outdated_measures(old_cell) == NEWER
    lacking = dataclasses.replace(old_cell, pairs=old_cell.pairs.drop(columns="mmcs"))
    assert outdated_measures(lacking) == ["mmcs", *NEWER]
    declare()
    assert outdated_measures(old_cell) == [*NEWER, "made_up"]


def test_a_cell_holds_the_measures_and_versions_that_it_records(
    old_cell: CellResult, declare: Callable[..., None]
) -> None:
    declare()
    cell = dataclasses.replace(old_cell, measures=registry.versions())
    assert outdated_measures(cell) == []
    declare(version=2)
    assert outdated_measures(cell) == ["made_up"]
    declare(version=1)
    gone = {key: v for key, v in registry.versions().items() if key != "pair.mmcs{}"}
    assert outdated_measures(dataclasses.replace(old_cell, measures=gone)) == ["mmcs"]
    more = registry.versions() | {"pair.of_a_removed_package": 1}
    assert outdated_measures(dataclasses.replace(old_cell, measures=more)) == []


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 0


@pytest.mark.slow
def test_compare_adds_a_new_measure_and_replaces_an_older_one(
    tiny_overrides: list[str],
    tmp_path: Path,
    declare: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["comparison=seeds", *tiny_overrides, "seed=0,1"]
    again = "compared again, because these measures are new or newer: made_up"
    run("run", *line)
    declare()
    run("report", "seeds", "--format", "md")
    assert "made_up" not in next(tmp_path.glob("sweeps/*/summary.csv")).read_text()
    capsys.readouterr()
    for version in (1, 2):
        declare(version)
        run("compare", *line)
        assert again in capsys.readouterr().out
        cell = CellResult.read(next(tmp_path.glob("sweeps/*/cells/*")))
        assert cell.pairs["made_up"].tolist() == [0.25 * version]
        assert cell.measures is not None
        assert cell.measures["pair.made_up"] == version
        run("compare", *line)
        assert "again" not in capsys.readouterr().out
