"""Equality of the loader that reads files once with Hydra's own loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from reseed.cli import run, train
from reseed.cli.config_loader import OnceLoader
from reseed.cli.hydra_app import CommandLine, conf_dir
from reseed.cli.plan import check_jobs

CONF = Path(conf_dir())
COMPARISONS = sorted(p.stem for p in (CONF / "comparison").glob("*.yaml") if p.stem != "base")


@pytest.fixture(scope="module")
def loaders() -> Iterator[tuple[ConfigLoaderImpl, OnceLoader]]:
    """Yield Hydra's loader and an `OnceLoader`, which keeps its compositions between tests."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        own = GlobalHydra.instance().config_loader()
        assert isinstance(own, ConfigLoaderImpl)
        yield own, OnceLoader(own)
    GlobalHydra.instance().clear()


def plain(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False, throw_on_missing=False)


def outcome(loader: ConfigLoaderImpl, overrides: Sequence[str]) -> Any:
    """Return the composed configuration, key order, resolved values and flags; or the error."""
    try:
        config = loader.load_configuration("config", list(overrides), RunMode.RUN)
    except Exception as error:
        return type(error), str(error), type(error.__cause__), str(error.__cause__)
    task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        resolved = OmegaConf.to_container(task, resolve=True)
    except Exception as error:
        resolved = type(error), str(error)
    flags = [config._metadata.flags, config.hydra._metadata.flags]
    return plain(config), list(config), resolved, flags


def equal(loaders: tuple[ConfigLoaderImpl, OnceLoader], overrides: Sequence[str]) -> Any:
    hydra, once = loaders
    expected = outcome(hydra, overrides)
    assert outcome(once, overrides) == expected
    assert outcome(once, overrides) == expected  # the first call has not changed the cache
    return expected


