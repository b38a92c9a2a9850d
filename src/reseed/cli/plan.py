"""Checked jobs of a command line, and the plan of a comparison.

`check_jobs` composes and checks every job before the first one starts. `make_plan` does so for the
grid of a comparison with the user's overrides.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reseed.cli.cluster.queue import NAME as SLURM
from reseed.cli.hydra_app import CommandLine, expand, override, parse, sweeps
from reseed.compare.config import Arm, ComparisonConfig, pair_axes
from reseed.config import build
from reseed.errors import ConfigError
from reseed.experiment.resolve import Resolved, resolved_from
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.system.console import say
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

_LOCAL = ("fused", "basic", "joblib", "submitit_local")
_SILENT_JOBS, _SILENT_SECONDS = 20, 1.0  # beyond both, the check is announced


@dataclass(frozen=True)
class Job:
    """One job of a command: its overrides and the experiment that they declare."""

    overrides: tuple[str, ...]
    resolved: Resolved

    def value(self, axis: str) -> str:
        """Return the value that this job's overrides give for ``axis``, as text."""
        found = [o.partition("=")[2] for o in self.overrides if o.partition("=")[0] == axis]
        return found[-1]


def check_jobs(
    line: CommandLine, overrides: Sequence[str], multirun: bool
) -> tuple[list[Job], RuntimeConfig]:
    """Compose and check every job before the first one starts.

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
        each = expand(overrides) if multirun else [list(overrides)]
        said, start = len(each) <= _SILENT_JOBS, time.monotonic()
        for job in each:
            if not said and time.monotonic() - start > _SILENT_SECONDS:
                say(f"checking {len(each)} jobs")
                said = True
            try:
                resolved, runtime = resolved_from(composed(job))
            except ConfigError as error:
                own = [o for o in job if o.partition("=")[0] in swept]
                where = f" (in the job {' '.join(own)})" if len(each) > 1 else ""
                raise ConfigError(str(error) + where) from error
            found.append(Job(tuple(job), resolved))
    assert runtime is not None
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


@dataclass(frozen=True)
class Launch:
    """One arm of a comparison (or a whole comparison without arms), as Hydra launches it.

    Attributes:
        arm: the arm's axes and its paired axes.
        overrides: the overrides given to Hydra with -m for all jobs.
        jobs: one job per run.
    """

    arm: Arm
    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]

    @property
    def places(self) -> list[dict[str, str]]:
        """The values of the arm and its axes for each job."""
        arm = {"arm": self.arm.name} if self.arm.name else {}
        return [arm | {axis: job.value(axis) for axis in self.arm.grid} for job in self.jobs]


@dataclass(frozen=True)
class Plan:
    """A checked comparison with all of its jobs.

    Attributes:
        settings: the comparison, with grid and arms after the user's overrides.
        launches: one launch per arm.
    """

    settings: ComparisonConfig
    launches: tuple[Launch, ...]
    runtime: RuntimeConfig

    @property
    def jobs(self) -> list[Job]:
        """All jobs, one per run and arm."""
        return [job for launch in self.launches for job in launch.jobs]

    @property
    def store(self) -> RunStore:
        return RunStore(self.runtime.outputs)

    @property
    def runs(self) -> list[Run]:
        """The distinct runs."""
        found = {job.resolved.signature: job.resolved.run(self.store) for job in self.jobs}
        return list(found.values())

    def write(self) -> None:
        """Write the manifest and the settings into the comparison's folder."""
        places = [place for launch in self.launches for place in launch.places]
        self.sweep.write_manifest(self.jobs, self.store, places)
        self.sweep.write_settings(self.settings.to_dict())

    @property
    def sweep(self) -> Sweep:
        signatures = [job.resolved.signature for job in self.jobs]
        return Sweep.of(self.runtime.sweeps, self.settings.name, signatures, self.settings.signed())


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
        launches.append(Launch(arm, tuple(overrides), tuple(_without_repeats(arm, jobs))))
        _check_pairs(launches[-1], settings)
    assert runtime is not None
    return Plan(settings, tuple(launches), runtime)


def _without_repeats(arm: Arm, jobs: Sequence[Job]) -> list[Job]:
    """Drop repeats of a pretrained SAE in a cell: without a seed, it is the same run each time."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for job in jobs:
        place = (*(job.value(axis) for axis in arm.cell_axes), job.resolved.signature)
        if job.resolved.pretrained is None or place not in seen:
            kept.append(job)
        seen.add(place)
    return kept


def _check_pairs(launch: Launch, settings: ComparisonConfig) -> None:
    """Raise `ConfigError` if runs of a cell cannot be compared, or are the same run."""
    arm = launch.arm
    key = f"comparison.arms.{arm.name}.pair_by" if arm.name else "comparison.pair_by"
    cells: dict[tuple[str, ...], list[Job]] = {}
    for job in launch.jobs:
        cells.setdefault(tuple(job.value(axis) for axis in arm.cell_axes), []).append(job)
    for jobs in cells.values():
        if len(jobs) == 1 and jobs[0].resolved.pretrained:
            raise ConfigError(
                f"{{key}} leaves sae=pretrained alone in its cell: it is one SAE, whatever the "
                f"{' and '.join(pair_axes(arm.pair_by))}. Pair it with others by source, or by "
                "[sae,seed]",
                key,
            )
        seen: dict[str, Job] = {}
        for i, job in enumerate(jobs):
            for apart in (x for x in jobs[:i] if x.resolved.d_in != job.resolved.d_in):
                _check_tokens(arm, apart, job, settings, key)
            other = seen.setdefault(job.resolved.signature, job)
            if other is not job:
                raise ConfigError(
                    f"{{key}} pairs a run with itself: {_place(arm, other)} and "
                    f"{_place(arm, job)} are the same run",
                    key,
                )


def _check_tokens(arm: Arm, first: Job, other: Job, settings: ComparisonConfig, key: str) -> None:
    """Raise `ConfigError` if two runs of different `d_in` cannot be compared on the same tokens."""
    from reseed.study.compare import token_mismatch

    reason = token_mismatch([first.resolved.identity, other.resolved.identity])
    if not reason and not settings.activation_tokens:
        reason = "comparison.activation_tokens=0 switches that off"
    if not reason:
        return
    said = [f"{_place(arm, job)} ({job.resolved.model_label})" for job in (first, other)]
    raise ConfigError(
        f"{{key}} pairs runs of different `d_in`: {said[0]} has {first.resolved.d_in}, {said[1]} "
        f"has {other.resolved.d_in}. Their rows are vectors of different spaces and have no "
        "cosine. Such runs can only be compared by their activations on the same tokens (CKA, "
        f"agreement of activations), and here {reason}. Pair runs of equal `d_in` "
        "(comparison.pair_by=seed)",
        key,
    )


def _place(arm: Arm, job: Job) -> str:
    """Return a job's values of the paired axes: ``sae=topk, seed=0``."""
    return ", ".join(f"{axis}={job.value(axis)}" for axis in pair_axes(arm.pair_by))


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
