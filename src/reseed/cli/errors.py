"""Error messages for the user: one message, no traceback, a non-zero exit status."""

from __future__ import annotations

import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from reseed.errors import ConfigError, Interrupted, ReseedError, did_you_mean


def run_and_report(job: Callable[[], int | None]) -> int:
    """Run ``job`` and print its error, if it raises one.

    Returns:
        0, or what the job returned; 1 for an error of reseed's or of the configuration; 130 or 143
        if SIGINT (Ctrl-C) or SIGTERM ended the job. Any other exception is a defect of reseed: it
        is printed with its traceback, and the status is 1.
    """
    try:
        with _terminable():
            return job() or 0
    except ReseedError as error:
        return _say(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _say(describe_error(error))
    except OSError as error:
        which = f"read or write {error.filename}" if error.filename else "read or write"
        return _say(f"cannot {which}: {error.strerror or error}")
    except MemoryError as error:
        return _say(f"not enough memory: {error}")
    except KeyboardInterrupt as stop:
        return interrupted(stop)
    except Exception:
        traceback.print_exc()
        return _say("this is a defect of reseed: please report it with the traceback above")


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end the command at once: files are written atomically, so none is incomplete.

    Training installs its own handler, which saves first.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        message = (
            f"stopped by {name}; saved results are kept. The same command continues from here."
        )
        raise Interrupted(message, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(stop: KeyboardInterrupt) -> int:
    """Print that a signal ended the command, and return its exit status (128 + signal)."""
    what = str(stop) or "interrupted; saved results are kept. The same command continues from here."
    print(what, file=sys.stderr)
    return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)


_LONGEST = 1_500
"""Number of characters of a message; a value in it may be longer."""


def _say(message: str) -> int:
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST - 300]} [...] {message[-300:]}"
    print(f"error: {printable(message)}", file=sys.stderr)
    return 1


def printable(text: str) -> str:
    """Return the text with control characters and lone surrogates escaped; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def describe_error(error: Exception, about: Callable[[MissingKey], str] = str) -> str:
    """Return an error of Hydra or OmegaConf as one line.

    Args:
        about: makes the message for a key that does not exist.
    """
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = ", ".join(sorted(error.options))
        return (
            f"`{group}` has no option `{option}`.{did_you_mean(option, error.options)} "
            f"Options: {options}."
        )
    missing = MissingKey.of(error)
    if missing:
        return about(missing)
    sweep = re.search(r"Ambiguous value for argument '(.*?)'", text)
    if sweep:
        return f"`{sweep[1]}` lists several values: add -m to sweep over them"
    mandatory = re.search(r"Missing mandatory value: (\S+)", text)
    if mandatory:
        return f"`{mandatory[1]}` is required: give it a value"
    return join_lines(text)


def join_lines(error: object) -> str:
    """Return a text of several lines as one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


@contextmanager
def hydra_errors(what: str, about: Callable[[MissingKey], str] = str) -> Iterator[None]:
    """Raise `ReseedError` for the errors that a wrong override or yaml file causes in Hydra.

    Hydra and its yaml reader have no message for some of them: ``sae=null``, an integer of 5,000
    digits, lists that are nested too deeply, a binary file.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ReseedError(describe_error(error, about)) from error
    except RecursionError as error:
        raise ConfigError(f"{what}: a value is nested too deeply") from error
    except YAMLError as error:
        raise ConfigError(f"{what}: {join_lines(error)}") from error
    except OSError as error:
        raise ConfigError(f"{what}: {error.filename}: {error.strerror}") from error
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {join_lines(error) or type(error).__name__}") from error


@dataclass(frozen=True)
class MissingKey:
    """A key that does not exist.

    Attributes:
        key: the key as given, extended by the offending entry if the given value is a mapping.
        parent: the part of the key that exists; may be empty.
        name: the entry that ``parent`` does not have.
    """

    key: str
    parent: str
    name: str

    def __str__(self) -> str:
        return f"there is no key `{self.key}`."

    @classmethod
    def of(cls, error: Exception) -> MissingKey | None:
        """Return the missing key that an error of Hydra or OmegaConf is about, or None."""
        told = re.search(r"Could not override '([^']*)'", str(error))
        given = told[1] if told else ""
        # Only OmegaConf's part of the error says how much of the key exists.
        inner = re.search(
            r"Key '(.*)' is not in struct\s+full_key: (.*)", f"{error}\n{error.__cause__}"
        )
        if inner:
            name, full = inner[1], inner[2].strip()
            parent = full.removesuffix(name).removesuffix(".")
            return cls(given if given.startswith(full) else full, parent, name)
        if not given:
            return None
        parent, _, name = given.rpartition(".")
        return cls(given, parent, name)
