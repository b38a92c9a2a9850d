"""The environment of a run: versions, machine, commit and command, which are recorded, but do not
distinguish runs; environment variables and the limit of open files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
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
from reseed.errors import ReseedError

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
        arguments = {"cwd": here, "capture_output": True, "timeout": 10, "encoding": "utf-8",
                     "errors": "replace"}  # fmt: skip
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


_SPARE_FILES = 24
"""Number of files that a command may open in addition to its locks and the files open already."""


def allow_open_files(count: int, what: str) -> None:
    """Raise this process's limit of open files if ``count`` more may not fit.

    Args:
        what: the reason for the message, for example ``a group of 60 runs``.

    Raises:
        ReseedError: the hard limit, which only the system's administrator can raise, is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        now = len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux
        now = 32
    needed = now + count + _SPARE_FILES
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or needed <= soft:
        return
    if hard != unlimited and needed > hard:
        raise ReseedError(
            f"{what} needs {needed:,} open files, but the system allows this process {hard:,}: "
            f"raise the limit with `ulimit -n {needed}` (as root, or in limits.conf), or request "
            "fewer runs at a time"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == unlimited else hard, hard))
