"""Interface to Hydra: composing and expanding the jobs of a sub-command, help, and launching.

Every job is composed and checked before the first one starts and before anything is written, so
errors appear at once and in reseed's own words (`errors`). The command then does the work itself,
unless ``hydra/launcher=`` chooses one of Hydra's launchers, which composes each job again where it
runs. This file and `config_loader` are the only ones that use Hydra's internals.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from reseed.cli import COMMANDS
from reseed.cli.config_loader import (
    about_missing,
    check_folders,
    load_once,
    own_hydra_state,
    record_without_secrets,
)
from reseed.cli.errors import hydra_errors
from reseed.errors import ConfigError, ReseedError
from reseed.system.environment import environment_variables

CONFIG_NAME = "config"
LOCAL_LAUNCHER = "fused"
"""The default launcher, with which the command does the work itself."""
_LOCAL_SETTINGS = ("hydra/launcher", "hydra.launcher", "hydra.searchpath", "hydra.job.env_set")
"""Settings of Hydra that have an effect although no job of Hydra is started."""
Task = Callable[[DictConfig], Any]


def conf_dir() -> str:
    """Return the folder of the options, in the installed package or beside ``src`` in a checkout.

    Raises:
        FileNotFoundError: neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"the configuration is missing beside {package}: reinstall reseed")


def _parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of Hydra's flags, which raises `ConfigError` instead of exiting."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{parser.prog}: {message}")

    parser = get_args_parser()
    parser.prog, parser.error = f"reseed {command}", refuse
    return parser


