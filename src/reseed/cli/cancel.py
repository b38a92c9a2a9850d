"""``reseed cancel SWEEP``: cancel the SLURM jobs of a sweep. Saved results are kept."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.cli import status
from reseed.cli.cluster.command import cancel_sweep
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.errors import ConfigError
from reseed.system.console import counted, say


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    words, rest = status.own_words(arguments)
    line = CommandLine("cancel", rest)
    if len(words) != 1:
        got = ", ".join(words) or "nothing"
        raise ConfigError(f"reseed cancel takes one sweep (`reseed status` lists them); got {got}")
    sweep = status.sweep_called(words[0], line)
    ids = cancel_sweep(sweep)
    if ids:
        say(f"cancelled {counted(len(ids), 'job')} of {sweep.path}: {', '.join(ids)}")
    else:
        say(f"{sweep.path}: no job is queued or running")
    return 0
