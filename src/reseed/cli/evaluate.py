"""``reseed evaluate [RUN|SWEEP|SAE ...] evaluation=...``: evaluate trained SAEs.

Each evaluation is a Hydra job, which evaluates all SAEs; SAEs of the same language model are
evaluated together. Each result is written to the run's folder as soon as it is computed
(`reseed.store.results`); the tables of the sweeps are rewritten at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from reseed.cli.arguments import check_used, find_by_name, runtime_of
from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.errors import run_and_report
from reseed.cli.hydra_app import CommandLine, expand, override, parse
from reseed.cli.plan import Plan, check_jobs, make_plan
from reseed.cli.status import own_words
from reseed.config import build
from reseed.errors import ConfigError, ReseedError
from reseed.evaluate.base import EvaluationConfig
from reseed.experiment import experiment_from
from reseed.experiment.resolve import Resolved, resolve_experiment
from reseed.store.results import FOLDER
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.system.console import counted, say
from reseed.train.config import RuntimeConfig

if TYPE_CHECKING:
    from reseed.study.evaluate import SavedRun

GROUP = "evaluation"
FOLDERS_KEY = "subjects"
"""The key that passes the folders of the SAEs to a job; users do not set it."""


def task(config: DictConfig) -> None:
    """Run one evaluation of all SAEs: the Hydra job."""
    (outcome,) = evaluate_many([config])
    if isinstance(outcome, Exception):
        raise outcome


def evaluate_many(configs: Sequence[DictConfig]) -> list[Any]:
    """Run several evaluations of the same SAEs; a model is opened once for all of them.

    Returns:
        for each configuration None, or the exception with which it failed.
    """
    from reseed.study.evaluate import Evaluator

    each: list[dict[str, Any]] = [OmegaConf.to_container(c, resolve=True) for c in configs]  # type: ignore[misc]
    folders = [Path(folder) for folder in each[0].pop(FOLDERS_KEY)]
    runtime = build(each[0]["runtime"], "runtime", RuntimeConfig)
    evaluator = Evaluator(_saved_runs(folders, runtime, each[0]), runtime)
    return [evaluator.outcome(evaluation_from(values)) for values in each]


task.many = evaluate_many  # type: ignore[attr-defined]  # called by the fused launcher


def evaluation_from(values: Mapping[str, Any]) -> EvaluationConfig:
    """Build the evaluation of a composed configuration.

    Raises:
        ConfigError: no evaluation is named, or its settings are invalid.
    """
    if values[GROUP] is None:
        raise ConfigError(f"{{key}} is required, for example {GROUP}=reconstruction", GROUP)
    return build(values[GROUP], GROUP, EvaluationConfig)


@dataclass(frozen=True)
class RequestedEvaluations:
    """The checked evaluations that a command line requests.

    Attributes:
        overrides: the overrides for Hydra, with sweeps.
        configs: one evaluation per job.
    """

    overrides: tuple[str, ...]
    configs: tuple[EvaluationConfig, ...]

    @classmethod
    def split_off(cls, line: CommandLine) -> RequestedEvaluations:
        """Remove the overrides of evaluations from ``line``, and build these evaluations.

        Raises:
            ReseedError: an evaluation or key does not exist, or a value is invalid.
        """
        with line.composer():
            keys = [o.key_or_group for o in parse(line.overrides)]
        own = [key.partition(".")[0] == GROUP for key in keys]
        own_overrides = [o for o, is_mine in zip(line.overrides, own, strict=True) if is_mine]
        line.overrides = [o for o, is_mine in zip(line.overrides, own, strict=True) if not is_mine]
        with line.composer() as composed:
            each = [composed(job) for job in expand(own_overrides)] if own_overrides else []
        return cls(tuple(own_overrides), tuple(evaluation_from(values) for values in each))

    def check(self, declared: Mapping[str, Resolved]) -> None:
        """Raise `ConfigError` if an evaluation does not apply to an SAE.

        Args:
            declared: the experiments of the SAEs, by name.
        """
        for config in self.configs:
            for name, resolved in declared.items():
                try:
                    config.check(resolved.source)
                except ConfigError as error:
                    raise ConfigError(f"{error.within(GROUP)} ({name})") from error

    def show_in(self, sweeps: Sequence[Sweep]) -> None:
        """Register the evaluations for the sweeps' tables.

        If several share a name, the last is used, with a notice.
        """
        names = [config.name for config in self.configs]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            say(f"tables show {GROUP}={name} with its last settings; the runs' folders hold all "
                "results")  # fmt: skip
        for sweep in sweeps:
            sweep.add_evaluations({config.name: config for config in self.configs})


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    from reseed.study.collect import collect_evaluated

    words, rest = own_words(arguments)
    line = CommandLine("evaluate", rest)
    asked = RequestedEvaluations.split_off(line)
    if not asked.configs:
        raise ConfigError(
            f"{{key}} is required, for example {GROUP}=reconstruction,faithfulness", GROUP
        )
    chosen = select_runs(words, line)
    for told in unfinished_lines(chosen.lacking):
        say(told)
    saved = runs_of(line, chosen)
    submits = line.launcher[0] == SLURM
    status = (submit_all if submits else evaluate_all)(line, asked, chosen, saved)
    if status is None:
        return 0
    collect_evaluated(saved, chosen.sweeps, asked.configs)
    return 1 if chosen.lacking else status


def submit_all(
    line: CommandLine,
    asked: RequestedEvaluations,
    chosen: SelectedRuns,
    saved: Sequence[SavedRun],
) -> int | None:
    """Submit the evaluations of a sweep's runs to SLURM, a task for each model and evaluation.

    Returns:
        as `reseed.cli.cluster.command.evaluate_on_cluster`.

    Raises:
        ConfigError: the chosen SAEs are not the runs of exactly one sweep.
    """
    from reseed.cli.cluster.command import evaluate_on_cluster

    own = {run.path.resolve() for sweep in chosen.sweeps for run in sweep.runs()}
    if len(chosen.sweeps) != 1 or not {folder.resolve() for folder in chosen.folders} <= own:
        raise ConfigError(
            f"{{key}}={SLURM} evaluates the runs of exactly one sweep, whose folder records the "
            f"submitted jobs; got {counted(len(chosen.sweeps), 'sweep')} and "
            f"{counted(len(chosen.folders), 'SAE')}",
            "hydra/launcher",
        )
    asked.check({run.id: run.resolved for run in saved})
    asked.show_in(chosen.sweeps)
    return evaluate_on_cluster(line, chosen.runtime, chosen.sweeps[0], saved, asked.configs)


def runs_of(line: CommandLine, chosen: SelectedRuns) -> list[SavedRun]:
    """Return the chosen SAEs with the experiments they were trained in.

    Raises:
        ReseedError: the model or data of a run is missing or has changed.
    """
    with line.composer() as composed:
        values = composed(_handed_on(line, chosen))
    return _saved_runs(chosen.folders, chosen.runtime, values)


def evaluate_all(
    line: CommandLine,
    asked: RequestedEvaluations,
    chosen: SelectedRuns,
    saved: Sequence[SavedRun],
) -> int:
    """Check the evaluations, launch one job for each, and print the failures.

    Returns:
        the exit status: 1 if an evaluation failed.
    """
    asked.check({run.id: run.resolved for run in saved})
    asked.show_in(chosen.sweeps)
    place = (chosen.sweeps[0].path if chosen.sweeps else chosen.folders[0]) / FOLDER
    listed = ",".join(override("", folder.absolute())[1:] for folder in chosen.folders)
    own = [f"++{FOLDERS_KEY}=[{listed}]", override("hydra.sweep.dir", place)]
    overrides = [*map(_forced, asked.overrides), *_handed_on(line, chosen), *own]
    errors = line.launch(task, overrides, multirun=True)
    for error in errors:
        say(f"failed: {error}")
    return 1 if errors else 0


def _forced(text: str) -> str:
    """Prefix an evaluation's override with ``++``, so that the key need not exist.

    Hydra first composes a multirun without its axes, and so without an evaluation. The keys have
    been checked already.
    """
    return f"++{text}" if text.startswith(f"{GROUP}.") else text


def _handed_on(line: CommandLine, chosen: SelectedRuns) -> list[str]:
    """Return the overrides that the jobs need; runs record what they were trained on."""
    if not chosen.are_runs:
        return list(line.overrides)
    return [o for o in line.overrides if o.lstrip("+~").startswith(("runtime", "hydra"))]


def _saved_runs(
    folders: Sequence[Path], runtime: RuntimeConfig, values: Mapping[str, Any]
) -> list[SavedRun]:
    """Return the SAEs in folders; ``values`` declares the experiment of SAEs that are not runs."""

    from reseed.study.evaluate import saved_run

    def declared() -> Resolved:
        return resolve_experiment(experiment_from({**values, GROUP: None})[0], runtime)

    return [saved_run(folder, runtime, declared) for folder in folders]


@dataclass(frozen=True)
class SelectedRuns:
    """The SAEs that a command line chooses.

    Attributes:
        folders: the folders of the available SAEs.
        lacking: one line for each run that is not finished, with its state.
        sweeps: the sweeps whose tables get the results.
    """

    runtime: RuntimeConfig
    folders: tuple[Path, ...]
    lacking: tuple[str, ...] = ()
    sweeps: tuple[Sweep, ...] = field(default=())

    @property
    def are_runs(self) -> bool:
        """True if every folder is a run, whose record says what it was trained on."""
        return all(Run(folder).exists for folder in self.folders)


def select_runs(words: Sequence[str], line: CommandLine) -> SelectedRuns:
    """Find the SAEs that a command line names.

    Args:
        words: folders and names; if empty, the overrides of ``line`` declare the runs.

    Raises:
        ReseedError: no SAE is available, or a word names nothing.
    """
    if words:
        found = _named(words, line)
    elif any(o.partition("=")[0] == "comparison" for o in line.overrides):
        found = _of_comparison(line)
    else:
        found = _declared(line)
    if not found.folders:
        missing = "; ".join(found.lacking)
        raise ReseedError(f"there is nothing to evaluate: no run is finished ({missing})")
    return found


def _of_comparison(line: CommandLine) -> SelectedRuns:
    plan = make_plan(line)
    found = select_comparison_runs(plan)
    if found.folders:
        plan.write()
    return found


def select_comparison_runs(plan: Plan) -> SelectedRuns:
    """Return the finished runs of a comparison."""
    return replace(_finished(plan.runs, plan.runtime), sweeps=(plan.sweep,))


def _declared(line: CommandLine) -> SelectedRuns:
    jobs, runtime = check_jobs(line, line.overrides, multirun=True)
    runs = {job.resolved.signature: job.resolved.run(RunStore(runtime.outputs)) for job in jobs}
    return _finished(list(runs.values()), runtime)


def _named(words: Sequence[str], line: CommandLine) -> SelectedRuns:
    runtime = runtime_of(line)
    runs: dict[Path, Run] = {}
    saes: list[Path] = []
    sweeps: list[Sweep] = []
    for word in words:
        meant = find_by_name(word, runtime)
        if isinstance(meant, Sweep):
            sweeps.append(meant)
            runs |= {run.path: run for run in meant.runs()}
        elif isinstance(meant, Run):
            runs[meant.path] = meant
        else:
            saes.append(meant)
    found = _finished(list(runs.values()), runtime)
    if not saes:
        check_used(line, ("wait",) if line.launcher[0] == SLURM else ())
    return replace(found, folders=(*found.folders, *saes), sweeps=tuple(sweeps))


def _finished(runs: Sequence[Run], runtime: RuntimeConfig) -> SelectedRuns:
    lacking = tuple(f"{run.id}: {_state(run)}" for run in runs if not run.finished)
    return SelectedRuns(runtime, tuple(run.path for run in runs if run.finished), lacking)


def _state(run: Run) -> str:
    words = {"missing": "not trained"}
    failure = run.failure
    return f"failed ({failure['message']})" if failure else words.get(run.status, run.status)


def unfinished_lines(lacking: Sequence[str]) -> list[str]:
    """Return the message lines about runs that are not finished."""
    if not lacking:
        return []
    return [
        f"not evaluated, because not finished: {counted(len(lacking), 'run')}",
        *(f"  {x}" for x in lacking),
    ]
