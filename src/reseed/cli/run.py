"""``reseed run comparison=...``: train what is missing, evaluate the runs where that is asked for,
compare, print and store the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reseed.cli import compare, evaluate, train
from reseed.cli.app import CommandLine
from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.errors import reported

if TYPE_CHECKING:
    from reseed.cli.plan import Plan


def main(arguments: Sequence[str]) -> int:
    return reported(lambda: _main(CommandLine("run", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    if line.only_shows:
        line.show(train.task, arguments)
        return 0
    from reseed.cli.plan import make_plan
    from reseed.experiment import plan_missing

    asked = evaluate.Asked.split_off(line)
    plan = make_plan(line)
    if asked.configs:
        evaluate.refuse_slurm(line)
        asked.check({job.resolved.label: job.resolved for job in plan.jobs})
    if plan.runtime.plan_only and line.launcher[0] == SLURM:
        from reseed.cli.cluster.command import show_plan

        show_plan(line, plan.jobs, plan.runtime)
        return 0
    if plan.runtime.plan_only:
        plan_missing([job.resolved for job in plan.jobs], plan.runtime)
        return 0
    plan.write()
    if line.launcher[0] == SLURM:
        from reseed.cli.cluster.command import launch

        return launch(line, plan.jobs, plan.runtime, plan.sweep, plan.settings)
    launches = [(launch.overrides, launch.jobs) for launch in plan.launches]
    status = train.train_jobs(line, launches, plan.runtime, plan.sweep)
    if asked.configs:
        status = max(status, _evaluate(line, asked, plan))
    return max(status, compare.compare_plan(line, plan))


def _evaluate(line: CommandLine, asked: evaluate.Asked, plan: Plan) -> int:
    """Evaluate the runs that are there; those that failed have been told of."""
    from reseed.cli.subjects import chosen_of

    chosen = chosen_of(plan)
    if not chosen.folders:
        return 0
    return evaluate.evaluate_all(line, asked, chosen, evaluate.targets_of(line, chosen))
