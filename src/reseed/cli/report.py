"""``reseed report SWEEP``: write a report to a folder, computed only from the sweep's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reseed.cli.arguments import report_parser
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.cli.status import own_words, sweep_called
from reseed.compare.config import ComparisonConfig
from reseed.errors import ConfigError, ReseedError
from reseed.store.sweeps import Sweep
from reseed.system.console import say

if TYPE_CHECKING:
    from reseed.study.collect import SweepResults


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    from reseed.study.collect import REPORT, gather, report_of, write_numbers

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
    found = gather(sweep, ComparisonConfig.from_dict(sweep.settings, "comparison"))
    if not (sweep.path / "summary.csv").is_file():  # compared but not collected yet
        write_numbers(sweep, found)
    own = REPORT if given.format == "html" else f"{REPORT}-{given.format}"
    out = Path(given.out) if given.out else sweep.path / own
    say(f"{report_of(sweep, found, drawn(sweep, found), out, given.format)}")
    return 0


def drawn(sweep: Sweep, found: SweepResults) -> list[str]:
    """Return the names of the sweep's figures, after plotting the missing ones into its folder."""
    from reseed.report.figures import save_figures
    from reseed.report.page.write import figure_drawings

    made = figure_drawings(found.cells, found.runs)
    lacking = {name: draw for name, draw in made.items() if not _is_there(sweep.path, name)}
    save_figures(lacking, sweep.path)
    return list(made)


def _is_there(folder: Path, name: str) -> bool:
    return all((folder / f"{name}.{kind}").is_file() for kind in ("svg", "png"))
