"""Searches with hydra/sweeper=optuna: searched keys, values of trials, and refused searches."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from reseed.cli import run, train
from reseed.cli.tune import of_runs, of_summary
from reseed.errors import ReseedError
from reseed.store.runs import RunStore

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs reseed[optuna]")
SEARCH = ["hydra/sweeper=optuna", "training.lr=tag(log, interval(1e-4, 1e-2))"]


@pytest.fixture
def line(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*tiny_overrides, "training.tokens=1024", "sae=topk", "runtime.threads=1"]


def trials() -> list[dict[str, str]]:
    (path,) = Path("sweeps").glob("tune-*/trials.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_trial_is_the_mean_over_its_runs_and_trained_once(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*line, "seed=0,1", *SEARCH, "hydra.sweeper.n_trials=2", "objective=fvu"]
    assert train.main(words) == 0
    found = trials()
    assert len(found) == 2
    rates = {run.record["experiment"]["training"]["lr"] for run in RunStore("outputs").runs()}
    assert {float(row["training.lr"]) for row in found} == rates
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    for row in found:
        own = [
            run.metrics["fvu"]
            for run in RunStore("outputs").runs()
            if run.record["experiment"]["training"]["lr"] == float(row["training.lr"])
        ]
        assert len(own) == 2  # the seeds are an axis, not searched
        assert float(row["fvu"]) == pytest.approx(sum(own) / 2)
    best = min(found, key=lambda row: float(row["fvu"]))
    assert f"best of 2: training.lr={best['training.lr']}: fvu" in capsys.readouterr().out
    assert train.main(words) == 0  # the same proposals, so nothing to train
    assert capsys.readouterr().out.count("nothing to train: 2 runs already finished") == 2
    assert trials() == found


@pytest.mark.slow
def test_a_trial_of_a_comparison_takes_its_summary(line: list[str]) -> None:
    words = [*line, "comparison=seeds", "seed=0,1", "comparison.activation_tokens=0", *SEARCH]
    words += ["objective=[shared_fraction,fvu]", "hydra.sweeper.direction=[maximize,minimize]"]
    assert run.main([*words, "hydra.sweeper.n_trials=1"]) == 0
    (row,) = trials()
    (summary,) = Path("sweeps").glob("seeds-*/summary.csv")
    with summary.open() as file:
        (cell,) = csv.DictReader(file)
    assert float(row["shared_fraction"]) == pytest.approx(float(cell["shared_fraction"]))
    assert float(row["fvu"]) == pytest.approx(float(cell["fvu"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SEARCH[0], SEARCH[1]], "`objective` is required with hydra/sweeper=optuna: the metric"),
        (
            [*SEARCH, "objective=fvuu"],
            "`objective` must be a metric of `reseed train`; got fvuu. Did you mean `fvu`?",
        ),
        (
            [SEARCH[0], "objective=fvu"],
            "nothing is searched: give a key as interval(...), range(...) or choice(...)",
        ),
        (["objective=fvu"], "`objective` is for hydra/sweeper=optuna"),
    ],
)
def test_bad_searches_are_refused_before_anything_is_computed(
    words: list[str], message: str, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*line, "seed=0", *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_objectives_are_read_from_runs_and_summaries() -> None:
    assert of_runs([{"fvu": 0.25, "l0": 8}, {"fvu": 0.75, "l0": 10}], ["l0", "fvu"]) == [9, 0.5]
    assert of_summary({"sae": "topk", "fvu": 0.5}, ["fvu"]) == [0.5]
    with pytest.raises(ReseedError, match=r"objective=fvo: .* no such number\. Did you mean `fvu`"):
        of_summary({"sae": "topk", "fvu": 0.5}, ["fvo"])
