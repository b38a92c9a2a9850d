"""Settings of `hydra/launcher=slurm`, with the names that submitit and SLURM use."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from reseed.config import Config, make, setting
from reseed.errors import ConfigError

NAME = "slurm"
TARGET = "hydra_plugins.reseed_plugins.slurm.SlurmLauncher"
KEY = "hydra.launcher"
_TEAM = ("nodes", "tasks_per_node")
"""Settings that apply only to training jobs."""
_OURS = ("max_num_timeout", "requeue", "poll_s", "additional_parameters")
_ALIKE = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")
"""Settings whose submitit name has no ``slurm_`` prefix."""


@dataclass(frozen=True)
class SlurmSettings(Config):
    """Resources of every job, and the settings for requeueing and following jobs."""

    partition: str | None = setting(None)
    account: str | None = setting(None)
    qos: str | None = setting(None)
    constraint: str | None = setting(None)
    gres: str | None = setting(None)
    nodes: int = setting(1, at_least=1)
    """Nodes of each training job. Several nodes or tasks need runtime=ddp or runtime=spread."""
    tasks_per_node: int = setting(1, at_least=1)
    """Processes that SLURM starts on each node of a training job: as many as it has GPUs. With one
    node and one task, the job starts the other processes itself."""
    gpus_per_node: int | None = setting(None, at_least=0)
    cpus_per_task: int = setting(4, at_least=1)
    mem_gb: float | None = setting(None, above=0)
    """Memory of a job; null: the partition's default."""
    timeout_min: int = setting(240, at_least=1)
    """Time limit of a job. A job that reaches it saves and is requeued."""
    array_parallelism: int = setting(64, at_least=1)
    """Maximum number of tasks of an array that run at once."""
    setup: tuple[str, ...] = setting(())
    """Shell lines before Python starts: ``module load cuda``, exports."""
    signal_delay_s: int = setting(120, at_least=1)
    """Seconds between SLURM's warning and the time limit: the time that a job has to save."""
    max_num_timeout: int = setting(10, at_least=0)
    """Maximum requeues of a job that reached its time limit; pre-emption does not count."""
    requeue: bool = setting(True)
    """SLURM may restart a job whose node failed or was pre-empted."""
    additional_parameters: dict[str, Any] | None = setting(None)  # noqa: RUF009
    """Further options of sbatch by their long names."""
    poll_s: float = setting(10.0, above=0)
    """Seconds between two looks at the queue by a waiting command."""

    def validate(self) -> None:
        # SLURM sends the signal up to a minute early.
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ConfigError(
                f"{{key}} (={self.signal_delay_s}) must be shorter than the time limit "
                f"({KEY}.timeout_min={self.timeout_min})",
                "signal_delay_s",
            )

    @property
    def tasks(self) -> int:
        """Number of processes that SLURM starts for a training job."""
        return self.nodes * self.tasks_per_node

    def check(self, strategy: str) -> None:
        """Raise `ConfigError` if ``strategy`` cannot use the requested number of processes."""
        if strategy == "single" and self.tasks > 1:
            key = "nodes" if self.nodes > 1 else "tasks_per_node"
            raise ConfigError(
                f"{{key}} (={getattr(self, key)}) needs runtime=ddp or runtime=spread: with "
                "runtime.strategy=single one process trains",
                f"{KEY}.{key}",
            )

    def submitit(self, name: str, dependency: str | None, trains: bool = True) -> dict[str, Any]:
        """Return the parameters of submitit's AutoExecutor for a job called ``name``."""
        given: dict[str, Any] = {"name": name}
        for f in fields(self):
            value = 1 if f.name in _TEAM and not trains else getattr(self, f.name)
            if f.name not in _OURS and value not in (None, ()):
                given[f.name if f.name in _ALIKE else f"slurm_{f.name}"] = value
        if self.setup:
            given["slurm_setup"] = list(self.setup)
        more = {"requeue" if self.requeue else "no-requeue": True}
        given["slurm_additional_parameters"] = more | dict(self.additional_parameters or {})
        # append: a requeued job keeps its earlier output.
        # kill: if one process fails, the others would wait for it forever.
        given["slurm_srun_args"] = ["--open-mode=append", "--kill-on-bad-exit=1"]
        return given | ({"slurm_dependency": dependency} if dependency else {})

    @classmethod
    def of(cls, node: dict[str, Any]) -> SlurmSettings:
        """Build the settings from the composed ``hydra.launcher``."""
        values = {key: value for key, value in node.items() if key != "_target_"}
        return make(cls, values, KEY)


def defaults() -> dict[str, Any]:
    """Return the launcher's default node for Hydra's config store."""
    found: dict[str, Any] = {"_target_": TARGET}
    for f in fields(SlurmSettings):
        value = f.default
        found[f.name] = list(value) if isinstance(value, tuple) else value
    found["additional_parameters"] = {}
    return found
