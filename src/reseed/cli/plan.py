"""A comparison as a plan: its grid, with what the user overrides, as checked jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reseed.cli.app import CommandLine, override, parse
from reseed.cli.jobs import Job, check_jobs
from reseed.compare.config import ComparisonConfig
from reseed.compare.matching import check_width
from reseed.config import ConfigError, build
from reseed.runs import Run, RunStore
from reseed.sweeps import Sweep
from reseed.train.config import RuntimeConfig


@dataclass(frozen=True)
class Plan:
    """Everything that a comparison needs, checked.

    Attributes:
        settings: the comparison, its grid as the user's overrides left it.
        overrides: what Hydra is given with -m for all jobs.
        axes: keys of the grid.
        jobs: one per run.
    """

    settings: ComparisonConfig
    overrides: tuple[str, ...]
    axes: tuple[str, ...]
    jobs: tuple[Job, ...]
    runtime: RuntimeConfig

    @property
    def store(self) -> RunStore:
        return RunStore(self.runtime.outputs)

    @property
    def runs(self) -> list[Run]:
        """The distinct runs."""
        found = {job.resolved.signature: job.resolved.run(self.store) for job in self.jobs}
        return list(found.values())

    def write(self) -> None:
        """What belongs to the comparison, and by which rules, into its folder."""
        self.sweep.write_manifest(self.jobs, self.store, self.axes)
        self.sweep.write_settings(self.settings.to_dict())

    @property
    def sweep(self) -> Sweep:
        signatures = [job.resolved.signature for job in self.jobs]
        return Sweep.of(self.runtime.sweeps, self.settings.name, signatures, self.settings.signed())


def make_plan(line: CommandLine) -> Plan:
    """Read the comparison that the command line names, and check all of its jobs.

    Raises:
        ConfigError: no comparison is named, or a job is wrong.
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
    if not isinstance(node.get("grid"), dict):
        raise ConfigError("{key} must map axes to lists of values", "comparison.grid")
    declared = {str(axis): _words(values) for axis, values in node["grid"].items()}
    # What the user gives for an axis takes its place; a sweep over another key is one more axis.
    grid = {axis: swept.get(axis, single.get(axis, values)) for axis, values in declared.items()}
    grid |= {axis: values for axis, values in swept.items() if axis not in declared}
    for key, text, _ in given:
        if key in grid and text[0] in "+~":
            raise ConfigError(f"{{key}} is an axis: give its values as {key}=...; got {text}", key)
    settings = build({**node, "grid": grid}, "comparison", ComparisonConfig)
    overrides = [text for key, text, _ in given if key not in grid]
    overrides += [f"{axis}={','.join(values)}" for axis, values in grid.items()]
    jobs, runtime = check_jobs(line, overrides, multirun=True)
    for job in jobs:
        check_width(job.resolved.num_latents)
    return Plan(settings, tuple(overrides), tuple(grid), tuple(jobs), runtime)


def _words(values: Any) -> list[str]:
    """Values of an axis as they stand on a command line."""
    listed: Sequence[Any] = values if isinstance(values, list | tuple) else [values]
    return [_word(value) for value in listed]


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(_word(item) for item in value)}]"
    return override("", value)[1:]
