"""The environment of a run: versions, machine, commit and command, which are recorded, but do not
distinguish runs; environment variables and the limit of open files.

No record holds a secret: `mask_words` and `mask_command` replace it by ``***`` in what is recorded,
while the command itself keeps it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from reseed import __version__ as VERSION
from reseed.errors import ConfigError, ReseedError

_PACKAGES = ("torch", "lightning", "transformers", "datasets", "numpy", "scipy", "hydra-core")
MASK = "***"
_SECRET = (
    r"key|secret|passw|passphrase|(?<![a-z])(?:pass|pwd)(?![a-z])|credential"
    r"|token(?!s|i[sz]|_field)"
)
# `training.tokens` is a number, `dataset.token_field` names a column; `HF_TOKENS` is a variable of
# the environment.
_NAME = re.compile(rf"(?i:{_SECRET})|TOKEN")
_PAIR = re.compile(
    r"""([\w.-]+)(["']?\s*[:=]\s*)("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'"""
    r"""|\[[^\]]*\]|[^,;&"'{}\[\]]+)"""
)
_VALUES = re.compile(
    r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user and password of an address
    r"|(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|(?<=Bearer )\S+"
)
"""Values that are secret by their form: tokens of the usual services, and JSON web tokens."""


def mask_words(words: Sequence[str]) -> list[str]:
    """Replace secrets among the words of a command, such as overrides, by `MASK`.

    Masked are values whose key contains KEY, TOKEN, SECRET or PASSWORD, those of
    ``hydra.job.env_set``, the word after a flag with such a name, and values that have the form of
    a token or hold a password (``https://user:password@host``).
    """
    found = []
    follows = False
    for word in words:
        found.append(MASK if follows and not word.startswith("-") else _mask_word(word))
        follows = word.startswith("-") and "=" not in word and is_secret(word)
    return found


def mask_command(command: str) -> str:
    """Replace secrets in a command line by `MASK`."""
    try:
        words = shlex.split(command)
    except ValueError:  # version 0.1 recorded words without quotes
        return " ".join(mask_words(command.split(" ")))
    masked = mask_words(words)
    return command if masked == words else shlex.join(masked)


def mask_values(value: Any, key: str = "") -> Any:
    """Replace secrets in nested values of a configuration by `MASK`."""
    if isinstance(value, Mapping):
        return {name: mask_values(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask_values(inner, key) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    if is_secret(key):
        return MASK
    return _mask_word(value) if isinstance(value, str) else value


def is_secret(key: str) -> bool:
    """Return True if the name of a setting or variable says that its value is secret."""
    return "env_set" in key or _NAME.search(key) is not None


def _mask_word(word: str) -> str:
    key, equals, value = word.partition("=")
    if equals and (is_secret(key) or "env_set" in value):
        return f"{key}={MASK}"

    def masked(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}{MASK}" if is_secret(found[1]) else found[0]

    return _VALUES.sub(MASK, key + equals + _PAIR.sub(masked, value) if equals else word)


def environment() -> dict[str, Any]:
    """Return the environment of the current command, without its secrets."""
    command = _command.get() or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    # A process may run several commands, with different numbers of threads.
    return {**_of_process(), **_arithmetic(), "command": mask_command(command)}


def _arithmetic() -> dict[str, Any]:
    """Return what decides how sums are rounded on the CPU, besides the versions: torch's number of
    threads and its vector instructions; None for a process that has not loaded torch."""
    torch: Any = sys.modules.get("torch")  # loading it here would delay commands that only read
    if torch is None:
        return {"threads": None, "vector_instructions": None}
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"threads": torch.get_num_threads(), "vector_instructions": instructions}


def cpu_name() -> str:
    """Return the name of the CPU's type, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


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
        "cpu": cpu_name(),
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
