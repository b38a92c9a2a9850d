"""Errors whose messages are for the user, and suggestions of the nearest known name."""

from __future__ import annotations

import difflib
import math
import signal
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from typing import Any


class ReseedError(Exception):
    """An error whose message is for the user; the command line prints it without a traceback."""


class ConfigError(ReseedError, ValueError):
    """An invalid value of a configuration.

    Args:
        message: names the rule and the value, with ``{key}`` in place of the key.
        key: dotted key relative to the object that raised; enclosing objects complete it.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        return self.message.replace("{key}", f"`{self.key}`")

    def within(self, parent: str) -> ConfigError:
        """Return the error with its key prefixed: ``k`` within ``sae`` is ``sae.k``."""
        return ConfigError(self.message, ".".join(part for part in (parent, self.key) if part))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean `x`?`` for the known name nearest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{found[0]}`?" if found else ""


def plugin_error(entry: EntryPoint, cause: str) -> ReseedError:
    """Return the error about an installed package whose entry point cannot be used."""
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "(unknown)"
    return ReseedError(
        f"the installed package {package} cannot be used: its entry point `{entry.name} = "
        f"{entry.value}` in the group {entry.group} fails ({cause}). Mend or uninstall the package"
    )


def check_plain(value: Any, key: str) -> None:
    """Raise `ConfigError` for integers and strings that files, tensors or paths cannot hold."""
    if isinstance(value, int) and not -_INTEGERS <= value < _INTEGERS:
        raise ConfigError(f"{{key}} must be an integer of 64 bits; got {shown(value)}", key)
    if isinstance(value, str) and ("\0" in value or not is_unicode(value)):
        raise ConfigError(
            f"{{key}} must be Unicode text without null characters; got {value!a}", key
        )
    if isinstance(value, tuple | list):
        for item in value:
            check_plain(item, key)


_INTEGERS = 2**63  # integers of 64 bits are below


def is_unicode(text: str) -> bool:
    """Return False for a text with lone surrogates: bytes of the command line that no text has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """Return a value as messages show it; Python refuses to write integers of many digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"an integer of about {int(abs(value).bit_length() * math.log10(2)) + 1:,} digits"
    return repr(value)


class Interrupted(KeyboardInterrupt):
    """The end of a command that a signal requested; raised after everything was saved.

    It is a KeyboardInterrupt, so that callers do not treat it as the failure of one job and start
    the next.

    Args:
        message: names what was saved and how to continue.
        number: number of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number
