"""Interface to Hydra: composing, expanding and launching the jobs of a sub-command.

Every job is composed and checked before the first one starts and before anything is written, so
errors appear at once and in reseed's own words (`errors`).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reseed.cli import COMMANDS
from reseed.cli.config_loader import about_missing, load_once
from reseed.cli.errors import describe_error
from reseed.errors import ConfigError, ReseedError

CONFIG_NAME = "config"
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
            # An arm's overrides (`dataset.order_seed: ${seed}`) are resolved in each of its runs.
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
        os.environ["HYDRA_FULL_ERROR"] = "1"  # only `errors.run_and_report` prints errors
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


def asks_to_show(arguments: Sequence[str]) -> bool:
    """Return True if a command line only asks for help, configuration or completion."""
    # Flags and words of the command itself (``--format md SWEEP``) are unknown to Hydra.
    f, _ = get_args_parser().parse_known_args(list(arguments))
    return bool(f.help or f.hydra_help or f.cfg or f.info or f.shell_completion)


_OWN_ARGUMENTS = ("cache", "cancel", "check", "evaluate", "report", "show", "status")
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
