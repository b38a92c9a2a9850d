"""The seam to Hydra: what its settings do where the command works without Hydra's jobs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from reseed.cli import evaluate, run, status, train
from reseed.cli.hydra_app import CommandLine, ExpandedJob, expand
from reseed.cli.plan import check_jobs, make_plan
from reseed.errors import ConfigError
from reseed.experiment import resolve
from reseed.store.runs import RunStore


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
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
    assert f"`{key}` has no effect here, because the command starts no jobs of Hydra;" in said
    assert train.main(["-m", *tiny_overrides, text]) == 1
    assert "starts no jobs of Hydra: use hydra/launcher=basic; got" in capsys.readouterr().err
    assert train.main([*tiny_overrides, text, "hydra/launcher=basic"]) == 1  # a single run
    assert train.main(["-m", *tiny_overrides, "hydra.sweep.dir=x", "hydra/launcher=basic"]) == 1
    assert "`hydra.sweep.dir` is the folder of the sweep" in capsys.readouterr().err
    assert not Path("outputs").exists()


@pytest.mark.parametrize("word", ["hydra/launcher=basic", "-m", "hydra.job.chdir=true"])
def test_commands_without_jobs_refuse_settings_of_jobs(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main([word]) == 1
    assert capsys.readouterr().err == f"error: `reseed status` starts no jobs; got {word}\n"


def test_a_search_path_of_hydra_adds_options(tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "own" / "sae").mkdir(parents=True)
    (tmp_path / "own" / "sae" / "mine.yaml").write_text("defaults: [topk, _self_]\nk: 3\n")
    path = f"hydra.searchpath=[file://{tmp_path}/own]"
    line = CommandLine("train", [*tiny_overrides, "sae=mine", path, "sae.target_l0=null"])
    ((job,), _) = check_jobs(line, line.overrides, multirun=False)
    assert job.resolved.sae.sparsity == "k=3"
    both = CommandLine("train", ["--config-dir", str(tmp_path / "own"), path])
    with pytest.raises(ConfigError, match=r"give --config-dir or `hydra\.searchpath`, not both"):
        _ = both.launcher


@pytest.mark.slow
def test_folders_of_saes_are_evaluated_by_other_launchers(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs run in other processes, which get the declared experiment."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, sys.path)))
    assert train.main([*tiny_overrides, "training.tokens=512"]) == 0
    (own,) = RunStore("outputs").runs()
    Path("alone").mkdir()
    for name in ("sae.json", "sae.safetensors"):
        shutil.copy(own.path / name, "alone")
    asked = ["evaluation=reconstruction,faithfulness", "evaluation.tokens=500"]
    line = ["alone", *tiny_overrides, *asked, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert evaluate.main(line) == 0
    assert len(list(Path("alone").glob("evaluations/*/result.json"))) == 2


def test_env_set_holds_during_the_work(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(
        "reseed.study.study.train_missing", lambda *a: seen.append(os.environ.get("RESEED_A"))
    )
    line = ["-m", *tiny_overrides, "training.tokens=512", "seed=0,1"]
    train.main([*line, "+hydra.job.env_set.RESEED_A=here"])
    assert seen == ["here"]
    assert "RESEED_A" not in os.environ


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
