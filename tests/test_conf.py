"""Tests that every option of every config group composes, is complete, and builds."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from reseed.cli.hydra_app import conf_dir
from reseed.compare.config import ComparisonConfig
from reseed.config import build
from reseed.errors import ConfigError
from reseed.experiment import experiment_from

CONF = Path(__file__).parents[1] / "conf"
TYPED = sorted(
    path
    for group in ("model", "hookpoint", "dataset", "sae", "training", "runtime", "evaluation")
    for path in (CONF / group).glob("*.yaml")
)
REQUIRED = {"path": "x", "module": "model.layers.*.mlp", "d_in": 3, "num_features": 2}
COMPARISONS = sorted(p.stem for p in (CONF / "comparison").glob("*.yaml") if p.stem != "base")
ARCHITECTURES = sorted(p.stem for p in (CONF / "sae").glob("*.yaml") if p.stem != "pretrained")
INHERITED = {  # group → its base option and that option's class
    "model": ("world", "reseed.activations.synthetic.world_source.WorldConfig"),
    "training": ("standard", "reseed.train.config.TrainingConfig"),
    "comparison": ("base", "reseed.compare.config.ComparisonConfig"),
}


def written(group: str, option: str) -> dict:
    """Return the values that an option's own file sets in its group."""
    values = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    return values.get(group, values)


