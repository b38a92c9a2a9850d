"""``reseed run comparison=...``: train the missing runs, evaluate them if requested, compare them,
and write and print the tables."""

from __future__ import annotations

from collections.abc import Sequence

from reseed.cli import tune
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import make_plan, show_plan, study_of, take_evaluations
from reseed.cli.print_results import print_result
from reseed.errors import ReseedError
from reseed.study.evaluate import show_evaluations
from reseed.study.result import StudyResult


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(CommandLine("run", arguments)))


def _main(line: CommandLine) -> int:
    from reseed.cli.cluster.command import run_on_cluster

    if tune.searches(line):
        return tune.tune(line, trial)
    evaluations = take_evaluations(line)
    plan = make_plan(line)
    study = study_of(line, plan, evaluations)
    if plan.runtime.plan_only:
        show_plan(line, plan)
        return 0
    if line.launcher[0] == SLURM:
        plan.write()
        show_evaluations(evaluations, (plan.sweep,))
        return run_on_cluster(line, plan, evaluations)
    result = study.run()
    print_result(result)
    return 0 if result.complete else 1


def trial(overrides: Sequence[str], names: Sequence[str]) -> list[float]:
    """Run the comparison that the overrides declare, and return the named numbers of its summary.

    Raises:
        ReseedError: the comparison has several cells, or a run failed.
    """
    line = CommandLine("run", list(overrides))
    evaluations = take_evaluations(line)
    result = study_of(line, make_plan(line), evaluations).run()
    print_result(result)
    if not result.complete:
        raise ReseedError("a run of this trial failed, so the search stops")
    return tune.of_summary(_only_row(result, names[0]), names)


def _only_row(result: StudyResult, name: str) -> dict[str, object]:
    rows = result.summary.to_dict("records")
    if len(rows) != 1:
        raise ReseedError(
            f"objective={name} needs a comparison with one cell; got {len(rows)}: give each "
            "axis except the paired one a single value (sae=topk)"
        )
    return {str(key): value for key, value in rows[0].items()}
