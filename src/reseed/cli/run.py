"""``reseed run comparison=...``: train what is missing, compare, print and store the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reseed.cli import compare, train, tune
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
    if tune.searches(line):
        return tune.tune(line, trial)
    from reseed.cli.plan import make_plan

    plan = make_plan(line)
    if plan.runtime.plan_only:
        train.show_plan(line, plan.jobs, plan.runtime)
        return 0
    plan.write()
    if line.launcher[0] == SLURM:
        from reseed.cli.cluster.command import launch

        return launch(line, plan.jobs, plan.runtime, plan.sweep, plan.settings)
    return _train_and_compare(line, plan)


def _train_and_compare(line: CommandLine, plan: Plan) -> int:
    launches = [(launch.overrides, launch.jobs) for launch in plan.launches]
    status = train.train_jobs(line, launches, plan.runtime, plan.sweep)
    return max(status, compare.compare_plan(line, plan))


def trial(overrides: Sequence[str], names: Sequence[str]) -> list[float]:
    """Run the comparison that the overrides declare; some numbers of its summary.

    Raises:
        ReseedError: it has several cells, or a run failed.
    """
    import pandas as pd

    from reseed.cli.plan import make_plan
    from reseed.config import ReseedError

    line = CommandLine("run", list(overrides))
    plan = make_plan(line)
    plan.write()
    if _train_and_compare(line, plan):
        raise ReseedError("a run of this trial failed; nothing further is tried")
    rows = pd.read_csv(plan.sweep.path / "summary.csv").to_dict("records")
    if len(rows) != 1:
        raise ReseedError(
            f"objective={names[0]} needs a comparison with one cell; it has {len(rows)}: give each "
            "axis but that of the pairs one value (sae=topk)"
        )
    return tune.of_summary({str(key): value for key, value in rows[0].items()}, names)
