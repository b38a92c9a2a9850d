from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from reseed import config
from reseed.config import DATASETS, Config, build, digest, load_plugins, make, setting
from reseed.errors import ConfigError, ReseedError
from reseed.sae.base import SAEConfig


@dataclass(frozen=True)
class Shape(Config, family="test-shape"):
    sides: int = setting(3, at_least=3)


@dataclass(frozen=True)
class Coloured(Shape, name="coloured"):
    colour: str = setting("red", choices=("red", "green"))
    size: float = setting(1.0, above=0, below=10)
    tags: tuple[str, ...] = ()
    note: str | None = setting(None, signed=False)
    added: int = setting(0, neutral=0)


def test_a_configuration_round_trips_by_its_name() -> None:
    made = Coloured(sides=4, colour="green", size=2, tags=("a", "b"))
    assert made.to_dict()["type"] == "coloured"
    assert Shape.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sides": "abc"}, "`shape.sides` must be an integer, at least 3; got 'abc'"),
        ({"sides": 2}, "`shape.sides` must be an integer, at least 3; got 2"),
        ({"sides": True}, "`shape.sides` must be an integer, at least 3; got True"),
        ({"sides": 3.5}, "`shape.sides` must be an integer, at least 3; got 3.5"),
        ({"size": 0}, "`shape.size` must be a number, above 0 and below 10; got 0"),
        ({"size": float("nan")}, "`shape.size` must be a number, above 0 and below 10; got nan"),
        ({"size": None}, "`shape.size` must be a number, above 0 and below 10; got None"),
        (
            {"colour": "gren"},
            "`shape.colour` must be one of red, green; got 'gren'. Did you mean `green`?",
        ),
        ({"tags": "a"}, "`shape.tags` must be a list (a string each); got 'a'"),
        ({"note": 3}, "`shape.note` must be a string or null; got 3"),
        (
            {"colur": "red"},
            "there is no key `shape.colur`. Did you mean `shape.colour`? Keys of shape=coloured: "
            "sides, colour, size, tags, note, added.",
        ),
    ],
)
def test_invalid_values_are_refused_with_key_rule_and_value(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(Coloured, values, "shape")
    assert str(caught.value) == message


def test_whole_floats_are_integers_and_integers_are_floats() -> None:
    made = make(Coloured, {"sides": 1e3, "size": 2}, "shape")
    assert (made.sides, type(made.sides)) == (1000, int)
    assert (made.size, type(made.size)) == (2.0, float)


def test_the_signature_covers_exactly_what_changes_results() -> None:
    base = Coloured()
    assert digest(base.signed()) == digest(Coloured(note="elsewhere").signed())
    assert digest(base.signed()) != digest(Coloured(sides=5).signed())
    # A field added later is left out of the signature at its neutral value.
    assert "added" not in base.signed()
    assert Coloured(added=1).signed()["added"] == 1


def test_a_new_version_of_a_component_changes_signatures() -> None:
    @dataclass(frozen=True)
    class Better(Coloured, name="coloured-better"):
        version = 2

    signed = Better().signed()
    assert signed["version"] == 2
    assert "version" not in Coloured().signed()


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [1.0]}) == digest({"b": [1.0], "a": 1})
    # SHA-256 of the canonical text, computed independently: signatures must never change.
    assert digest({"a": 1}) == "015abd7f5cc5"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean `coloured`"):
        Config.registered("test-shape", "colored")


def test_two_classes_may_not_share_a_name() -> None:
    with pytest.raises(TypeError, match="two classes are registered as test-shape=coloured"):

        class Other(Shape, name="coloured"):
            pass


