"""The seam to Hydra: what its settings do where the command works without Hydra's jobs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from reseed.cli import run, train
from reseed.cli.hydra_app import CommandLine, ExpandedJob, expand
from reseed.cli.plan import make_plan
from reseed.errors import ConfigError
from reseed.experiment import resolve
from reseed.store.runs import RunStore


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("hydra.sweep.dir=/elsewhere", "hydra.sweep.dir"),
        ("hydra.job.chdir=true", "hydra.job.chdir"),
        ("+hydra.callbacks.mine._target_=a.B", "hydra.callbacks.mine._target_"),
        ("hydra.sweeper.max_batch_size=2", "hydra.sweeper.max_batch_size"),
    ],
)
def test_settings_of_hydra_without_effect_are_refused(
    text: str, key: str, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_overrides, text]) == 1
    said = capsys.readouterr().err
    assert f"`{key}` has no effect with hydra/launcher=fused" in said
    assert "use hydra/launcher=basic" in said
    assert not Path("outputs").exists()


def test_env_set_holds_for_a_sweep(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESEED_TEST_VARIABLE", "before")  # restored after the test
    line = ["-m", *tiny_overrides, "training.tokens=512", "seed=0,1"]
    assert train.main([*line, "hydra.job.env_set.RESEED_TEST_VARIABLE=here"]) == 1  # a new key
    assert train.main([*line, "+hydra.job.env_set.RESEED_TEST_VARIABLE=here"]) == 0
    assert os.environ["RESEED_TEST_VARIABLE"] == "here"


def test_each_job_is_composed_and_resolved_once(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are read once for each choice of options, and each job is resolved once."""
    composed: list[list[str]] = []
    resolved: list[int] = []
    load, find = ConfigLoaderImpl._load_configuration_impl, resolve.resolve_experiment

    def loading(self: ConfigLoaderImpl, **asked: object) -> DictConfig:
        composed.append(asked["overrides"])  # type: ignore[arg-type]
        return load(self, **asked)  # type: ignore[arg-type]

    def resolving(experiment: resolve.Experiment, runtime: resolve.RuntimeConfig):
        resolved.append(experiment.seed)
        return find(experiment, runtime)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", loading)
    monkeypatch.setattr(resolve, "resolve_experiment", resolving)
    line = ["comparison=seeds", *tiny_overrides, "training.tokens=512", "sae=topk,relu"]
    assert run.main([*line, "seed=0,1,2", "comparison.activation_tokens=0"]) == 0
    assert resolved == [0, 0, 1, 1, 2, 2] or resolved == [0, 1, 2] * 2
    assert len([lines for lines in composed if any(o.startswith("sae=") for o in lines)]) == 2


def test_axes_are_data_and_not_split_from_overrides(tiny_overrides: list[str]) -> None:
    line = ["comparison=seeds", *tiny_overrides, "sae=topk", "seed=0,1", "dataset.order_seed=3,4"]
    jobs = make_plan(CommandLine("run", line)).jobs
    assert [job.axes for job in jobs] == [
        {"seed": seed, "dataset.order_seed": order} for seed in "01" for order in "34"
    ]


def test_jobs_are_all_combinations_with_the_last_key_fastest() -> None:
    assert expand(["sae=topk,relu", "seed=range(2)", "training.lr=0.001"]) == [
        ExpandedJob((f"sae={sae}", f"seed={seed}", "training.lr=0.001"),
                    {"sae": sae, "seed": seed, "training.lr": "0.001"})
        for sae in ("topk", "relu")
        for seed in "01"
    ]  # fmt: skip
    assert expand([]) == [ExpandedJob((), {})]
    with pytest.raises(ConfigError, match=r"`training\.lr` is an interval, which only hydra/"):
        expand(["training.lr=interval(1e-4,1e-2)"])


def test_a_single_run_is_trained_here_with_any_launcher(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in Hydra, launchers are for the jobs of a sweep."""
    assert train.main([*tiny_overrides, "training.tokens=512", "hydra/launcher=basic"]) == 0
    (found,) = RunStore("outputs").runs()
    assert capsys.readouterr().out.splitlines()[-1] == str(found.path)
    assert not Path("sweeps").exists()
