"""Configuration loader of Hydra that reads the files once for each choice of options.

The jobs of a sweep differ mostly in values (``seed=3``). The defaults list, which names the files
to compose, depends only on the choices of options (``sae=relu``), because its interpolations refer
to choices. The composition of each set of choices is therefore kept, and Hydra's own function
applies the values to a copy. `about_missing` returns the message about a key that does not exist;
`record_without_secrets` masks the configuration that Hydra writes.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra.core.default_element import ConfigDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reseed.cli.errors import MissingKey
from reseed.errors import ConfigError, did_you_mean
from reseed.system.environment import mask_values

# Exceptions that a wrong override can raise; Hydra does not expect all of them (`sae=null`).
_WRONG = (
    HydraException, OmegaConfBaseException, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip


class OnceLoader(ConfigLoaderImpl):
    """Loader that composes as ``loader`` does, but reads each choice of options only once.

    It does not see later changes of the files, so every command makes a new loader.
    """

    def __init__(self, loader: ConfigLoaderImpl) -> None:
        # The base class is not initialised, because that would search the sources again.
        self.config_search_path = loader.config_search_path
        self.repository = loader.repository
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[object, ...], DictConfig] = {}
        self._is_group: dict[tuple[object, ...], Callable[[str], bool]] = {}

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose as Hydra does, with the same errors."""
        if run_mode == RunMode.RUN:
            # After an error, Hydra composes again below and raises its own message.
            with suppress(*_WRONG):
                return self._quickly(config_name, overrides)
        return super().load_configuration(
            config_name, overrides, run_mode, from_shell, validate_sweep_overrides
        )

    def base(self, config_name: str | None, overrides: Sequence[str]) -> DictConfig:
        """Return the configuration without a job's values; the caller must not modify it."""
        parsed = [self._parse(text) for text in overrides]
        return self._base(config_name, self._split(config_name, parsed)[0])

    def options_with(
        self, key: str, config_name: str | None, overrides: Sequence[str]
    ) -> list[str]:
        """Return the options of a group that have a key such as ``sae.k``."""
        own = [o for o in overrides if self._parse(o).is_hydra_override()]
        _, files = self._parse_overrides_and_create_caching_repo(config_name, own)
        group = key.partition(".")[0]
        return [o for o in files.get_group_options(group) if _has(files, f"{group}/{o}", key)]

    def _quickly(self, config_name: str | None, overrides: Sequence[str]) -> DictConfig:
        parsed = [self._parse(text) for text in overrides]
        rest, values = self._split(config_name, parsed)
        config = copy.deepcopy(self._base(config_name, rest))
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        task = [o for o in parsed if not o.is_hydra_override()]
        config.hydra.overrides.task.clear()
        config.hydra.overrides.task.extend([o.input_line for o in task])
        words = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            task, words.exclude_keys, words.item_sep, words.kv_sep
        )
        return config

    def _base(self, config_name: str | None, rest: Sequence[Override]) -> DictConfig:
        lines = [str(o.input_line) for o in rest]
        key = (config_name, os.getcwd(), *lines)
        if key not in self._bases:
            self._bases[key] = super().load_configuration(config_name, lines, RunMode.RUN)
        return self._bases[key]

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            (self._parsed[text],) = OverridesParser.create().parse_overrides([text])
        return self._parsed[text]

    def _split(
        self, config_name: str | None, parsed: Sequence[Override]
    ) -> tuple[list[Override], list[Override]]:
        """Split overrides into choices, and values that Hydra applies after the composition.

        Hydra's own settings count as choices, because they belong to the whole sweep and set the
        search path.
        """
        is_group = self._groups(config_name, [o for o in parsed if o.is_hydra_override()])
        choices, values = [], []
        for o in parsed:
            key = o.key_or_group
            other = key == "hydra" or o.is_hydra_override() or o.is_sweep_override()
            is_value = not other and (isinstance(o.value(), dict) or not is_group(key))
            (values if is_value else choices).append(o)
        return choices, values

    def _groups(self, config_name: str | None, own: Sequence[Override]) -> Callable[[str], bool]:
        """Return a predicate that is true for groups, on the search path of Hydra's settings."""
        lines = [str(o.input_line) for o in own]
        key = (config_name, *lines)
        if key not in self._is_group:
            _, found = self._parse_overrides_and_create_caching_repo(config_name, lines)
            self._is_group[key] = cache(found.group_exists)
        return self._is_group[key]


def _has(files: IConfigRepository, path: str, key: str) -> bool:
    """Return True if an option such as ``sae/topk``, or one that it inherits from, has a key."""
    loaded = files.load_config(path)
    if loaded is None:
        return False
    group, _, within = key.partition(".")
    name = key if loaded.header["package"] == "_global_" else within
    parent, _, last = name.rpartition(".")
    node: Any = loaded.config
    node = OmegaConf.select(node, parent) if parent else node
    if isinstance(node, DictConfig) and last in node:
        return True
    inherited = [
        d.path if d.path.startswith("/") else f"{group}/{d.path}"
        for d in loaded.defaults_list or ()
        if isinstance(d, ConfigDefault) and d.path not in (None, "_self_")
    ]
    return any(_has(files, path.removeprefix("/"), key) for path in inherited)


