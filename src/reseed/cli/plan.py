"""From the overrides of a command line to a checked `Plan`.

`check_jobs` composes and checks every job before the first one starts. `make_plan` does so for the
grid of a comparison with the user's overrides, and for the runs of ``reseed train``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.hydra_app import CommandLine, ExpandedJob, expand, override, parse, sweeps
from reseed.cli.hydra_jobs import executor_of
from reseed.compare.config import ComparisonConfig
from reseed.config import build
from reseed.errors import ConfigError
from reseed.evaluate.base import EvaluationConfig
from reseed.experiment.resolve import resolved_from
from reseed.study.evaluate import check_evaluations
from reseed.study.plan import Job, Launch, Plan, check_pairs, without_repeats
from reseed.study.study import Study
from reseed.study.train import plan_missing
from reseed.system.console import say
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

GROUP = "evaluation"
_LOCAL = ("fused", "basic", "joblib", "submitit_local")
_SILENT_JOBS, _SILENT_SECONDS = 20, 1.0  # beyond both, the check is announced


def check_jobs(
    line: CommandLine, overrides: Sequence[str], multirun: bool
) -> tuple[list[Job], RuntimeConfig]:
    """Compose and check every job before the first one starts.

    Returns:
        the jobs, whose `Job.axes` hold every key that is given, and the runtime that they share.

    Raises:
        ConfigError: a job is invalid; the message names the job if there are several.
    """
    swept = sweeps(overrides)
    if swept and not multirun:
        raise ConfigError(
            f"`{swept[0]}` lists several values: add -m to sweep over them "
            f"(reseed {line.command} -m ...)"
        )
    found: list[Job] = []
    runtime: RuntimeConfig | None = None
    with line.composer() as composed:
        each = expand(overrides) if multirun else [ExpandedJob(tuple(overrides), {})]
        said, start = len(each) <= _SILENT_JOBS, time.monotonic()
        for job in each:
            if not said and time.monotonic() - start > _SILENT_SECONDS:
                say(f"checking {len(each)} jobs")
                said = True
            try:
                resolved, runtime = resolved_from(composed(job.overrides))
            except ConfigError as error:
                own = [f"{key}={job.values[key]}" for key in swept]
                where = f" (in the job {' '.join(own)})" if len(each) > 1 else ""
                raise ConfigError(str(error) + where) from error
            found.append(Job(job.overrides, resolved, job.values))
    assert runtime is not None
    for warning in dict.fromkeys(filter(None, (job.resolved.warning for job in found))):
        say(warning)
    given = [o for o in overrides if o.partition("=")[0] == "source"]
    if given and not any(job.resolved.pretrained for job in found):
        raise ConfigError(f"{{key}} needs sae=pretrained; got {given[0]}", "source")
    if line.launcher[0] in _LOCAL:  # a cluster's node may have a device that this machine lacks
        pick_device(runtime.device)
    if not runtime.wait and line.launcher[0] != SLURM:
        raise ConfigError(
            f"{{key}}=false needs hydra/launcher={SLURM}: with other launchers the command itself "
            "does the work",
            "wait",
        )
    return found, runtime


def study_of(
    line: CommandLine,
    plan: Plan,
    evaluations: Sequence[EvaluationConfig] = (),
    progress: Callable[[str], None] | None = None,
) -> Study:
    """Return the study of a plan, to be worked on as ``hydra/launcher=`` says.

    Raises:
        ConfigError: an evaluation does not apply to a run.
    """
    check_evaluations(evaluations, {one.label: one for one in plan.experiments})
    return Study(
        plan,
        evaluations,
        parse_evaluations=lambda words: evaluations_of(line, words),
        executor=executor_of(line),
        progress=progress,
    )


def take_evaluations(line: CommandLine) -> list[EvaluationConfig]:
    """Remove the overrides of evaluations from ``line``, and build these evaluations.

    Raises:
        ReseedError: an evaluation or key does not exist, or a value is invalid.
    """
    with line.composer():
        keys = [o.key_or_group for o in parse(line.overrides)]
    own = [key.partition(".")[0] == GROUP for key in keys]
    overrides = [o for o, is_mine in zip(line.overrides, own, strict=True) if is_mine]
    line.overrides = [o for o, is_mine in zip(line.overrides, own, strict=True) if not is_mine]
    return evaluations_of(line, overrides)


def evaluations_of(line: CommandLine, words: Sequence[str]) -> list[EvaluationConfig]:
    """Build the evaluations that names and overrides declare: one for each value of a sweep.

    Raises: see `take_evaluations`.
    """
    names = [word for word in words if "=" not in word]
    given = [word for word in words if word.startswith(f"{GROUP}=")]
    if names and given:
        raise ConfigError(f"give names or {{key}}=, not both; got {names[0]} and {given[0]}", GROUP)
    overrides = [*([f"{GROUP}={','.join(names)}"] if names else []),
                 *(word for word in words if "=" in word)]  # fmt: skip
    with line.composer() as composed:
        each = [composed(job.overrides) for job in expand(overrides)] if overrides else []
    return [_evaluation(values) for values in each]


def _evaluation(values: Mapping[str, Any]) -> EvaluationConfig:
    if values[GROUP] is None:
        raise ConfigError(f"{{key}} is required, for example {GROUP}=reconstruction", GROUP)
    return build(values[GROUP], GROUP, EvaluationConfig)


def show_plan(line: CommandLine, plan: Plan) -> None:
    """Print the runs that would be trained or, with hydra/launcher=slurm, submitted."""
    from reseed.cli.cluster.command import show_cluster_plan

    if line.launcher[0] == SLURM:
        show_cluster_plan(line, plan)
    else:
        plan_missing(plan.experiments, plan.runtime)


def plan_runs(line: CommandLine) -> Plan:
    """Build the plan of runs that are trained and not compared."""
    multirun = line.multirun or line.launcher[0] == SLURM
    jobs, runtime = check_jobs(line, line.overrides, line.multirun)
    launch = Launch(tuple(replace(job, axes={}) for job in jobs), tuple(line.overrides))
    return Plan((launch,), runtime, multirun=multirun, command=line.command_text)


def make_plan(line: CommandLine) -> Plan:
    """Build the comparison that the command line names, and check all of its jobs.

    Raises:
        ConfigError: the command line names no comparison, or a job is invalid.
    """
    with line.composer():
        parsed = parse(line.overrides)
    given = [(o.key_or_group, text, o) for o, text in zip(parsed, line.overrides, strict=True)]
    swept = {key: list(o.sweep_string_iterator()) for key, _, o in given if o.is_sweep_override()}
    single = {key: [text.partition("=")[2]] for key, text, _ in given if key not in swept}
    with line.composer() as composed:
        node = composed([text for key, text, _ in given if key not in swept]).get("comparison")
    if node is None:
        raise ConfigError("{key} is required, for example comparison=quickstart", "comparison")
    axes = node.get("grid")
    if not isinstance(axes, dict):
        got = "nothing" if axes == "???" else repr(axes)
        rule = "must map axes to lists of values, as in {sae: [topk, relu], seed: [0, 1]}"
        raise ConfigError(f"{{key}} {rule}; got {got}", "comparison.grid")
    # The user's values replace those of a declared axis; a sweep over another key adds an axis.
    said = single | swept
    grid = {str(axis): said.get(axis, _words(values)) for axis, values in axes.items()}
    arms = _arms(node.get("arms"), said)
    own = {axis for entries in _mappings(arms) for axis in entries}
    grid |= {axis: values for axis, values in swept.items() if axis not in own}
    settings = build({**node, "grid": grid, "arms": arms}, "comparison", ComparisonConfig)
    settings.check_primary()
    _check_heeded(settings, said)
    launches, runtime = [], None
    for arm in settings.each_arm():
        for key, text, _ in given:
            if key in arm.grid and text[0] in "+~":
                rule = f"{{key}} is an axis: give its values as {key}=...; got {text}"
                raise ConfigError(rule, key)
        # A swept key that is an axis only in another arm is no axis here.
        taken = {*arm.grid, *arm.fixed, *swept}
        overrides = [text for key, text, _ in given if key not in taken]
        overrides += [f"{key}={word}" for key, word in arm.fixed.items()]
        overrides += [f"{axis}={','.join(words)}" for axis, words in arm.grid.items()]
        try:
            jobs, runtime = check_jobs(line, overrides, multirun=True)
        except ConfigError as error:
            where = f" (in the arm {arm.name!r})" if arm.name else ""
            raise ConfigError(str(error) + where) from error
        named = {"arm": arm.name} if arm.name else {}
        placed = [
            replace(job, axes=named | {axis: job.axes[axis] for axis in arm.grid}) for job in jobs
        ]
        launches.append(Launch(without_repeats(arm, placed), tuple(overrides), arm))
        check_pairs(launches[-1], settings)
    assert runtime is not None
    return Plan(tuple(launches), runtime, settings, command=line.command_text)


def _check_heeded(settings: ComparisonConfig, said: dict[str, list[str]]) -> None:
    """Raise `ConfigError` if every arm fixes a key that the user gave."""
    arms = settings.each_arm()
    for key in said:
        if all(key in arm.fixed for arm in arms):
            names = ", ".join(arm.name for arm in arms)
            raise ConfigError(
                f"{{key}} is fixed by every arm of comparison={settings.name} ({names}), so giving "
                "it changes nothing: use another comparison (comparison=seeds) or a copy of this",
                key,
            )


def _arms(declared: Any, said: dict[str, list[str]]) -> Any:
    """Return the arms with their values as command-line words.

    The user's values replace those of an arm's axis, but not a value that an arm fixes. Anything
    that is not a mapping is returned unchanged; `build` then raises the error.
    """
    if not isinstance(declared, dict):
        return declared
    arms: dict[str, Any] = {str(name): entries for name, entries in declared.items()}
    for name, entries in arms.items():
        if not isinstance(entries, dict):
            continue
        arms[name] = {
            str(key): value
            if key == "pair_by" or isinstance(value, dict)
            else said.get(key, _words(value))
            if isinstance(value, list | tuple)
            else _word(value)
            for key, value in entries.items()
        }
    return arms


def _mappings(arms: Any) -> list[dict[str, Any]]:
    """Return the arms that are mappings."""
    values = arms.values() if isinstance(arms, dict) else ()
    return [entries for entries in values if isinstance(entries, dict)]


def _words(values: Any) -> list[str]:
    """Return the values of an axis as command-line words."""
    listed: Sequence[Any] = values if isinstance(values, list | tuple) else [values]
    return [_word(value) for value in listed]


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(_word(item) for item in value)}]"
    return override("", value)[1:]
