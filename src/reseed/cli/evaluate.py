"""``reseed evaluate [RUN|SWEEP|SAE ...] evaluation=...``: what an SAE costs, and what it hides.

Each evaluation is a Hydra job. One job evaluates all SAEs, those of one language model together;
each result is in its run's folder as soon as it is there (`reseed.evaluations`), and the tables of
the sweeps are made anew at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from reseed.cli.app import CommandLine, expand, override, parse
from reseed.cli.cluster.settings import NAME as SLURM
from reseed.cli.errors import reported
from reseed.cli.status import own_words
from reseed.config import ConfigError
from reseed.console import counted

if TYPE_CHECKING:
    from reseed.cli.subjects import Chosen, Target
    from reseed.evaluate.base import EvaluationConfig
    from reseed.experiment import Resolved
    from reseed.sweeps import Sweep
    from reseed.train.config import RuntimeConfig

GROUP = "evaluation"
SUBJECTS = "subjects"
"""The key by which a job is told the folders of its SAEs; no option of the user's."""


def task(config: DictConfig) -> None:
    """Evaluate SAEs in one way: the Hydra job."""
    (outcome,) = evaluate_many([config])
    if isinstance(outcome, Exception):
        raise outcome


def evaluate_many(configs: Sequence[DictConfig]) -> list[Any]:
    """Evaluate the same SAEs in several ways; a model is opened once for all of them.

    Returns:
        for each configuration None, or the exception with which it failed.
    """
    from reseed.cli.evaluating import Bench
    from reseed.config import build
    from reseed.train.config import RuntimeConfig

    each: list[dict[str, Any]] = [OmegaConf.to_container(c, resolve=True) for c in configs]  # type: ignore[misc]
    folders = [Path(folder) for folder in each[0].pop(SUBJECTS)]
    runtime = build(each[0]["runtime"], "runtime", RuntimeConfig)
    bench = Bench(_targets(folders, runtime, each[0]), runtime)
    return [bench.outcome(evaluation_from(values)) for values in each]


task.many = evaluate_many  # type: ignore[attr-defined]  # what the fused launcher calls


def evaluation_from(values: Mapping[str, Any]) -> EvaluationConfig:
    """The evaluation of a composed configuration.

    Raises:
        ConfigError: none is named, or it is wrong.
    """
    from reseed.config import build
    from reseed.evaluate.base import EvaluationConfig

    if values[GROUP] is None:
        raise ConfigError(f"{{key}} is required, for example {GROUP}=reconstruction", GROUP)
    return build(values[GROUP], GROUP, EvaluationConfig)


@dataclass(frozen=True)
class Asked:
    """The evaluations that a command line asks for, checked.

    Attributes:
        overrides: what Hydra is given, with sweeps.
        configs: one for each job.
    """

    overrides: tuple[str, ...]
    configs: tuple[EvaluationConfig, ...]

    @classmethod
    def split_off(cls, line: CommandLine) -> Asked:
        """Take what is about evaluations out of the overrides of ``line``.

        Raises:
            ReseedError: there is no such evaluation or key, or a value is wrong.
        """
        with line.composer():
            keys = [o.key_or_group for o in parse(line.overrides)]
        own = [key.partition(".")[0] == GROUP for key in keys]
        mine = [o for o, is_mine in zip(line.overrides, own, strict=True) if is_mine]
        line.overrides = [o for o, is_mine in zip(line.overrides, own, strict=True) if not is_mine]
        with line.composer() as composed:
            each = [composed(job) for job in expand(mine)] if mine else []
        return cls(tuple(mine), tuple(evaluation_from(values) for values in each))

    def check(self, declared: Mapping[str, Resolved]) -> None:
        """Raise `ConfigError` where an SAE cannot be evaluated so.

        Args:
            declared: what SAEs were trained on, by their names.
        """
        for config in self.configs:
            for name, resolved in declared.items():
                try:
                    config.check(resolved)
                except ConfigError as error:
                    raise ConfigError(f"{error.within(GROUP)} ({name})") from error

    def show_in(self, sweeps: Sequence[Sweep]) -> None:
        """The tables of these sweeps shall have them; of one name the last, and that is said."""
        from reseed.console import say

        names = [config.name for config in self.configs]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            say(f"tables show {GROUP}={name} with the last settings; all are in runs' folders")
        for sweep in sweeps:
            sweep.ask_for({config.name: config for config in self.configs})


