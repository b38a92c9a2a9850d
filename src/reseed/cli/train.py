"""``reseed train``: train one SAE, or with -m a sweep. Finished runs are not trained again."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.cli import tune
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.cli.hydra_jobs import executor_of
from reseed.cli.plan import plan_runs, show_plan
from reseed.errors import ReseedError
from reseed.study.train import train_plan
from reseed.system.console import say


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(CommandLine("train", arguments)))


def _main(line: CommandLine) -> int:
    from reseed.cli.cluster.command import run_on_cluster

    if tune.searches(line):
        return tune.tune(line, trial)
    plan = plan_runs(line)
    if plan.runtime.plan_only:
        show_plan(line, plan)
        return 0
    if line.launcher[0] == SLURM:
        plan.write()
        return run_on_cluster(line, plan)
    executor = executor_of(line)
    executor.check(plan)
    failures = train_plan(plan, executor.train)
    for message in failures:
        say(message)
    return 1 if failures else 0


def trial(overrides: Sequence[str], names: Sequence[str]) -> list[float]:
    """Train the runs that the overrides declare, and return the means of the named metrics.

    Raises:
        ReseedError: a run failed.
    """
    line = CommandLine("train", ["-m", *overrides])
    plan = plan_runs(line)
    if failures := train_plan(plan, executor_of(line).train):
        raise ReseedError("\n".join([*failures, "a run of this trial failed: the search stops"]))
    return tune.of_runs([run.metrics for run in plan.runs], names)
