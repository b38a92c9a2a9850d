"""The environment of a run: versions, machine, commit and command. It is recorded, but runs are not
compared by it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from reseed import __version__ as VERSION
from reseed.errors import ConfigError

_PACKAGES = ("torch", "lightning", "transformers", "datasets", "numpy", "scipy", "hydra-core")


def environment() -> dict[str, Any]:
    """Return the environment of the current command."""
    command = _command.get() or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {**_of_process(), "command": command}  # one process may run several commands


_command: ContextVar[str] = ContextVar("command", default="")


@contextmanager
def record_command(command: str) -> Iterator[None]:
    """Let `environment` name this command instead of the process's arguments: one process may run
    several commands, or none (a notebook)."""
    token = _command.set(command)
    try:
        yield
    finally:
        _command.reset(token)


@contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables; the previous ones are back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


CACHE_VARIABLE = "RESEED_CACHE"
"""Environment variable that names the folder of derived data, unless runtime.cache does."""


def derived_folder(chosen: str | None) -> Path:
    """Return the folder of derived data: the chosen one, that of the environment, or ~/.cache.

    Raises:
        ConfigError: it is in a home folder, which is unknown.
    """
    named = chosen or os.environ.get(CACHE_VARIABLE)
    folder = (
        Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "reseed")
    )
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{{key}} is needed, because the home folder of {folder} is unknown: set it, or "
            f"{CACHE_VARIABLE}, to a folder for derived data",
            "runtime.cache",
        ) from None


@contextmanager
def derived_data(folder: Path) -> Iterator[Path]:
    """Yield the folder of derived data; an error of reading or writing there names the remedy."""
    try:
        yield folder
    except OSError as error:
        where = Path(os.path.abspath(error.filename)) if isinstance(error.filename, str) else None
        own = Path(os.path.abspath(folder))
        if where is None or not (where.is_relative_to(own) or own.is_relative_to(where)):
            raise
        raise ConfigError(
            f"{{key}}: the folder of derived data, {folder}, cannot be used ({where}: "
            f"{error.strerror}). Set it, or {CACHE_VARIABLE}, to a folder that can be written",
            "runtime.cache",
        ) from error


@cache
def _of_process() -> dict[str, Any]:
    versions = {"reseed": VERSION}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the commit of the checkout that contains the code, with ``+`` if files changed."""
    here = Path(__file__).parent
    try:
        arguments = {"cwd": here, "capture_output": True, "text": True, "timeout": 10}
        # An installation may lie inside another repository, whose commit is unrelated.
        tracked = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, check=True, **arguments)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **arguments).stdout
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], check=True, **arguments
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")
