"""``reseed power SWEEP``: tell from a pilot how many seeds and tokens a difference needs."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.cli.arguments import check_used, own_words, power_parser, sweep_called
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError, ReseedError


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    from reseed.report.terminal import print_tables
    from reseed.study.result import read_result

    given, rest = power_parser().parse_known_args(list(arguments))
    words, rest = own_words(rest)
    line = CommandLine("power", rest)
    if len(words) != 1:
        got = ", ".join(words) or "none"
        raise ConfigError(f"reseed power takes one sweep, the pilot; got {got}")
    check_used(line)
    sweep = sweep_called(words[0], line)
    if not sweep.compared:
        raise ReseedError(
            f"{sweep.path}: its runs have not been compared, so no spread over seeds is known: "
            "run `reseed compare` with the overrides of the sweep first"
        )
    found = read_result(sweep).power(**vars(given))
    print_tables(found.tables, title=sweep.path.name, whole=True)
    return 0
