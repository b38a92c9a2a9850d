"""``reseed evaluate [RUN|SWEEP|SAE ...] evaluation=...``: evaluate trained SAEs.

SAEs of the same language model are evaluated together. Each result is written to the run's folder
as soon as it is computed (`reseed.store.results`); the sweeps' tables are rewritten at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from reseed.cli.arguments import check_used, own_words, runtime_of
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine
from reseed.cli.hydra_jobs import executor_of
from reseed.cli.plan import GROUP, make_plan, plan_runs, take_evaluations
from reseed.cli.print_results import print_evaluations
from reseed.errors import ConfigError
from reseed.evaluate.base import EvaluationConfig
from reseed.experiment.resolve import Resolved, resolved_from
from reseed.study.evaluate import check_evaluations, evaluate_saved, show_evaluations
from reseed.study.selection import Selection, select_named, select_planned
from reseed.system.console import counted, say


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    words, rest = own_words(arguments)
    line = CommandLine("evaluate", rest)
    evaluations = take_evaluations(line)
    if not evaluations:
        raise ConfigError(
            f"{{key}} is required, for example {GROUP}=reconstruction,faithfulness", GROUP
        )
    selected = select(words, line)
    selected.check()
    for told in selected.unfinished_lines():
        say(told)
    saved, sweeps = selected.saved, selected.sweeps
    if line.launcher[0] == SLURM:
        status = _submit(line, selected, evaluations)
        if status is None:
            return 0
    else:
        execute = executor_of(line).evaluate
        errors = evaluate_saved(saved, evaluations, sweeps, selected.runtime, execute)
        for error in errors:
            say(f"failed: {error}")
        status = 1 if errors else 0
    print_evaluations(saved, sweeps, evaluations)
    return 1 if selected.lacking else status


def select(words: Sequence[str], line: CommandLine) -> Selection:
    """Select the SAEs that words name; without words, those that the overrides declare.

    Raises:
        ReseedError: a word names nothing.
    """
    if words:
        selected = select_named(words, runtime_of(line), lambda: _declared(line))
        if all(one.is_run for one in selected.saved):
            check_used(line, ("wait",) if line.launcher[0] == SLURM else ())
        return selected
    if any(o.partition("=")[0] == "comparison" for o in line.overrides):
        plan = make_plan(line)
        selected = select_planned(plan)
        if selected.saved:
            plan.write()
        return selected
    line.multirun = True
    return select_planned(plan_runs(line))


def _declared(line: CommandLine) -> Resolved:
    """Return the experiment that the overrides declare, for SAEs that are not runs."""
    with line.composer() as composed:
        resolved, _ = resolved_from(composed(line.overrides))
    if resolved.warning:
        say(resolved.warning)
    return resolved


def _submit(
    line: CommandLine, selected: Selection, evaluations: Sequence[EvaluationConfig]
) -> int | None:
    """Submit the evaluations of a sweep's runs to SLURM, a task for each model and evaluation.

    Returns:
        as `reseed.cli.cluster.command.evaluate_on_cluster`.

    Raises:
        ConfigError: the chosen SAEs are not the runs of exactly one sweep.
    """
    from reseed.cli.cluster.command import evaluate_on_cluster

    own = {run.path.resolve() for sweep in selected.sweeps for run in sweep.runs()}
    folders = {one.folder.resolve() for one in selected.saved}
    if len(selected.sweeps) != 1 or not folders <= own:
        raise ConfigError(
            f"{{key}}={SLURM} evaluates the runs of exactly one sweep, whose folder records the "
            f"submitted jobs; got {counted(len(selected.sweeps), 'sweep')} and "
            f"{counted(len(folders), 'SAE')}",
            "hydra/launcher",
        )
    check_evaluations(evaluations, {one.id: one.resolved for one in selected.saved})
    show_evaluations(evaluations, selected.sweeps)
    sweep = selected.sweeps[0]
    return evaluate_on_cluster(line, selected.runtime, sweep, selected.saved, evaluations)