_MOST_VALUES = 100_000
"""Number of values of a yaml file, with those of its aliases; conf/ has at most 60 in a file."""


def check_folders(places: Any, key: str) -> None:
    """Check the folders of the user's options.

    Raises:
        ConfigError: a folder does not exist, which Hydra would ignore, or a file in it has aliases
            of aliases that would fill the memory.
    """
    if not isinstance(places, list):
        raise ConfigError(f"{{key}} must be a list of folders; got {places!r}", key)
    for place in map(str, places):
        scheme, _, path = place.rpartition("://")
        if scheme not in ("", "file"):
            continue
        if not Path(path).is_dir():
            raise ConfigError(f"{{key}} must be an existing folder; got {place}", key)
        for file in Path(path).rglob("*.yaml"):
            if file.is_file() and _expanded_size(file.read_bytes()) > _MOST_VALUES:
                raise ConfigError(f"{file}: its aliases make more than {_MOST_VALUES:,} values")


def _expanded_size(text: bytes) -> float:
    """Return the number of values of a yaml file; 0 without aliases, or if it cannot be read."""
    if b"*" not in text or b"&" not in text:
        return 0
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # of a node that contains itself
            inner = list(node.value) if isinstance(node, yaml.CollectionNode) else []
            pairs = [
                one for item in inner for one in (item if isinstance(item, tuple) else (item,))
            ]
            sizes[id(node)] = 1 + sum(map(size, pairs))
        return sizes[id(node)]

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        return 0 if root is None else size(root)
    except (yaml.YAMLError, UnicodeError, RecursionError):  # Hydra has the message
        return 0


def load_once() -> OnceLoader:
    """Replace the loader of the initialised Hydra by an `OnceLoader`, and return it."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    assert isinstance(hydra.config_loader, ConfigLoaderImpl)
    loader = OnceLoader(hydra.config_loader)
    hydra.config_loader = loader
    return loader


def about_missing(
    missing: MissingKey, loader: OnceLoader, config_name: str, overrides: Sequence[str]
) -> str:
    """Return the message about a key that the options chosen by ``overrides`` do not have."""
    try:
        base = loader.base(config_name, overrides)
    except HydraException:  # the group is missing, not a key in it
        return str(missing)
    parent = OmegaConf.select(base, missing.parent) if missing.parent else base
    if not isinstance(parent, DictConfig):
        return str(missing)
    group, _, rest = missing.key.partition(".")
    if "." in missing.parent and "_target_" not in parent:  # axes, arms: any name is allowed
        return _about_entry(missing)
    option = base.hydra.runtime.choices.get(group) if rest else None
    having = loader.options_with(missing.key, config_name, overrides) if option else []
    if having:
        return (
            f"{group}={option} has no key `{missing.key}`. Options with it: "
            f"{group}={', '.join(having)}."
        )
    known = [str(name) for name in parent if not str(name).startswith("_")]
    if not missing.parent:  # a group without a choice, such as `comparison`, has no key
        known += loader.repository.get_group_options("", results_filter=ObjectType.GROUP)
    # Only the name is compared, because all keys of a group share the rest.
    close = did_you_mean(missing.name, known)
    dotted = f"`{missing.parent}." if missing.parent else "`"
    _, _, after = missing.key.removeprefix(f"{missing.parent}.").partition(".")
    whole = f".{after}`?" if after else "`?"
    return f"{missing}{close.replace('`', dotted, 1).replace('`?', whole)}"


def _about_entry(missing: MissingKey) -> str:
    """Return the message about a mapping that does not have the entry."""
    simple = re.fullmatch(r"\w+", missing.name)
    entry = f".{missing.name}=..." if simple else f"={{{missing.name}: ...}}"
    return f"`{missing.parent}` has no entry `{missing.name}`: add one by +{missing.parent}{entry}"


@contextmanager
def record_without_secrets() -> Iterator[None]:
    """Let Hydra's sweeper write multirun.yaml without secrets; jobs get the configuration as it is.

    The sweeper of Optuna writes no configuration.
    """
    instantiate = Plugins.instantiate_sweeper

    def masked(self: Plugins, *, config: DictConfig, **others: Any) -> Sweeper:
        sweeper = instantiate(self, config=config, **others)
        # Hydra imports plugins a second time, so the class itself cannot be compared.
        if type(sweeper).__name__ == "BasicSweeper":
            plain = OmegaConf.to_container(config)
            sweeper.config = OmegaConf.create(mask_values(plain))  # type: ignore[attr-defined]
        return sweeper

    Plugins.instantiate_sweeper = masked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_sweeper = instantiate  # type: ignore[method-assign]


_lock = RLock()


@contextmanager
def own_hydra_state() -> Iterator[None]:
    """Give Hydra a state of its own: that of a caller that uses Hydra is back afterwards.

    Hydra's state belongs to the process, so other threads wait.
    """
    with _lock:
        found = Singleton._instances
        before = {kind: found.pop(kind) for kind in _STATE if kind in found}
        try:
            yield
        finally:
            for kind in _STATE:
                found.pop(kind, None)
            found.update(before)


_STATE = (GlobalHydra, HydraConfig, VersionBase)
