"""Parsers of the arguments that are not Hydra's. Loads nothing heavy, so that help is fast."""

from __future__ import annotations

import argparse
from typing import NoReturn

from reseed.errors import ConfigError

SAE_FORMATS = ("reseed", "sparsify", "saelens", "dictionary_learning", "gemma_scope")
REPORT_FORMATS = ("html", "md", "tex")


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
    made.add_argument("--path", default="", help="folder in the repository; by default its top")
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
