"""Launcher `hydra/launcher=fused`: runs all jobs of a local sweep in one process.

A task function with an attribute ``many`` gets all configurations at once, so that it can train
those that read the same activations together. Other tasks run one after the other. Unlike with
Hydra's basic launcher, the next jobs run even if one fails.
"""

# No postponed annotations: Hydra loads plugins outside sys.modules, where dataclasses resolve them.
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class FusedLauncherConf:
    _target_: str = "hydra_plugins.reseed_plugins.fused.FusedLauncher"


ConfigStore.instance().store(
    group="hydra/launcher", name="fused", node=FusedLauncherConf, provider="reseed"
)


class FusedLauncher(Launcher):
    """Launcher that runs the jobs of a sweep in this process, together if the task allows it."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from reseed.cli.config_loader import OnceLoader

        if isinstance(hydra_context.config_loader, ConfigLoaderImpl):
            # The sweeper, which composes every job again, shares this context.
            hydra_context.config_loader = OnceLoader(hydra_context.config_loader)
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        many = getattr(self.task_function, "many", None)
        configs = [
            self._config(overrides, initial_job_idx + index)
            for index, overrides in enumerate(job_overrides)
        ]
        if many is None:
            return [self._run(config) for config in configs]
        state = Singleton.get_state()
        outcomes = many([_without_hydra(config) for config in configs])
        Singleton.set_state(state)
        return [
            _job_return(config, outcome) for config, outcome in zip(configs, outcomes, strict=True)
        ]

    def _config(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
        return config

    def _run(self, config: DictConfig) -> JobReturn:
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _without_hydra(config: DictConfig) -> DictConfig:
    task = config.copy()
    with open_dict(task):
        del task["hydra"]
    return task


def _job_return(config: DictConfig, outcome: object) -> JobReturn:
    failed = isinstance(outcome, Exception)
    job = JobReturn(cfg=config, overrides=list(config.hydra.overrides.task))
    job.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    job.return_value = outcome
    return job