def composed(*overrides: str) -> dict:
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        config = compose(config_name="config", overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize("path", TYPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_option_lists_every_field_and_builds(path: Path) -> None:
    group, option = path.parent.name, path.stem
    # Leave recipes out: they could add fields that the option lacks.
    values = composed(f"{group}={option}", "source=x", "~recipe@_global_")[group]
    module, _, name = values.pop("_target_").rpartition(".")
    target = getattr(import_module(module), name)
    # A field missing from the yaml could not be overridden on the command line.
    assert set(values) == {f.name for f in dataclasses.fields(target)}
    for key, value in values.items():
        values[key] = REQUIRED[key] if value == "???" else value
    target(**values)


@pytest.mark.parametrize("option", [*COMPARISONS, "base"])
def test_every_comparison_lists_every_field(option: str) -> None:
    values = composed(f"comparison={option}")["comparison"]
    assert values.pop("_target_") == "reseed.compare.config.ComparisonConfig"
    assert set(values) == {f.name for f in dataclasses.fields(ComparisonConfig)}
    assert values["name"] == (option if option != "base" else "???")


@pytest.mark.parametrize("option", COMPARISONS)
def test_a_comparison_does_not_inherit_grid_or_arms(option: str) -> None:
    own, whole = written("comparison", option), composed(f"comparison={option}")["comparison"]
    assert list(whole["grid"].items()) == list(own["grid"].items())
    assert list(whole["arms"] or ()) == list(own.get("arms", ()))


@pytest.mark.parametrize("group", INHERITED)
def test_options_that_inherit_set_only_what_differs(group: str) -> None:
    base, target = INHERITED[group]
    inherited = written(group, base)
    assert inherited["_target_"] == target
    found = 0
    for path in (CONF / group).glob("*.yaml"):
        if base not in str(yaml.safe_load(path.read_text()).get("defaults", "")):
            continue
        found += 1
        own = {k: v for k, v in written(group, path.stem).items() if k != "defaults"}
        assert [k for k, v in own.items() if inherited.get(k, "") == v] == [], path
    assert found >= 3


def test_the_defaults_make_an_experiment() -> None:
    experiment, _ = experiment_from(composed())
    assert (experiment.model.name, experiment.dataset.name) == ("embedded", "docstrings")
    assert (experiment.sae.name, experiment.layer, experiment.seed) == ("topk", 2, 0)


def test_a_custom_world_needs_its_required_fields() -> None:
    experiment, _ = experiment_from(composed("model=world", "model.d_in=8", "model.num_features=4"))
    assert (experiment.model.name, experiment.dataset.name) == ("world", "generated")
    with pytest.raises(ConfigError, match=r"`model.num_features` is required: give it a value"):
        experiment_from(composed("model=world", "model.d_in=8"))


WORLDS = sorted(p.stem for p in (CONF / "model").glob("world_*.yaml"))


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_sets_its_dataset_and_layer_and_builds(world: str) -> None:
    values = composed(f"model={world}")
    assert values["model"]["label"] == world
    experiment, _ = experiment_from(values)
    assert (experiment.model.name, experiment.dataset.name) == ("world", "generated")
    assert (experiment.layer, experiment.hookpoint.site) == (0, "resid_post")
    assert experiment.surrogate == "none"


def test_the_users_overrides_win_over_a_world() -> None:
    values = composed("model=world_easy", "dataset=docstrings", "layer=1", "model.seed=4")
    assert values["dataset"]["_target_"].endswith("DocstringsConfig")
    assert (values["layer"], values["model"]["seed"]) == (1, 4)
    values = composed("comparison=seeds", "model=world_easy", "sae=relu")
    assert values["dataset"]["_target_"].endswith("GeneratedConfig")
    assert values["sae"]["l1_coefficient"] == 3.6  # the recipe of training=short


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("sae", ARCHITECTURES)
def test_every_comparison_composes_with_every_architecture(comparison: str, sae: str) -> None:
    values = composed(f"comparison={comparison}", f"sae={sae}")
    experiment, _ = experiment_from(values)
    assert values["comparison"]["name"] == comparison
    assert experiment.sae.name == sae


def test_source_and_sae_source_are_equivalent() -> None:
    by_root, by_group = (
        experiment_from(composed("sae=pretrained", override))[0]
        for override in ("source=x", "sae.source=x")
    )
    assert by_root == by_group
    with pytest.raises(ConfigError, match=r"`sae\.source` is required with sae=pretrained"):
        experiment_from(composed("sae=pretrained"))


def test_the_users_overrides_win_over_comparison_and_recipe() -> None:
    values = composed("comparison=quickstart", "training=standard", "sae.k=5", "layer=0")
    assert values["training"]["recipe"] == "standard"
    assert (values["sae"]["k"], values["layer"]) == (5, 0)


def test_a_recipe_sets_fields_of_the_architecture() -> None:
    short, standard = (
        experiment_from(composed("sae=relu", f"training={t}"))[0] for t in ("short", "standard")
    )
    assert short.sae.unit_norm_decoder
    assert not standard.sae.unit_norm_decoder


def test_unknown_root_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is no key `sed`"):
        experiment_from(composed("+sed=1"))


def test_recipes_for_jumprelu_set_beta1_penalty_and_sparsity() -> None:
    published, _ = experiment_from(composed("sae=jumprelu", "training=standard"))
    assert (published.training.beta1, published.sae.penalty) == (0, "step")  # type: ignore[attr-defined]
    short, _ = experiment_from(composed("sae=jumprelu", "training=short"))
    assert short.sae.sparsity == "λ=0.0088"
    assert not short.sae.needs_calibration
    matched, _ = experiment_from(composed("sae=jumprelu", "training=short", "sae.target_l0=8"))
    assert matched.sae.needs_calibration


@pytest.mark.parametrize("sae", ["topk", "batch_topk", "matryoshka"])
def test_a_target_on_the_command_line_wins_over_the_recipes_k(sae: str) -> None:
    by_target, by_k = (
        experiment_from(composed(f"sae={sae}", override))[0].sae
        for override in ("sae.target_l0=5", "sae.k=5")
    )
    assert by_target.sparsity == "k=5"
    assert by_target.signed() == by_k.signed()


ELSEWHERE = ("models", "datasets", "worlds")
"""Comparisons of models other than the embedded one."""


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_axes_of_every_comparison_are_keys_and_their_options_exist(comparison: str) -> None:
    values = composed(f"comparison={comparison}")["comparison"]
    made = build(values, "comparison", ComparisonConfig)
    for arm in made.each_arm():
        for key, listed in {**arm.grid, **{k: (v,) for k, v in arm.fixed.items()}}.items():
            group = CONF / key
            if group.is_dir():
                assert {str(v) for v in listed} <= {p.stem for p in group.glob("*.yaml")}, key
            else:
                assert OmegaConf.select(OmegaConf.create(composed()), key, default="") != "", key


@pytest.mark.parametrize("comparison", [c for c in COMPARISONS if c not in ELSEWHERE])
def test_a_comparison_runs_on_the_embedded_model(comparison: str) -> None:
    """The first and last values of its grid make experiments with budgets in range."""
    made = build(composed(f"comparison={comparison}")["comparison"], "comparison", ComparisonConfig)
    for end in (0, -1):
        axes = [f"{k}={v[end]}" for k, v in made.grid.items()]
        experiment, _ = experiment_from(composed(f"comparison={comparison}", *axes))
        assert experiment.model.name == "embedded"
        assert experiment.layer < 4
        assert experiment.training.tokens <= 1_000_000


def test_the_comparison_of_worlds_has_a_world_in_every_arm() -> None:
    made = build(composed("comparison=worlds")["comparison"], "comparison", ComparisonConfig)
    for arm in made.each_arm():
        fixed = [f"{key}={value}" for key, value in arm.fixed.items()]
        experiment, _ = experiment_from(composed("comparison=worlds", *fixed))
        assert experiment.model.name == "world", arm
        assert (experiment.dataset.name, experiment.layer) == ("generated", 0)