class CommandLine:
    """The arguments of a sub-command: Hydra's flags and overrides."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        for word in arguments:
            if re.match(r"--[a-z_]+[.=]", word) and "." in word.partition("=")[0]:
                raise ConfigError(f"options have no dashes: {word.lstrip('-')}; got {word}")
        self.flags: argparse.Namespace = _parser(command).parse_args(list(arguments))
        if self.flags.config_path is not None:
            raise ConfigError("--config-path is not supported: use --config-dir to add options")
        self.overrides: list[str] = list(self.flags.overrides)
        self.multirun = bool(self.flags.multirun)
        self.typed = tuple(self.overrides)

    @property
    def command_text(self) -> str:
        """The command line that trains the same runs, for their records."""
        command = "run" if self.command == "check" else self.command
        many = ["-m"] if self.multirun and command == "train" else []
        return shlex.join(["reseed", command, *self.config_flags, *many, *self.typed])

    @property
    def config_flags(self) -> list[str]:
        """The flags that select the configuration, to be passed on to Hydra."""
        flags = self.flags
        pairs = (("--config-dir", flags.config_dir), ("--config-name", flags.config_name))
        return [part for name, value in pairs if value is not None for part in (name, value)]

    @contextmanager
    def composer(self) -> Iterator[Callable[[Sequence[str]], dict[str, Any]]]:
        """Yield a function from overrides to the composed configuration, as plain values.

        The function raises `ReseedError` if the configuration cannot be composed. The message
        suggests keys of the options that the overrides choose.
        """
        extra = self._search_path()
        name = self.flags.config_name or CONFIG_NAME

        def composed(overrides: Sequence[str]) -> dict[str, Any]:
            # Hydra's own settings (launcher, sweep folder) change nothing in a job.
            own = [o for o in overrides if not _is_hydras(o)]
            about = partial(
                about_missing, loader=loader, config_name=name, overrides=[*own, *extra]
            )
            with hydra_errors("the configuration cannot be composed", about):
                config = compose(config_name=name, overrides=[*own, *extra])
                values = OmegaConf.to_container(config, resolve=True)
            assert isinstance(values, dict)
            # An arm's overrides (`dataset.order_seed: ${seed}`) are resolved in each of its runs.
            arms = OmegaConf.select(config, "comparison.arms")
            if OmegaConf.is_config(arms):
                values["comparison"]["arms"] = OmegaConf.to_container(arms, resolve=False)
            return {str(key): value for key, value in values.items()}

        with _hydra():
            loader = load_once()
            yield composed

    @cached_property
    def launcher(self) -> tuple[str, dict[str, Any]]:
        """The name of the chosen launcher, and its settings (empty unless it is slurm).

        Raises:
            ReseedError: the launcher or one of its settings does not exist, or a setting of Hydra
                has no effect with it.
        """
        config = self._hydra_config
        name = str(config.runtime.choices["hydra/launcher"])
        self._check_settings(name)
        if name not in (LOCAL_LAUNCHER, "slurm") and config.output_subdir is not None:
            # Hydra would write the overrides there, with their secrets.
            raise ConfigError(
                f"{{key}} must be null, as run.json holds the record of a run; got "
                f"{config.output_subdir}",
                "hydra.output_subdir",
            )
        if name != "slurm":  # settings of Hydra's launchers may depend on the sweep
            return name, {}
        with hydra_errors("the launcher's settings cannot be read"):
            node = OmegaConf.to_container(config.launcher, resolve=True)
        assert isinstance(node, dict)
        return name, {str(key): value for key, value in node.items()}

    def _check_settings(self, launcher: str) -> None:
        """Raise `ConfigError` for settings of Hydra that would change nothing."""
        single = self.command == "train" and not self.multirun
        starts_jobs = launcher not in (LOCAL_LAUNCHER, "slurm") and not single
        for text in self._hydra_overrides:
            key = text.lstrip("+~").partition("=")[0]
            if key == "hydra.sweep.dir":
                raise ConfigError(f"{{key}} is the folder of the sweep; got {text}", key)
            of_launcher = key == "hydra.launcher" or key.startswith("hydra.launcher.")
            if of_launcher and (launcher == LOCAL_LAUNCHER or key.endswith("._target_")):
                raise ConfigError(
                    f"{{key}} has no effect: choose a launcher by hydra/launcher=..., and set its "
                    f"own settings; got {text}",
                    key,
                )
            if starts_jobs or (key.startswith(_LOCAL_SETTINGS) and launcher != "slurm"):
                continue
            if key.startswith(_LOCAL_SETTINGS[:3]) or text == "hydra/sweeper=basic":
                continue
            advice = "" if single or launcher == "slurm" else ": use hydra/launcher=basic"
            raise ConfigError(
                f"{{key}} has no effect here, because the command starts no jobs of Hydra{advice}; "
                f"got {text}",
                key,
            )

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that ``hydra.job.env_set`` sets."""
        return {str(k): str(v) for k, v in self._hydra_config.job.env_set.items()}

    @property
    def _hydra_overrides(self) -> list[str]:
        return [o for o in self.overrides if _is_hydras(o)]

    @cached_property
    def _hydra_config(self) -> DictConfig:
        """Hydra's own part of the configuration."""
        with _hydra(), hydra_errors("Hydra's settings cannot be composed"):
            return compose(
                config_name=self.flags.config_name or CONFIG_NAME,
                overrides=[*dict.fromkeys([*self._hydra_overrides, *self._search_path()])],
                return_hydra_config=True,
            ).hydra

    def _search_path(self) -> list[str]:
        """Return the override of Hydra's search path, or that which adds --config-dir to it."""
        given = [o for o in self.overrides if o.lstrip("+~").startswith("hydra.searchpath")]
        if self.flags.config_dir is None:
            for o in parse(given):
                check_folders(o.value(), o.key_or_group)
            return given
        if given:
            raise ConfigError(f"give --config-dir or {{key}}, not both; got {given[0]}",
                              "hydra.searchpath")  # fmt: skip
        folder = Path(self.flags.config_dir).resolve()
        check_folders([str(folder)], "--config-dir")
        return [f"hydra.searchpath=[{override('', f'file://{folder}')[1:]}]"]

    @property
    def runs_here(self) -> bool:
        """True if this process does the work itself, not the jobs of Hydra's launchers or SLURM."""
        return self.launcher[0] == LOCAL_LAUNCHER

    def launch(self, task: Task, overrides: Sequence[str]) -> None:
        """Run ``task`` as the jobs of a Hydra multirun: with Hydra's launchers or Optuna's sweeper.

        Raises:
            Exception: the error of the first failed job.
        """
        arguments = [*self.config_flags, "-m", *overrides]
        # Only `errors.run_and_report` prints errors.
        with (
            environment_variables({"HYDRA_FULL_ERROR": "1"}),
            own_hydra_state(),
            _argv(self.command, arguments),
            record_without_secrets(),
        ):
            hydra_main(version_base="1.3", config_path=conf_dir(), config_name=CONFIG_NAME)(task)()


@contextmanager
def _hydra() -> Iterator[None]:
    """Initialise Hydra with the options of reseed."""
    with own_hydra_state(), initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        yield


def asks_to_show(arguments: Sequence[str]) -> bool:
    """Return True if a command line only asks for help, configuration or completion."""
    # Flags and words of the command itself (``--format md SWEEP``) are unknown to Hydra.
    with suppress(ConfigError):  # the command itself says what is wrong
        f, _ = _parser("").parse_known_args(list(arguments))
        return bool(f.help or f.hydra_help or f.cfg or f.info or f.shell_completion)
    return False


_OWN_ARGUMENTS = ("cache", "cancel", "check", "evaluate", "power", "report", "show", "status")
"""Commands with flags or words of their own, which Hydra does not know (``--format md SWEEP``)."""