def test_build_calls_only_configurations() -> None:
    target = f"{__name__}.Coloured"
    whole = Coloured(sides=4).to_dict()
    whole.pop("type")
    assert build({"_target_": target, **whole}, "shape", Shape) == Coloured(sides=4)
    whole.pop("added")  # in a file older than the field, the field has its neutral value
    assert build({"_target_": target, **whole}, "shape", Shape) == Coloured(sides=4)
    whole.pop("colour")
    with pytest.raises(ConfigError, match=r"`shape\.colour` is required"):
        build({"_target_": target, **whole}, "shape", Shape)
    with pytest.raises(ConfigError, match="is not a Shape"):
        build({"_target_": "reseed.sae.topk.TopKConfig"}, "shape", Shape)


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.run", "pickle.loads", "no_such.Thing", "reseed.api.compose",
     "reseed.__main__.main", "reseed.no_such.Thing", "reseed..x", "reseed.config.importlib",
     "planted.Coloured", "reseed.config.Config"],
)  # fmt: skip
def test_a_target_is_looked_up_and_not_imported(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "planted.py").write_text(f"open({str(ran)!r}, 'w')\nclass Coloured: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"`shape`: there is no `_target_` {target}: it must"):
        build({"_target_": target}, "shape", Shape)
    assert "planted" not in sys.modules
    assert not ran.exists()


def test_a_misspelt_target_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=f"Did you mean `{__name__}.Coloured`"):
        build({"_target_": f"{__name__}.Colored"}, "shape", Shape)
    with pytest.raises(ConfigError, match=r"Did you mean `reseed\.sae\.topk\.TopKConfig`"):
        build({"_target_": "reseed.sae.topk.TopkConfig"}, "sae", SAEConfig)


@pytest.mark.parametrize(
    ("group", "target"),
    [("model", "activations.source.SourceConfig"), ("sae", "sae.base.SAEConfig")],
)
def test_abstract_configurations_cannot_be_built(group: str, target: str) -> None:
    message = f"`{group}`: `_target_` reseed.{target} is abstract: name a subclass"
    with pytest.raises(ConfigError) as caught:
        build({"_target_": f"reseed.{target}"}, group)
    assert str(caught.value) == message


def test_missing_required_fields_are_refused() -> None:
    @dataclass(frozen=True)
    class Needy(Config):
        path: str = setting()

    for values in ({}, {"path": "???"}):
        with pytest.raises(ConfigError) as caught:
            make(Needy, values, "model")
        assert str(caught.value) == "`model.path` is required: give it a value"


def test_configurations_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Coloured().sides = 4  # type: ignore[misc]


def test_classes_that_yaml_files_of_version_0_1_name_are_found() -> None:
    assert len(config._MOVED) == 8
    for target in config._MOVED:
        values = {"_target_": target, "site": "resid_post", "module": None, "nonsense": 1}
        with pytest.raises(ConfigError, match=r"is required|there is no key"):
            build(values, "group")


@pytest.fixture
def fresh_plugins(made_up_package, monkeypatch):
    """Return a made-up package that this interpreter finds, with no plugin loaded before."""
    monkeypatch.syspath_prepend(made_up_package.folder)
    load_plugins.cache_clear()
    yield made_up_package
    load_plugins.cache_clear()
    sys.modules.pop("made_up", None)


def test_entry_points_of_an_installed_package_are_imported_once(fresh_plugins, capfd) -> None:
    fresh_plugins.write({"made_up.py": "print('imported')"}, {DATASETS: "mine = made_up"})
    for _ in range(2):
        load_plugins(DATASETS, "reseed.activations")
    assert capfd.readouterr().out == "imported\n"
    assert "reseed.activations.synthetic.worlds" in sys.modules


def test_a_package_that_cannot_be_imported_is_named_with_the_cause(fresh_plugins) -> None:
    fresh_plugins.write({"made_up.py": "import no_such_module"}, {DATASETS: "mine = made_up"})
    with pytest.raises(ReseedError) as caught:
        load_plugins(DATASETS, "reseed.activations")
    assert str(caught.value) == (
        "the installed package made-up 1.0 cannot be used: its entry point `mine = made_up` in the "
        "group reseed.datasets fails (ModuleNotFoundError: No module named 'no_such_module'). Mend "
        "or uninstall the package"
    )
