"""Frozen, typed configuration, and the checks of its values.

Every option group of ``conf/`` is described by a frozen dataclass that derives from `Config`, next
to the class that it configures. Types and ranges are declared once, on the field, and checked when
the object is created, before anything is computed. This module imports neither hydra nor torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import pkgutil
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Self, TypeVar

from reseed.errors import ConfigError, check_plain, did_you_mean, plugin_error, shown

SIGNATURE_LENGTH = 12
"""Number of hex characters of a signature; a million runs have a collision with probability 2e-3.
"""

SAES, EVALUATIONS = "reseed.sae", "reseed.evaluations"
DATASETS, MEASURES = "reseed.datasets", "reseed.measures"
"""Entry-point groups in which installed packages name their modules (`load_plugins`)."""
CONF = "reseed.conf"
"""Entry-point group in which they name the folders of their options, yaml files as in conf/."""

C = TypeVar("C", bound="Config")
_MISSING = dataclasses.MISSING
_TYPE_KEY = "type"


def setting(
    default: Any = _MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] | None = None,
    signed: bool = True,
    neutral: Any = _MISSING,
) -> Any:
    """Return a dataclass field with a rule.

    Args:
        default: the default value; a field without one is required.
        at_least, above, at_most, below: bounds of a number, inclusive or strict.
        choices: the allowed values.
        signed: whether the value changes results, and so enters the signature.
        neutral: for fields added after a release, the value at which the field is left out of the
            signature, because results equal those from before the field existed.
    """
    metadata = {
        "bounds": {"at least": at_least, "above": above, "at most": at_most, "below": below},
        "choices": choices,
        "signed": signed,
        "neutral": neutral,
    }
    if default is _MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Base class of all configuration objects.

    A family (``class SAEConfig(Config, family="sae")``) registers the classes of one option group
    under stable names (``class TopKConfig(SAEConfig, name="topk")``). Records on disk hold these
    names, never class paths.
    """

    family: ClassVar[str] = ""
    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    """Part of the signature. Increase it when a code change alters this component's results."""
    _registered: ClassVar[dict[tuple[str, str], type[Config]]] = {}

    def __init_subclass__(cls, *, family: str = "", name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            cls.family = family
        if name:
            # Registering before the dataclass decorator runs is safe: it returns the same class.
            cls.name = name
            known = Config._registered.setdefault((cls.family, name), cls)
            if known.__qualname__ != cls.__qualname__ or known.__module__ != cls.__module__:
                raise TypeError(
                    f"two classes are registered as {cls.family}={name}: {known.__module__}."
                    f"{known.__qualname__} and {cls.__module__}.{cls.__qualname__}"
                )
            Config._registered[cls.family, name] = cls

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in dataclasses.fields(self):
            value = _checked(getattr(self, f.name), hints[f.name], f)
            object.__setattr__(self, f.name, value)
        self.validate()

    def validate(self) -> None:
        """Check rules that involve several fields; raise `ConfigError` with the offending key."""

    @classmethod
    def registered(cls, family: str, name: str) -> type[Config]:
        """Return the class registered as ``family=name``."""
        try:
            return Config._registered[family, name]
        except KeyError:
            known = sorted(n for f, n in Config._registered if f == family)
            raise ConfigError(
                f"no {family} is called `{name}`.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}."
            ) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], key: str = "") -> Self:
        """Build an object from the output of `to_dict`. Unknown keys are refused."""
        values = dict(values)
        name = values.pop(_TYPE_KEY, None)
        target = cls if name is None else Config.registered(cls.family, name)
        if not issubclass(target, cls):
            raise ConfigError(f"{{key}} must be a {cls.__name__}, got {target.__name__}", key)
        return make(target, values, key)

    def to_dict(self) -> dict[str, Any]:
        """Return every field in plain values, with the stable class name under ``type``."""
        out: dict[str, Any] = {_TYPE_KEY: self.name} if self.name else {}
        for f in dataclasses.fields(self):
            out[f.name] = _plain(getattr(self, f.name))
        return out

    def signed(self) -> dict[str, Any]:
        """Return the part of `to_dict` that changes results, with the component's version."""
        out: dict[str, Any] = {_TYPE_KEY: self.name} if self.name else {}
        if self.version != 1:
            out["version"] = self.version
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            neutral = f.metadata.get("neutral", _MISSING)
            if not f.metadata.get("signed", True) or (neutral is not _MISSING and value == neutral):
                continue
            out[f.name] = value.signed() if isinstance(value, Config) else _plain(value)
        return out


