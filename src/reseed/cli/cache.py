"""``reseed cache``: list the activations cached on disk, or remove them with ``--clear``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from reseed.activations.cache import ActivationCache
from reseed.cli.arguments import runtime_of
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError, ReseedError
from reseed.system.console import counted, print_rows, say
from reseed.system.files import user_path

CLEAR = "--clear"
"""The only flag that is not Hydra's; a following word that is not an override selects entries."""
COLUMNS = ("activations", "used", "chunks", "size", "")


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(list(arguments)))


def _main(arguments: list[str]) -> int:
    pattern, rest = _cleared(arguments)
    line = CommandLine("cache", rest)

    runtime = runtime_of(line)
    if not runtime.activation_cache:
        raise ReseedError(
            "there is no activation cache: set its folder with runtime.activation_cache=FOLDER"
        )
    folder = user_path(runtime.activation_cache)
    if not folder.is_dir():
        raise ConfigError(f"{{key}}: there is no folder {folder}", "runtime.activation_cache")
    if pattern is None:
        print_cache(folder, runtime.activation_cache_gib)
    else:
        clear(folder, pattern)
    return 0


def _cleared(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the pattern of the entries to remove, or None, and Hydra's arguments."""
    rest: list[str] = []
    patterns: list[str] = []
    words = iter(arguments)
    for word in words:
        name, given, pattern = word.partition("=")
        if name != CLEAR:
            rest.append(word)
        elif given:
            patterns.append(pattern)
        else:
            after = next(words, None)
            named = after is not None and "=" not in after and not after.startswith("-")
            patterns.append(str(after) if named else "*")
            rest += [after] if after is not None and not named else []
    if len(patterns) > 1:
        raise ConfigError(f"give {CLEAR} only once; got {len(patterns)}")
    if patterns == [""]:
        raise ConfigError(f"{CLEAR}= needs a pattern; {CLEAR} alone removes everything")
    return (patterns[0] if patterns else None), rest


def print_cache(folder: Path, gib: float) -> None:
    """Print every entry with its number of chunks, size and time of last use."""
    found = ActivationCache(folder, 0).stored()
    if not found:
        say(f"no activations in {folder}/")
        return
    total = _size(sum(entry.size for entry in found))
    title = f"{counted(len(found), 'set')} of activations in {folder}/: {total} of {gib:g} GiB"
    rows = [
        (
            entry.path.name,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)),
            f"{len(entry.chunks):,}",
            _size(entry.size),
            "in use" if entry.in_use else "",
        )
        for entry in found
    ]
    print_rows(rows, title, COLUMNS, ("activations", "used", ""))


def clear(folder: Path, pattern: str) -> None:
    """Remove the entries whose name matches, and print them.

    Raises:
        ConfigError: the folder holds something else, so it is not a cache.
    """
    cache = ActivationCache(folder, 0)
    if foreign := cache.foreign():
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ConfigError(
            f"{{key}} (={folder}) is not a cache of activations alone: it holds {foreign[0]}{more}"
            ". Nothing was removed",
            "runtime.activation_cache",
        )
    removed, kept = cache.clear(pattern)
    for entry in removed:
        chunks = counted(len(entry.chunks), "chunk")
        say(f"removed {entry.path.name} ({chunks}, {_size(entry.size)})")
    for entry in kept:
        say(f"kept {entry.path.name}: in use")
    if not removed and not kept:
        what = "" if pattern == "*" else f" have `{pattern}` in their name"
        say(f"nothing to remove: no activations in {folder}/{what}")


def _size(size: float) -> str:
    """Format a size in bytes as ``12.3 MiB`` or ``1.2 GiB``."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