def show(command: str, arguments: Sequence[str]) -> None:
    """Let Hydra answer a command line for which `asks_to_show` is true."""
    kept = list(arguments)
    if command in _OWN_ARGUMENTS:
        flags, unknown = get_args_parser().parse_known_args(kept)
        words = [o for o in flags.overrides if "=" not in o and not o.startswith(("~", "+"))]
        kept = [word for word in kept if word not in unknown and word not in words]
    line = CommandLine(command, kept)  # refuses what reseed does not support
    if line.flags.help:
        kept.append(override("hydra.help.header", f"reseed {command}: {COMMANDS[command]}"))
    with _argv(command, kept):
        hydra_main(version_base="1.3", config_path=conf_dir(), config_name=CONFIG_NAME)(_no_task)()


def _no_task(config: DictConfig) -> None:
    """Do nothing: Hydra needs a task even if the command line only shows something."""


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar.

    Raises:
        ReseedError: an override is not written as the grammar requires.
    """
    instance = GlobalHydra.instance()
    # `glob` needs the loader, which knows the options of a group.
    loader = instance.config_loader() if instance.is_initialized() else None
    parser, found = OverridesParser.create(config_loader=loader), []
    for text in overrides:
        try:
            with hydra_errors("the value cannot be read"):
                found += parser.parse_overrides([text])
        except ReseedError as error:
            if "=" not in text and not text.startswith("~"):
                told = f"overrides are KEY=VALUE; got {text}.{_group_with(text)}"
                raise ReseedError(told) from error
            shown = ascii(text)[1:-1] if "\n" in text or "\r" in text else text
            shown = f"{shown[:_SHOWN]}[...]" if len(shown) > _SHOWN else shown
            raise ReseedError(f"{shown}: {error}") from error
    return found


_MOST_JOBS = 100_000
_SHOWN = 200
"""Number of characters of a malformed override that a message repeats."""


class ExpandedJob(NamedTuple):
    """One job of a sweep: its overrides without sweeps, and the same as key → value."""

    overrides: tuple[str, ...]
    values: dict[str, str]


def _group_with(option: str) -> str:
    """Suggest ``comparison=quickstart`` for ``quickstart``: the options of this name."""
    found = sorted(Path(conf_dir()).glob(f"*/{option}.yaml"))
    return f" Did you mean {found[0].parent.name}={option}?" if found else ""


def expand(overrides: Sequence[str]) -> list[ExpandedJob]:
    """Return the jobs of a sweep: all combinations of the values, the last key varying fastest.

    Raises:
        ConfigError: a key is an interval, which has no list of values.
    """
    listed: dict[str, list[str]] = {}
    for o in parse(overrides):
        if o.is_sweep_override() and not o.is_discrete_sweep():
            raise ConfigError(
                f"{{key}} is an interval, which only hydra/sweeper=optuna searches; got "
                f"{o.input_line}",
                o.key_or_group,
            )
        swept = o.is_sweep_override()
        values = o.sweep_string_iterator() if swept else [o.get_value_element_as_str()]
        listed[o.get_key_element()] = few = list(islice(values, _MOST_JOBS + 1))
        if not few:
            raise ConfigError(f"{{key}} lists no values; got {o.input_line}", o.key_or_group)
    if (count := math.prod(map(len, listed.values()))) > _MOST_JOBS:
        raise ConfigError(f"the values make {count:,} jobs; a sweep has at most {_MOST_JOBS:,}")
    return [
        ExpandedJob(tuple(f"{key}={value}" for key, value in job.items()), job)
        for values in product(*listed.values())
        for job in [dict(zip(listed, values, strict=True))]
    ]


def _is_hydras(text: str) -> bool:
    """Return True if an override is of Hydra's own settings."""
    return text.lstrip("+~").startswith(("hydra.", "hydra/", "hydra="))


def sweeps(overrides: Sequence[str]) -> list[str]:
    """Return the keys over which ``overrides`` sweep."""
    return [o.get_key_element() for o in parse(overrides) if o.is_sweep_override()]


def override(key: str, value: object) -> str:
    """Return ``key=value``, with the value quoted where Hydra's grammar requires it."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"[\w./+:%@?-]+", text) or (isinstance(value, str) and _is_no_string(text)):
        # A backslash is special only before a quote, and so at the end.
        text = re.sub(r"(\\*)(')", r"\1\1\\\2", text)
        text = "'" + re.sub(r"(\\+)$", r"\1\1", text) + "'"
    return f"{key}={text}"


@cache
def _is_no_string(word: str) -> bool:
    """Return True if Hydra reads an unquoted word as another value: ``10``, ``null``, ``1e3``."""
    try:
        return OverridesParser.create().parse_override(f"key={word}").value() != word
    except (HydraException, ValueError):
        return True


@contextmanager
def _argv(command: str, arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [f"reseed {command}", *arguments]
    try:
        yield
    finally:
        sys.argv = before
