"""Launcher `hydra/launcher=slurm`: declares the settings for a sweep of SLURM jobs.

The commands of reseed read these settings and submit through submitit (`reseed.cli.cluster`): one
array task for each group of runs that train together, then the comparisons, then the tables.
Planning needs the whole command, but a Hydra launcher sees only the jobs of one arm. So this
launcher only declares the settings, and refuses to launch anything itself.
"""

# No postponed annotations here: see fused.py.
from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from reseed.cli.cluster.queue import NAME, defaults
from reseed.errors import ReseedError

ConfigStore.instance().store(group="hydra/launcher", name=NAME, node=defaults(), provider="reseed")


class SlurmLauncher(Launcher):
    """Launcher that always raises: `reseed train`, `run`, `compare` and `evaluate` submit."""

    def __init__(self, **settings: object) -> None:
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        pass

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        raise ReseedError(
            "hydra/launcher=slurm works only with `reseed train`, `run`, `compare` and `evaluate`: "
            "use hydra/launcher=submitit_slurm, which submits one job for each run"
        )