@cache
def load_plugins(group: str, package: str, subpackages: bool = True) -> None:
    """Import the modules that register something under a stable name, once per process.

    Records hold stable names only, so whoever reads one calls this first.

    Args:
        group: entry-point group in which other installed packages name such modules.
        package: our package; all of its modules are imported.
        subpackages: whether to import the modules of its subpackages, too.

    Raises:
        ReseedError: a module of another package cannot be imported.
    """
    find = pkgutil.walk_packages if subpackages else pkgutil.iter_modules
    for module in find(importlib.import_module(package).__path__, f"{package}."):
        if subpackages or not module.ispkg:
            importlib.import_module(module.name)
    load_entry_points(group)


def load_entry_points(group: str) -> None:
    """Import the modules that other installed packages name in an entry-point group.

    Raises:
        ReseedError: a module cannot be imported.
    """
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            raise plugin_error(entry, f"{type(error).__name__}: {error}") from error


def digest(values: Any, length: int = SIGNATURE_LENGTH) -> str:
    """Return ``length`` hex characters of SHA-256 over canonical JSON (sorted, shortest floats)."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


# Classes that yaml files of version 0.1 name; users' copies of these files keep working.
_MOVED = {
    f"reseed.{old}.{name}": f"reseed.{new}.{name}"
    for name, old, new in (
        ("HookpointConfig", "activations.hookpoint", "activations.hookpoints"),
        ("EmbeddedModelConfig", "activations.language_model", "activations.model_source"),
        ("PathModelConfig", "activations.language_model", "activations.model_source"),
        ("HubModelConfig", "activations.language_model", "activations.model_source"),
        ("WorldConfig", "activations.world_config", "activations.synthetic.world_source"),
        ("GeneratedConfig", "activations.world_config", "activations.synthetic.world_source"),
        ("AbsorptionConfig", "evaluate.absorption.config", "evaluate.absorption.evaluation"),
        ("ContextsConfig", "evaluate.contexts.config", "evaluate.contexts"),
    )
}


def build(node: Mapping[str, Any], key: str, base: type[Config] = Config) -> Any:
    """Build the object that a composed option group declares by its ``_target_``.

    Args:
        node: a plain mapping (not OmegaConf) with ``_target_`` and the fields.
        key: the group's key in the whole configuration, for messages (``sae``).
        base: the class that the target must derive from.

    Raises:
        ConfigError: an unknown class or key, a wrong type or a value out of range; with the key.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"{{key}} must be one of its options; got {node!r}", key)
    values = dict(node)
    target = values.pop("_target_", None)
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{{key}} must name a class by `_target_`, got {target!r}", key)
    found = _class_named(_MOVED.get(target, target))
    if found is None:
        raise ConfigError(
            f"{{key}}: there is no `_target_` {target}: it must name a {base.__name__} of reseed "
            f"or of a package's entry point.{did_you_mean(target, _imported(base))}",
            key,
        )
    if not issubclass(found, base):
        raise ConfigError(f"{{key}}: `_target_` {target} is not a {base.__name__}", key)
    if inspect.isabstract(found):
        raise ConfigError(f"{{key}}: `_target_` {target} is abstract: name a subclass", key)
    for f in dataclasses.fields(found):
        # A missing key must not silently get the class's default, unless that is the neutral value
        # of a field that was added after the yaml was written.
        if f.name not in values and f.metadata.get("neutral", _MISSING) != f.default:
            raise ConfigError("{key} is required: do not remove it", _dotted(key, f.name))
    return make(found, values, key)


def _class_named(path: str) -> type[Config] | None:
    """Return the `Config` class of this path; None if there is none."""
    # Only reseed's modules and those of entry points are imported: a yaml may come from anywhere.
    module = path.rpartition(".")[0]
    if re.fullmatch(r"reseed(\.[a-z]\w*)+", module):  # not __main__
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
    elif path not in _imported(Config):
        for group in (SAES, EVALUATIONS, DATASETS):
            load_entry_points(group)
    return _imported(Config).get(path)