def main(arguments: Sequence[str]) -> int:
    return reported(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    words, rest = own_words(arguments)
    line = CommandLine("evaluate", rest)
    if line.only_shows:
        line.show(task, rest)
        return 0
    asked = Asked.split_off(line)
    from reseed.cli.collect import collect_evaluated
    from reseed.cli.subjects import chosen_by, of_lacking
    from reseed.console import say

    if not asked.configs:
        raise ConfigError(
            f"{{key}} is required, for example {GROUP}=reconstruction,faithfulness", GROUP
        )
    chosen = chosen_by(words, line)
    for told in of_lacking(chosen.lacking):
        say(told)
    targets = targets_of(line, chosen)
    submits = line.launcher[0] == SLURM
    status = (submit_all if submits else evaluate_all)(line, asked, chosen, targets)
    if status is None:
        return 0
    collect_evaluated(targets, chosen.sweeps, asked.configs)
    return 1 if chosen.lacking else status


def submit_all(
    line: CommandLine, asked: Asked, chosen: Chosen, targets: Sequence[Target]
) -> int | None:
    """Submit the evaluations of a sweep's runs to SLURM, a task for each model and evaluation.

    Returns:
        as `reseed.cli.cluster.command.evaluate`.

    Raises:
        ConfigError: what was named is not one sweep.
    """
    own = {run.path.resolve() for sweep in chosen.sweeps for run in sweep.runs()}
    if len(chosen.sweeps) != 1 or not {folder.resolve() for folder in chosen.folders} <= own:
        raise ConfigError(
            f"{{key}}={SLURM} evaluates the runs of one sweep, in whose folder it is written what "
            f"was submitted; got {counted(len(chosen.sweeps), 'sweep')} and "
            f"{counted(len(chosen.folders), 'SAE')}",
            "hydra/launcher",
        )
    from reseed.cli.cluster import command

    asked.check({target.id: target.resolved for target in targets})
    asked.show_in(chosen.sweeps)
    return command.evaluate(line, chosen.runtime, chosen.sweeps[0], targets, asked.configs)


def targets_of(line: CommandLine, chosen: Chosen) -> list[Target]:
    """The SAEs that were chosen, with what they were trained on.

    Raises:
        ReseedError: that is not there, or not what it was.
    """
    with line.composer() as composed:
        values = composed(_handed_on(line, chosen))
    return _targets(chosen.folders, chosen.runtime, values)


def evaluate_all(line: CommandLine, asked: Asked, chosen: Chosen, targets: Sequence[Target]) -> int:
    """Check, then launch the evaluations of SAEs, one job for each; say what failed.

    Returns:
        the exit status: 1 where something could not be evaluated.
    """
    from reseed.console import say
    from reseed.evaluations import FOLDER

    asked.check({target.id: target.resolved for target in targets})
    asked.show_in(chosen.sweeps)
    place = (chosen.sweeps[0].path if chosen.sweeps else chosen.folders[0]) / FOLDER
    listed = ",".join(override("", folder.absolute())[1:] for folder in chosen.folders)
    own = [f"++{SUBJECTS}=[{listed}]", override("hydra.sweep.dir", place)]
    overrides = [*map(_forced, asked.overrides), *_handed_on(line, chosen), *own]
    errors = line.launch(task, overrides, multirun=True)
    for error in errors:
        say(f"failed: {error}")
    return 1 if errors else 0


def _forced(text: str) -> str:
    """An override that needs no key to be there: Hydra composes a multirun without its axes first,
    and so without an evaluation. That the keys are there has been checked."""
    return f"++{text}" if text.startswith(f"{GROUP}.") else text


def _handed_on(line: CommandLine, chosen: Chosen) -> list[str]:
    """The overrides that the jobs need: runs say themselves what they were trained on."""
    if not chosen.are_runs:
        return list(line.overrides)
    return [o for o in line.overrides if o.lstrip("+~").startswith(("runtime", "hydra"))]


def _targets(
    folders: Sequence[Path], runtime: RuntimeConfig, values: Mapping[str, Any]
) -> list[Target]:
    """The SAEs in folders; of those that are no runs ``values`` declares what they are for."""
    from reseed.cli.jobs import experiment_from
    from reseed.cli.subjects import target_of
    from reseed.experiment import resolve_experiment

    def declared() -> Resolved:
        return resolve_experiment(experiment_from({**values, GROUP: None})[0], runtime)

    return [target_of(folder, runtime, declared) for folder in folders]
