"""``reseed run comparison=...``: train what is missing, compare, print and store the tables."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.cli import compare, train
from reseed.cli.app import CommandLine
from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.errors import reported


def main(arguments: Sequence[str]) -> int:
    return reported(lambda: _main(CommandLine("run", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    if line.only_shows:
        line.show(train.task, arguments)
        return 0
    from reseed.cli.plan import make_plan

    plan = make_plan(line)
    if plan.runtime.plan_only:
        train.show_plan(line, plan.jobs, plan.runtime)
        return 0
    plan.write()
    if line.launcher[0] == SLURM:
        from reseed.cli.cluster.command import launch

        return launch(line, plan.jobs, plan.runtime, plan.sweep, plan.settings)
    launches = [(launch.overrides, launch.jobs) for launch in plan.launches]
    status = train.train_jobs(line, launches, plan.runtime, plan.sweep)
    return max(status, compare.compare_plan(line, plan))