def _imported(base: type[Config]) -> dict[str, type[Config]]:
    """Return path → class of all imported subclasses."""
    found = {}
    for one in base.__subclasses__():
        found |= {f"{one.__module__}.{one.__qualname__}": one, **_imported(one)}
    return found


def make(target: type[C], values: Mapping[str, Any], key: str) -> C:
    """Return ``target(**values)``; errors carry the full key."""
    fields = {f.name: f for f in dataclasses.fields(target)}
    hints = _hints(target)
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            known = [_dotted(key, other) for other in fields]
            option = f"{key}={target.name}" if key and target.name else key or target.__name__
            raise ConfigError(
                f"there is no key {{key}}.{did_you_mean(_dotted(key, name), known)} "
                f"Keys of {option}: {', '.join(fields)}.",
                _dotted(key, name),
            )
        hint = hints[name]
        if isinstance(value, Mapping) and isinstance(hint, type) and issubclass(hint, Config):
            value = hint.from_dict(value, _dotted(key, name))
        arguments[name] = value
    for name, f in fields.items():
        required = f.default is _MISSING and f.default_factory is _MISSING
        if (required and name not in arguments) or _is_missing_mark(arguments.get(name)):
            raise ConfigError("{key} is required: give it a value", _dotted(key, name))
    try:
        return target(**arguments)
    except ConfigError as error:
        raise error.within(key) from None


def _is_missing_mark(value: Any) -> bool:
    """Return True for the yaml's ``???``, a value that the user must give."""
    return isinstance(value, str) and value == "???"


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _checked(value: Any, hint: Any, f: dataclasses.Field) -> Any:
    """Return ``value`` in the declared type; raise `ConfigError` if the conversion loses data."""
    converted, ok = _convert(value, hint)
    bounds = f.metadata.get("bounds", {})
    choices = f.metadata.get("choices")
    if ok and choices is not None and converted is not None and converted not in choices:
        listed = ", ".join(map(str, choices))
        hint_text = did_you_mean(str(converted), map(str, choices))
        raise ConfigError(f"{{key}} must be one of {listed}; got {value!r}.{hint_text}", f.name)
    limits = " and ".join(
        f"{word} {limit:g}" for word, limit in bounds.items() if limit is not None
    )
    rule = ", ".join(part for part in (_describe(hint), limits) if part)
    if not ok or (converted is not None and not _within(converted, bounds)):
        raise ConfigError(f"{{key}} must be {rule}; got {shown(value)}", f.name)
    check_plain(converted, f.name)
    return converted


def _within(value: Any, bounds: Mapping[str, float | None]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    low, above, high, below = (bounds.get(w) for w in ("at least", "above", "at most", "below"))
    return (
        (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )


def _convert(value: Any, hint: Any) -> tuple[Any, bool]:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value, True
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            converted, ok = _convert(value, option)
            if ok:
                return converted, True
        return value, False
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return value, False
        item = typing.get_args(hint)[0]
        pairs = [_convert(v, item) for v in value]
        return tuple(v for v, _ in pairs), all(ok for _, ok in pairs)
    if origin in (dict, Mapping) or hint is dict:
        return value, isinstance(value, Mapping)
    if hint is type(None):
        return value, value is None
    if hint is bool:
        return value, isinstance(value, bool)
    if hint is int:
        if isinstance(value, float) and value.is_integer():  # 1e6 in yaml is a float
            return int(value), True
        return value, isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        return (float(value), math.isfinite(value)) if ok else (value, False)
    return value, isinstance(value, hint)


def _describe(hint: Any) -> str:
    """Describe a type for messages: ``an integer``, ``a number or null``."""
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false",
             type(None): "null"}  # fmt: skip
    if hint in words:
        return words[hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if origin is tuple:
        return f"a list ({_describe(typing.get_args(hint)[0])} each)"
    if origin in (dict, Mapping) or hint is dict:
        return "a mapping"
    return f"a {getattr(hint, '__name__', hint)}"
