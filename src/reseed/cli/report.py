"""``reseed report SWEEP``: write a report to a folder, computed only from the sweep's files."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.cli.arguments import own_words, report_parser, sweep_called
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError, ReseedError
from reseed.system.console import say


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    from reseed.study.result import read_result

    given, rest = report_parser().parse_known_args(list(arguments))
    words, rest = own_words(rest)
    line = CommandLine("report", rest)
    if len(words) != 1:
        got = ", ".join(words) or "none"
        raise ConfigError(f"reseed report takes one sweep; got {got}")
    sweep = sweep_called(words[0], line)
    if not sweep.compared:
        raise ReseedError(
            f"{sweep.path}: its runs have not been compared, so there is nothing to report: run "
            "`reseed compare` with the overrides of the sweep first"
        )
    say(str(read_result(sweep).report(given.format, given.out)))
    return 0
