"""Arguments of the commands that are not Hydra's: flags and words. Loads no torch, so that help and
`reseed status` are fast."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from reseed.cli.hydra_app import CommandLine
from reseed.config import build
from reseed.errors import ConfigError
from reseed.store.find import find_sweep
from reseed.store.sweeps import Sweep
from reseed.train.config import RuntimeConfig

SAE_FORMATS = ("reseed", "sparsify", "saelens", "dictionary_learning", "gemma_scope")
REPORT_FORMATS = ("html", "md", "tex")


_TAKE_A_WORD = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp",
                "--package", "-p", "--info", "-i", "--cfg", "-c")  # fmt: skip
"""Hydra's flags that take a value."""


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


def power_parser() -> Parser:
    """Return the parser of the flags of ``reseed power``."""
    made = Parser(
        "reseed power",
        usage="reseed power SWEEP [FLAG VALUE ...] [runtime.sweeps=FOLDER]",
        description="Tell from a pilot how many seeds and tokens a difference needs.",
        allow_abbrev=False,
    )
    made.add_argument(
        "--difference", type=float, default=0.05, help="true difference of two rows; 0.05"
    )
    made.add_argument(
        "--power", type=float, default=0.8, help="probability of seeing this difference; 0.8"
    )
    made.add_argument(
        "--confidence", type=float, help="level of test and intervals; the comparison's, 0.95"
    )
    made.add_argument(
        "--measure", default="", help="a fraction of docs/measures.md; the primary measure"
    )
    made.add_argument(
        "--tokens",
        type=_integers,
        default=(),
        help="budgets to predict, as in 4_000_000,8e6; 2 and 4 times the largest",
    )
    made.add_argument(
        "--differences", type=int, default=1, help="differences that are tested together; 1"
    )
    return made


def _integers(text: str) -> tuple[int, ...]:
    """Read ``4_000_000,8e6``."""
    try:
        values = [float(word) for word in text.split(",")]
        if not all(value.is_integer() for value in values):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers, as in 4_000_000,8e6; got {text!r}"
        ) from None
    return tuple(map(int, values))


def check_parser() -> Parser:
    """Return the parser of the flags of ``reseed check``."""
    made = Parser("reseed check", add_help=False, allow_abbrev=False)
    made.add_argument("--latents")
    made.add_argument("--out")
    made.add_argument("--train", action="store_true")
    return made


def runtime_of(line: CommandLine) -> RuntimeConfig:
    """Build the runtime settings, which name the folders of runs and sweeps.

    Raises:
        ConfigError: a flag or setting of Hydra would change nothing.
    """
    hydras = [o for o in line.overrides if o.lstrip("+~").startswith(("hydra.", "hydra/"))]
    if line.command != "evaluate" and (hydras or line.multirun):
        given = "-m" if line.multirun else hydras[0]
        raise ConfigError(f"`reseed {line.command}` starts no jobs; got {given}")
    with line.composer() as composed:
        values = composed(line.overrides)
    return build(values["runtime"], "runtime", RuntimeConfig)


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


def own_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into words that are neither flags nor overrides, and the rest."""
    words, rest = [], []
    for before, word in zip(("", *arguments), arguments, strict=False):
        plain = "=" not in word and not word.startswith(("-", "~", "+"))
        (words if plain and before not in _TAKE_A_WORD else rest).append(word)
    return words, rest


def sweep_called(word: str, line: CommandLine) -> Sweep:
    """Return the sweep under runtime.sweeps that a word names."""
    return find_sweep(word, Path(runtime_of(line).sweeps))
