"""The plan of a study: the jobs of each arm, and the checks that their runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reseed.compare.config import Arm, ComparisonConfig, pair_axes
from reseed.errors import ConfigError
from reseed.experiment.resolve import Resolved
from reseed.store.runs import Run, RunStore
from reseed.store.sweeps import Sweep
from reseed.study.alignment import check_bases
from reseed.study.held_out import token_mismatch
from reseed.system.console import say
from reseed.train.config import RuntimeConfig


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        overrides: the overrides that declare the run, for the record.
        axes: the values of the axes, and of ``arm`` if the comparison has arms; empty if nothing is
            compared.
    """

    overrides: tuple[str, ...]
    resolved: Resolved
    axes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """The jobs of one arm of a comparison; without arms, or without a comparison, all jobs.

    Attributes:
        jobs: one job per run.
        overrides: the overrides, with sweeps, that expand to the jobs.
        arm: the arm's axes and its paired axes; None if nothing is compared.
    """

    jobs: tuple[Job, ...]
    overrides: tuple[str, ...]
    arm: Arm | None = None


@dataclass(frozen=True)
class Plan:
    """The checked jobs of a study.

    Attributes:
        launches: one launch per arm.
        settings: the comparison, with grid and arms after the user's overrides; None if the runs
            are only trained.
        multirun: False for a single run, which needs no sweep folder.
        command: the command line that does the same, for the records of runs.
    """

    launches: tuple[Launch, ...]
    runtime: RuntimeConfig
    settings: ComparisonConfig | None = None
    multirun: bool = True
    command: str = ""

    @property
    def jobs(self) -> list[Job]:
        """All jobs, one per run and arm."""
        return [job for launch in self.launches for job in launch.jobs]

    @property
    def experiments(self) -> list[Resolved]:
        """The distinct experiments."""
        return list({job.resolved.signature: job.resolved for job in self.jobs}.values())

    @property
    def store(self) -> RunStore:
        return RunStore(self.runtime.outputs)

    @property
    def runs(self) -> list[Run]:
        """The distinct runs."""
        return [resolved.run(self.store) for resolved in self.experiments]

    @property
    def comparison(self) -> ComparisonConfig:
        """The settings of the comparison.

        Raises:
            ConfigError: the plan has none.
        """
        if self.settings is None:
            raise ConfigError("{key} is required, for example comparison=seeds", "comparison")
        return self.settings

    @property
    def sweep(self) -> Sweep:
        """The folder of the manifest and the results."""
        signatures = [job.resolved.signature for job in self.jobs]
        if self.settings is None:
            return Sweep.of(self.runtime.sweeps, "train", signatures)
        return Sweep.of(self.runtime.sweeps, self.settings.name, signatures, self.settings.signed())

    def write(self) -> None:
        """Write the manifest and the settings into the sweep's folder."""
        self.sweep.write_manifest(self.jobs, self.store)
        if self.settings is not None:
            self.sweep.write_settings(self.settings.to_dict())


def cells_of_arm(launch: Launch) -> list[list[Job]]:
    """Return the jobs of each cell: those with equal values of all unpaired axes."""
    assert launch.arm is not None
    cells: dict[tuple[str, ...], list[Job]] = {}
    for job in launch.jobs:
        place = tuple(job.axes[axis] for axis in launch.arm.cell_axes)
        cells.setdefault(place, []).append(job)
    return list(cells.values())


def without_repeats(arm: Arm, jobs: Sequence[Job]) -> tuple[Job, ...]:
    """Drop repeats of a pretrained SAE in a cell: without a seed, it is the same run each time."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for job in jobs:
        place = (*(job.axes[axis] for axis in arm.cell_axes), job.resolved.signature)
        if job.resolved.pretrained is None or place not in seen:
            kept.append(job)
        seen.add(place)
    return tuple(kept)


def check_pairs(launch: Launch, settings: ComparisonConfig) -> None:
    """Raise `ConfigError` if runs of a cell cannot be compared, or are the same run."""
    arm = launch.arm
    assert arm is not None
    key = f"comparison.arms.{arm.name}.pair_by" if arm.name else "comparison.pair_by"
    notices: list[str] = []
    for jobs in cells_of_arm(launch):
        if len(jobs) == 1 and jobs[0].resolved.pretrained:
            raise ConfigError(
                f"{{key}} leaves sae=pretrained alone in its cell: it is one SAE, whatever the "
                f"{' and '.join(pair_axes(arm.pair_by))}. Pair it with others by source, or by "
                "[sae,seed]",
                key,
            )
        seen: dict[str, Job] = {}
        for i, job in enumerate(jobs):
            for earlier in jobs[:i]:
                both = earlier.resolved, job.resolved
                places = _place(arm, earlier), _place(arm, job)
                notices.append(check_bases(*both, places, settings))
                if both[0].d_in != both[1].d_in:
                    _check_tokens(arm, earlier, job, settings, key)
            other = seen.setdefault(job.resolved.signature, job)
            if other is not job:
                raise ConfigError(
                    f"{{key}} pairs a run with itself: {_place(arm, other)} and "
                    f"{_place(arm, job)} are the same run",
                    key,
                )
    for notice in [*filter(None, notices)][:1]:
        say(notice)


def _check_tokens(arm: Arm, first: Job, other: Job, settings: ComparisonConfig, key: str) -> None:
    """Raise `ConfigError` if two runs of different `d_in` cannot be compared on the same tokens."""
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
    return ", ".join(f"{axis}={job.axes[axis]}" for axis in pair_axes(arm.pair_by))
