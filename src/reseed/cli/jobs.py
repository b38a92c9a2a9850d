"""Checked experiments from composed configuration. Imports torch: import it only in commands."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from reseed.activations.hookpoint import HookpointConfig
from reseed.activations.source import SourceConfig
from reseed.activations.stream import DatasetConfig
from reseed.cli.app import CommandLine, expand, sweeps
from reseed.cli.cluster.settings import NAME as SLURM
from reseed.config import ConfigError, build, make, nearest
from reseed.console import say
from reseed.devices import pick_device
from reseed.experiment import Experiment, Resolved, resolve_experiment
from reseed.sae.base import SAEOption
from reseed.train.config import RuntimeConfig, TrainingConfig

_GROUPS = {
    "model": SourceConfig,
    "hookpoint": HookpointConfig,
    "dataset": DatasetConfig,
    "sae": SAEOption,
    "training": TrainingConfig,
}
_SCALARS = ("layer", "seed", "seed_scope", "surrogate")
_REQUIRED = (*_GROUPS, *_SCALARS, "runtime")
_ROOT = (*_REQUIRED, "source", "comparison", "evaluation", "plan_only", "wait", "objective")
_LOCAL = ("fused", "basic", "joblib", "submitit_local")
_SILENT_JOBS, _SILENT_SECONDS = 20, 1.0  # beyond both, the command prints that it is checking


@dataclass(frozen=True)
class Job:
    """One job of a command: its overrides and the experiment that they declare."""

    overrides: tuple[str, ...]
    resolved: Resolved

    def value(self, axis: str) -> str:
        """Return the value that this job's overrides give for ``axis``, as a word."""
        found = [o.partition("=")[2] for o in self.overrides if o.partition("=")[0] == axis]
        return found[-1]


def experiment_from(values: Mapping[str, Any]) -> tuple[Experiment, RuntimeConfig]:
    """Build the typed experiment of a composed configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value has a wrong type or is out of range.
    """
    for key in values:
        if key not in _ROOT:
            raise ConfigError(f"there is no key {{key}}.{nearest(key, _ROOT)}", key)
    if values.get("evaluation") is not None:
        raise ConfigError(
            "{key} is for `reseed evaluate` and `reseed run`; here it would change nothing",
            "evaluation",
        )
    for key in _REQUIRED:
        if key not in values:
            raise ConfigError("{key} is required, and was removed", key)
    if values.get("objective") is not None:
        raise ConfigError("{key} is for hydra/sweeper=optuna, which optimises it", "objective")
    parts = {group: build(values[group], group, base) for group, base in _GROUPS.items()}
    scalars = {key: values[key] for key in _SCALARS}
    runtime = build(values["runtime"], "runtime", RuntimeConfig)
    return make(Experiment, {**parts, **scalars}, ""), runtime


def resolved_from(values: Mapping[str, Any] | DictConfig) -> tuple[Resolved, RuntimeConfig]:
    """Build and check the experiment of a composed configuration."""
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=True)  # type: ignore[assignment]
    experiment, runtime = experiment_from(values)
    return resolve_experiment(experiment, runtime), runtime


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
            f"{{key}}=false needs hydra/launcher={SLURM}: with others the command does the work",
            "wait",
        )
    return found, runtime
