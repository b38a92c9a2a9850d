"""``reseed run comparison=...``: train the missing runs, evaluate them if requested, compare them,
and write and print the tables."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from reseed.cli import compare, evaluate, train, tune
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.evaluate import select_comparison_runs
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import Plan, make_plan
from reseed.errors import ReseedError


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(CommandLine("run", arguments), arguments))


def _main(line: CommandLine, arguments: Sequence[str]) -> int:
    from reseed.cli.cluster.command import run_on_cluster

    if tune.searches(line):
        return tune.tune(line, trial)
    asked = evaluate.RequestedEvaluations.split_off(line)
    plan = make_plan(line)
    if asked.configs:
        asked.check({job.resolved.label: job.resolved for job in plan.jobs})
    if plan.runtime.plan_only:
        train.show_plan(line, plan.jobs, plan.runtime)
        return 0
    plan.write()
    if line.launcher[0] == SLURM:
        asked.show_in((plan.sweep,))
        return run_on_cluster(
            line, plan.jobs, plan.runtime, plan.sweep, plan.settings, evaluations=asked.configs
        )
    return _train_and_compare(line, plan, asked)


def _train_and_compare(line: CommandLine, plan: Plan, asked: evaluate.RequestedEvaluations) -> int:
    launches = [(launch.overrides, launch.jobs) for launch in plan.launches]
    status = train.train_jobs(line, launches, plan.runtime, plan.sweep)
    if asked.configs:
        status = max(status, _evaluate(line, asked, plan))
    return max(status, compare.compare_plan(line, plan))


def _evaluate(line: CommandLine, asked: evaluate.RequestedEvaluations, plan: Plan) -> int:
    """Evaluate the finished runs; the caller has reported the failed ones."""
    chosen = select_comparison_runs(plan)
    if not chosen.folders:
        return 0
    return evaluate.evaluate_all(line, asked, chosen, evaluate.runs_of(line, chosen))


def trial(overrides: Sequence[str], names: Sequence[str]) -> list[float]:
    """Run the comparison that the overrides declare, and return the named numbers of its summary.

    Raises:
        ReseedError: the comparison has several cells, or a run failed.
    """
    line = CommandLine("run", list(overrides))
    asked = evaluate.RequestedEvaluations.split_off(line)
    plan = make_plan(line)
    plan.write()
    if _train_and_compare(line, plan, asked):
        raise ReseedError("a run of this trial failed, so the search stops")
    rows = pd.read_csv(plan.sweep.path / "summary.csv").to_dict("records")
    if len(rows) != 1:
        raise ReseedError(
            f"objective={names[0]} needs a comparison with one cell; got {len(rows)}: give each "
            "axis except the paired one a single value (sae=topk)"
        )
    return tune.of_summary({str(key): value for key, value in rows[0].items()}, names)
