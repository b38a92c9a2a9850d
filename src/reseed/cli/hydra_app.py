"""Interface to Hydra: composing, expanding and launching the jobs of a sub-command.

Every job is composed and checked before the first one starts and before anything is written, so
errors appear at once and in reseed's own words (`errors`).
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.default_element import ConfigDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reseed.cli.errors import about_missing, describe_error
from reseed.cli.main import COMMANDS
from reseed.errors import ConfigError, ReseedError

# MERGED Configuration loader for many jobs: reads the files once for each choice of options. The jobs of a sweep differ mostly in values (``seed=3``). The defaults list, which names the files to compose, depends only on the choices of options (``sae=relu``), because its interpolations refer to choices. So t
CONFIG_NAME = "config"
Task = Callable[[DictConfig], Any]


def conf_dir() -> str:
    """Return the folder of the options: in the installed package, or beside ``src`` in a checkout.

    Raises:
        FileNotFoundError: neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"the configuration is missing beside {package}: reinstall reseed")


class CommandLine:
    """The arguments of a sub-command: Hydra's flags and overrides."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        parser = get_args_parser()
        parser.prog = f"reseed {command}"
        self.flags: argparse.Namespace = parser.parse_args(list(arguments))
        if self.flags.config_path is not None:
            raise ConfigError("--config-path is not supported: use --config-dir to add options")
        self.overrides: list[str] = list(self.flags.overrides)
        self.multirun = bool(self.flags.multirun)

    @property
    def only_shows(self) -> bool:
        """True if the line only asks Hydra to show help, configuration or completion."""
        f = self.flags
        return bool(f.help or f.hydra_help or f.cfg or f.info or f.shell_completion)

    @property
    def config_flags(self) -> list[str]:
        """The flags that select the configuration, to be passed on to Hydra."""
        flags = self.flags
        pairs = (("--config-dir", flags.config_dir), ("--config-name", flags.config_name))
        return [part for name, value in pairs if value is not None for part in (name, value)]

    def show(self, task: Task, arguments: Sequence[str]) -> None:
        """Let Hydra answer a command line that only shows something."""
        header = override("hydra.help.header", f"reseed {self.command}: {COMMANDS[self.command]}")
        with _argv(self.command, [*arguments, header] if self.flags.help else arguments):
            hydra_main(version_base="1.3", config_path=conf_dir(), config_name=CONFIG_NAME)(task)()

    @contextmanager
    def composer(self) -> Iterator[Callable[[Sequence[str]], dict[str, Any]]]:
        """Yield a function from overrides to the composed configuration, as plain values.

        The function raises `ReseedError`; its hints are about the options that the overrides
        choose.
        """
        extra = self._search_path()
        name = self.flags.config_name or CONFIG_NAME

        def composed(overrides: Sequence[str]) -> dict[str, Any]:
            # Hydra's own settings (launcher, sweep folder) change nothing in a job.
            own = [o for o in overrides if not o.lstrip("+~").startswith("hydra")]
            try:
                config = compose(config_name=name, overrides=[*own, *extra])
                values = OmegaConf.to_container(config, resolve=True)
            except (HydraException, OmegaConfBaseException) as error:
                about = partial(
                    about_missing, loader=loader, config_name=name, overrides=[*own, *extra]
                )
                raise ReseedError(describe_error(error, about)) from error
            except (AttributeError, TypeError, ValueError) as error:
                # Hydra has no message for some wrong values (`sae=null`).
                raise ConfigError(f"the configuration cannot be composed: {error}") from error
            assert isinstance(values, dict)
            # An arm's overrides (`dataset.order_seed: ${seed}`) refer to its runs: not resolved.
            arms = OmegaConf.select(config, "comparison.arms")
            if OmegaConf.is_config(arms):
                values["comparison"]["arms"] = OmegaConf.to_container(arms, resolve=False)
            return {str(key): value for key, value in values.items()}

        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            loader = load_once()
            yield composed

    @cached_property
    def launcher(self) -> tuple[str, dict[str, Any]]:
        """The name of the chosen launcher, and its settings (empty unless it is slurm).

        Raises:
            ReseedError: the launcher or one of its settings does not exist.
        """
        own = [o for o in self.overrides if o.lstrip("+~").startswith("hydra")]
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            try:
                config = compose(
                    config_name=self.flags.config_name or CONFIG_NAME,
                    overrides=[*own, *self._search_path()],
                    return_hydra_config=True,
                )
                name = str(config.hydra.runtime.choices["hydra/launcher"])
                if name != "slurm":  # settings of Hydra's launchers may depend on the sweep
                    return name, {}
                node = OmegaConf.to_container(config.hydra.launcher, resolve=True)
            except (HydraException, OmegaConfBaseException) as error:
                raise ReseedError(describe_error(error)) from error
        assert isinstance(node, dict)
        return name, {str(key): value for key, value in node.items()}

    def _search_path(self) -> list[str]:
        """Return the overrides that add --config-dir to Hydra's search path."""
        if self.flags.config_dir is None:
            return []
        folder = Path(self.flags.config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(f"{{key}} must be an existing folder; got {folder}", "--config-dir")
        return [f"hydra.searchpath=[{override('', f'file://{folder}')[1:]}]"]

    def launch(self, task: Task, overrides: Sequence[str], multirun: bool) -> list[Exception]:
        """Run ``task`` as Hydra jobs.

        Returns:
            the errors of the jobs that ran in this process (Hydra would raise the first and print
            a line of its own). Errors of other launchers are raised.
        """
        errors: list[Exception] = []
        elsewhere = [o for o in overrides if o.partition("=")[0] == "hydra/launcher"]
        if not elsewhere or elsewhere[-1].endswith("=fused"):
            task = _collecting(task, errors)
        self._launch(task, overrides, multirun)
        return errors

    def _launch(self, task: Task, overrides: Sequence[str], multirun: bool) -> None:
        arguments = [*self.config_flags, *(["-m"] if multirun else []), *overrides]
        GlobalHydra.instance().clear()
        full = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are printed once, by `errors.report`
        try:
            with _argv(self.command, arguments):
                hydra_main(version_base="1.3", config_path=conf_dir(), config_name=CONFIG_NAME)(
                    task
                )()
        finally:
            if full is None:
                del os.environ["HYDRA_FULL_ERROR"]
            else:
                os.environ["HYDRA_FULL_ERROR"] = full


def _collecting(task: Task, errors: list[Exception]) -> Task:
    """Wrap ``task`` so that its exceptions are appended to ``errors`` instead of raised."""

    def collecting(config: DictConfig) -> Any:
        try:
            return task(config)
        except Exception as error:
            errors.append(error)
            return None

    many = getattr(task, "many", None)
    if many is not None:

        def collecting_many(configs: Sequence[DictConfig]) -> list[Any]:
            outcomes = many(configs)
            failed = [o for o in outcomes if isinstance(o, Exception)]
            errors.extend(failed)
            return [None if isinstance(o, Exception) else o for o in outcomes]

        collecting.many = collecting_many  # type: ignore[attr-defined]
    return collecting


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar."""
    instance = GlobalHydra.instance()
    # `glob` needs the loader, which knows the options of a group.
    loader = instance.config_loader() if instance.is_initialized() else None
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the jobs of a sweep, each as a list of overrides without sweeps."""
    return BasicSweeper.split_arguments(parse(overrides), max_batch_size=None)[0]


def sweeps(overrides: Sequence[str]) -> list[str]:
    """Return the keys over which ``overrides`` sweep."""
    return [o.get_key_element() for o in parse(overrides) if o.is_sweep_override()]


def override(key: str, value: object) -> str:
    """Return ``key=value``, with the value quoted where Hydra's grammar requires it."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"[\w./+:%@?-]+", text):
        text = "'" + text.replace("'", "\\'") + "'"
    return f"{key}={text}"


@contextmanager
def _argv(command: str, arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [f"reseed {command}", *arguments]
    try:
        yield
    finally:
        sys.argv = before


# Exceptions that a wrong override can raise; Hydra does not expect all of them (`sae=null`).
_WRONG = (
    HydraException, OmegaConfBaseException, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip


class OnceLoader(ConfigLoaderImpl):
    """Loader that composes as ``loader`` does, but every choice of options only once.

    Later changes of the files are not seen, so every command makes a new loader.
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
            # On any error Hydra composes again below, so that its message is the one raised.
            with suppress(*_WRONG):
                return self._quickly(config_name, overrides)
        return super().load_configuration(
            config_name, overrides, run_mode, from_shell, validate_sweep_overrides
        )

    def base(self, config_name: str | None, overrides: Sequence[str]) -> DictConfig:
        """Return the configuration without the values of a job; the caller must not change it."""
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


def load_once() -> OnceLoader:
    """Make the initialised Hydra compose every choice of options once, and return its loader."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    assert isinstance(hydra.config_loader, ConfigLoaderImpl)
    loader = OnceLoader(hydra.config_loader)
    hydra.config_loader = loader
    return loader