FINE = [
    [],
    ["seed=3"],
    ["seed=3", "seed=4"],
    ["seed=7", "sae=relu", "sae.target_l0=8", "training=standard", "layer=1"],
    ["sae.target_l0=8", "sae=relu"],  # values are applied after choices, in any order
    ["model=world_hierarchy", "training=world", "sae=relu"],
    ["sae=jumprelu", "training=short", "training.lr=1e-3"],  # a recipe and a value over it
    ["+extra=1", "+more.inside=x", "+sae.new=2"],
    ["++seed=3", "++extra.key=1"],
    ["~sae.k", "~layer"],
    ["~layer=2"],
    ["~comparison"],
    ["~dataset"],
    ["+recipe=topk_short"],
    ["recipe@_global_=relu_short"],
    ["dataset.order_seed=${seed}", "seed=5"],
    ["layer='2'"],
    ['runtime.outputs="a b, {c}=d"'],
    ["runtime.outputs='it\\'s'"],
    ["runtime.outputs='/ü/b'"],
    ["runtime.loggers=[tensorboard,wandb]"],
    ["sae={k:3}", "runtime={outputs:a,loggers:[b,'c,d']}"],
    ["+sae={new:{inner:[1,2,{a:null}]}}"],
    ["sae.target_l0=null", "training.lr=1.e-3", "training.lr=True"],
    ["sae.target_l0=str(3)", "seed=int(4.5)"],
    ["comparison=seeds", "comparison.grid.seed=[0,1]", "++comparison.arm='other init'"],
    ["comparison=memory_of_init", "+comparison.arms={mine:{seed:0}}"],
    ["hydra.sweep.dir=/tmp/x", "seed=2", "+hydra.job.env_set.A=b"],
    ["hydra.job.config.override_dirname.exclude_keys=[seed]", "seed=2", "layer=1", "sae=relu"],
    ["hydra/launcher=basic", "seed=1"],
    ["seed=${nothing}"],
    ["hookpoint=module"],
]  # fmt: skip
WRONG = [
    ["sae.kk=3"], ["lyer=1"], ["sae=topkk"], ["sae=null"], ["sae=3"], ["no=relu"],
    ["sae={kk:3}"], ["foo.bar.baz=1"], ["seed.inner=1"], ["~nothing"], ["~seed=9"], ["~sae=relu"],
    ["+seed=3"], ["++sae=relu"], ["+sae=relu"], ["seed@here=3"], ["sae@here=relu"],
    ["seed=0,1"], ["sae=topk,relu"], ["seed=range(3)"], ["seed=[1"], ["=3"], ["seed"],
    ["runtime.outputs=/ü/b"], ["sae.kk=3", "sae=topkk"],
    ["sae.kk=3", "lyer=2", "seed=[1"], ["hydra.nothing=3", "sae.kk=2"],
    ["comparison=memory_of_init", "comparison.arms={a:{seed:3}}"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", FINE, ids=" ".join)
def test_composition_equals_that_of_hydra(
    loaders: tuple[ConfigLoaderImpl, OnceLoader], overrides: list[str]
) -> None:
    (values, *_) = equal(loaders, overrides)
    assert isinstance(values, dict)
    # The fast path gave the result, not the fallback to Hydra.
    assert plain(loaders[1]._quickly("config", overrides)) == values


@pytest.mark.parametrize("overrides", WRONG, ids=" ".join)
def test_errors_equal_those_of_hydra(
    loaders: tuple[ConfigLoaderImpl, OnceLoader], overrides: list[str]
) -> None:
    assert issubclass(equal(loaders, overrides)[0], Exception)


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_composes_as_with_hydra(
    loaders: tuple[ConfigLoaderImpl, OnceLoader], name: str
) -> None:
    grid = yaml.safe_load((CONF / "comparison" / f"{name}.yaml").read_text())["comparison"]["grid"]
    for at in (0, -1):
        job = [f"{axis}={values[at]}" for axis, values in grid.items()]
        (values, *_) = equal(loaders, [f"comparison={name}", *job])
        assert values["comparison"]["name"] == name


def test_jobs_of_a_sweep_compose_as_with_hydra(
    loaders: tuple[ConfigLoaderImpl, OnceLoader],
) -> None:
    """Launchers compose jobs with Hydra's settings of the sweep and its value of `now`."""
    hydra, once = loaders
    asked = ["hydra.sweep.dir=s", "seed=0,1", "sae=relu"]
    master = hydra.load_configuration("config", asked, RunMode.MULTIRUN)
    assert once.load_configuration("config", asked, RunMode.MULTIRUN) == master
    for job in (["seed=0", "sae=relu"], ["seed=1", "sae=relu"], ["seed=1", "sae=topk"]):
        config = once.load_sweep_config(master, job)
        assert plain(config) == plain(hydra.load_sweep_config(master, job))
        assert config.hydra.overrides.task == job
        assert config.hydra.job.override_dirname == ",".join(sorted(job))


def test_options_of_a_search_path_are_found(tmp_path: Path) -> None:
    """The group exists only if the search path of the job contains the folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text("value: 1\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        own = GlobalHydra.instance().config_loader()
        assert isinstance(own, ConfigLoaderImpl)
        both = own, OnceLoader(own)
        (values, *_) = equal(both, ["+mine=a"])
        assert values["mine"] == "a"  # a value, not an option
        where = f"hydra.searchpath=[file://{tmp_path}]"
        (values, *_) = equal(both, ["+mine=a", where, "+mine.more=2"])
    assert values["mine"] == {"value": 1, "more": 2}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collect the overrides of every composition from files."""
    found: list[list[str]] = []
    composed = ConfigLoaderImpl._load_configuration_impl

    def counting(self: ConfigLoaderImpl, **asked: Any) -> DictConfig:
        found.append(asked["overrides"])
        return composed(self, **asked)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counting)
    return found


def test_files_are_read_once_for_each_choice(loaded: list[list[str]]) -> None:
    line = CommandLine("train", [])
    with line.composer() as values:
        seeds = [
            values([f"sae={sae}", f"seed={seed}"])["seed"]
            for sae in ("relu", "topk")
            for seed in range(3)
        ]
    assert seeds == [0, 1, 2, 0, 1, 2]
    assert loaded == [["sae=relu"], ["sae=topk"]]


def test_jobs_of_the_fused_launcher_see_their_own_overrides(
    loaded: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the launcher nor the sweeper reads the files again for each job."""
    monkeypatch.chdir(tmp_path)
    told: list[tuple[Any, ...]] = []

    def task(config: DictConfig) -> None:
        own = HydraConfig.get()
        job = own.job
        choice = own.runtime.choices["sae"]
        told.append((job.num, list(own.overrides.task), job.override_dirname, choice, config.seed))

    axes = ["sae=topk,relu", "seed=1,2", "hydra.sweep.subdir=${hydra.job.num}"]
    CommandLine("train", []).launch(task, axes)
    assert told == [
        (0, ["sae=topk", "seed=1"], "sae=topk,seed=1", "topk", 1),
        (1, ["sae=topk", "seed=2"], "sae=topk,seed=2", "topk", 2),
        (2, ["sae=relu", "seed=1"], "sae=relu,seed=1", "relu", 1),
        (3, ["sae=relu", "seed=2"], "sae=relu,seed=2", "relu", 2),
    ]
    jobs = [lines for lines in loaded if not any("," in line for line in lines)]
    assert [line for lines in jobs for line in lines if line.startswith("seed")] == []
    assert len(jobs) == 2


def test_checking_many_jobs_is_announced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = CommandLine("train", ["model=world_easy", "seed=range(21)"])
    monkeypatch.setattr("reseed.cli.plan._SILENT_SECONDS", -1.0)
    jobs, _ = check_jobs(line, line.overrides, multirun=True)
    assert [job.resolved.experiment.seed for job in jobs] == list(range(21))
    assert capsys.readouterr().out == "checking 21 jobs\n"
    check_jobs(line, ["model=world_easy", "seed=range(20)"], multirun=True)
    assert capsys.readouterr().out == ""


HAVING = "sae=batch_topk, matryoshka, topk"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sae=relu", "sae.l1_coeficient=3"],
         "there is no key `sae.l1_coeficient`. Did you mean `sae.l1_coefficient`?"),
        (["comparison=seeds", "model=world_easy", "training=world", "sae=relu,topk", "sae.k=3"],
         f"sae=relu has no key `sae.k`. Options with it: {HAVING}."),
        (["sae=relu", "sae={k:3}"], f"sae=relu has no key `sae.k`. Options with it: {HAVING}."),
        (["sae={kk:3}"], "there is no key `sae.kk`. Did you mean `sae.k`?"),
        (["model=world_easy", "model.attention=eager"],
         "model=world_easy has no key `model.attention`. Options with it: model=embedded, "),
        (["model.copula_rank=3"],
         "model=embedded has no key `model.copula_rank`. Options with it: model=world, world_abs"),
        (["comparison=base"],
         "`comparison.grid` must map axes to lists of values, as in {sae: [topk, relu], seed: "),
        (["comparison=base", "comparison.grid={seed: [0, 1]}"],
         "`comparison.name` is required: give it a value"),
        (["comparison=seeds", "comparison.treshold=0.5"],
         "there is no key `comparison.treshold`. Did you mean `comparison.threshold`?"),
        (["foo.bar.baz=3"], "there is no key `foo.bar.baz`."),
        (["trainin.tokens=3"],
         "there is no key `trainin.tokens`. Did you mean `training.tokens`?"),
        (["comparision=seeds"], "there is no key `comparision`. Did you mean `comparison`?"),
        (["quickstart"], "overrides are KEY=VALUE; got quickstart. Did you mean comparison=quicks"),
        (["--training.tokens=3"], "options have no dashes: training.tokens=3; got --training"),
        (["recipe=relu_short"], "there is no key `recipe`."),
        (["seed.inner=1"], "there is no key `seed.inner`."),
        (["comparison=memory_of_init", "comparison.arms={a:{seed:3}}"],
         "`comparison.arms` has no entry `a`: add one by +comparison.arms.a=..."),
        (["comparison=memory_of_init", "comparison.arms.a.seed=3"],
         "`comparison.arms` has no entry `a`: add one by +comparison.arms.a=..."),
        (["comparison=memory_of_init", "comparison.arms={the other:{seed:3}}"],
         "`comparison.arms` has no entry `the other`: add one by "
         "+comparison.arms={the other: ...}"),
        (["comparison=seeds", "comparison.grid={sae.k:[1,2]}"],
         "`comparison.grid` has no entry `sae.k`: add one by +comparison.grid={sae.k: ...}"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_hints_refer_to_the_chosen_options(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = run if overrides[0].startswith("comparison") else train
    assert command.main(overrides) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
