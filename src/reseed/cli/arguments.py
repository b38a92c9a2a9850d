"""Arguments of the commands that are not Hydra's: parsers of flags, and look-up of named runs,
sweeps and SAEs. Loads no torch, so that help and `reseed status` are fast."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from reseed.cli.hydra_app import CommandLine
from reseed.config import build
from reseed.errors import ConfigError, ReseedError, did_you_mean
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.train.config import RuntimeConfig

SAE_FORMATS = ("reseed", "sparsify", "saelens", "dictionary_learning", "gemma_scope")
REPORT_FORMATS = ("html", "md", "tex")
_SAE_FILE = "sae.json"  # `reseed.sae.checkpoint.DESCRIPTION_FILE`, whose module loads torch


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `ConfigError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def convert_parser() -> Parser:
    """Return the parser of ``reseed convert``."""
    made = Parser(
        "reseed convert",
        description="Convert an SAE to another library's format.",
        allow_abbrev=False,
    )
    made.add_argument("source", help="a folder, a file, or hub:OWNER/NAME[@revision][/path]")
    made.add_argument("out", help="the folder to create")
    made.add_argument("--to", required=True, choices=SAE_FORMATS, help="the format to write")
    made.add_argument("--format", help="format of the source; by default found from its files")
    made.add_argument("--revision", help="revision of a source on the hub")
    return made


def push_parser() -> Parser:
    """Return the parser of ``reseed push``."""
    made = Parser(
        "reseed push",
        description="Push a trained SAE to the hub, with a card that describes it.",
        allow_abbrev=False,
    )
    made.add_argument("run", help="a run's folder")
    made.add_argument("repo", help="OWNER/NAME on the hub; created if necessary")
    made.add_argument("--to", default="reseed", choices=SAE_FORMATS, help="the format to write")
    made.add_argument("--path", default="", help="folder in the repository; by default its root")
    made.add_argument("--private", action="store_true", help="create a private repository")
    made.add_argument("--dry-run", metavar="OUT", help="write to the folder OUT, push nothing")
    return made


def report_parser() -> Parser:
    """Return the parser of the flags of ``reseed report``."""
    made = Parser("reseed report", add_help=False, allow_abbrev=False)
    made.add_argument("--format", default="html", choices=REPORT_FORMATS)
    made.add_argument("--out")
    return made


def check_parser() -> Parser:
    """Return the parser of the flags of ``reseed check``."""
    made = Parser("reseed check", add_help=False, allow_abbrev=False)
    made.add_argument("--latents")
    made.add_argument("--out")
    made.add_argument("--train", action="store_true")
    return made


def runtime_of(line: CommandLine) -> RuntimeConfig:
    """Build the runtime settings, which name the folders of runs and sweeps."""
    with line.composer() as composed:
        values = composed(line.overrides)
    return build(values["runtime"], "runtime", RuntimeConfig)


def find_by_name(word: str, runtime: RuntimeConfig) -> Run | Sweep | Path:
    """Find a run, a sweep, or the folder of another SAE by path, name, or the name's beginning.

    Raises:
        ReseedError: nothing matches, or several names do.
    """
    for folder in (Path(word), Path(runtime.outputs) / word, Path(runtime.sweeps) / word):
        if Run(folder).exists:
            return Run(folder)
        if (folder / "manifest.jsonl").is_file():
            return Sweep(folder)
        if folder.is_dir() and _has_sae(folder):
            return folder
    known: dict[str, Run | Sweep] = {run.id: run for run in RunStore(runtime.outputs).runs()}
    sweeps = Path(runtime.sweeps).glob("*/manifest.jsonl")
    known |= {path.parent.name: Sweep(path.parent) for path in sorted(sweeps)}
    if name := complete_name(word, known):
        return known[name]
    raise ReseedError(
        f"there is no run, sweep or SAE {word}: no such folder, and nothing of that name in "
        f"{runtime.outputs}/ and {runtime.sweeps}/.{did_you_mean(word, known)}"
    )


def find_sweep(word: str, root: Path) -> Sweep:
    """Return the sweep that a word names: a folder, a name under ``root``, or its beginning.

    Raises:
        ReseedError: no sweep matches, or several do.
    """
    for folder in (Path(word), root / word):
        if (folder / "manifest.jsonl").is_file():
            return Sweep(folder)
    names = sorted(p.parent.name for p in root.glob("*/manifest.jsonl"))
    if name := complete_name(word, names):
        return Sweep(root / name)
    raise ReseedError(f"there is no sweep {word} in {root}/.{did_you_mean(word, names)}")


def complete_name(word: str, names: Iterable[str]) -> str | None:
    """Return the name that starts with ``word``, or None.

    Raises:
        ReseedError: several names start with it.
    """
    found = [name for name in names if name.startswith(word)]
    if len(found) > 1:
        raise ReseedError(f"{word} may be any of {', '.join(found)}: give more of the name")
    return found[0] if found else None


def _has_sae(folder: Path) -> bool:
    return (folder / _SAE_FILE).is_file()


def check_used(line: CommandLine, also: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for overrides that a command on named runs would ignore.

    Args:
        also: keys that the command uses besides those of ``runtime`` and ``hydra``.
    """
    for text in line.overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key.partition(".")[0].partition("/")[0] not in ("runtime", "hydra", *also):
            raise ConfigError(
                f"{{key}} cannot be set for named runs and sweeps: their records say what they "
                f"were trained on; got {text}",
                key,
            )
