"""Launcher `hydra/launcher=fused`, the default: the command trains the runs of a sweep itself.

Runs that read the same activations are trained together, without Hydra's jobs (`reseed.study`).
Only the trials of ``hydra/sweeper=optuna`` are launched here, one after the other.
"""

# No postponed annotations: Hydra loads plugins outside sys.modules, where dataclasses resolve them.
from dataclasses import dataclass

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class FusedLauncherConf:
    _target_: str = "hydra_plugins.reseed_plugins.fused.FusedLauncher"


ConfigStore.instance().store(
    group="hydra/launcher", name="fused", node=FusedLauncherConf, provider="reseed"
)


class FusedLauncher(BasicLauncher):
    """Hydra's basic launcher, but the files of each choice of options are read only once."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from reseed.cli.config_loader import OnceLoader

        if isinstance(hydra_context.config_loader, ConfigLoaderImpl):
            # The sweeper, which composes every job again, shares this context.
            hydra_context.config_loader = OnceLoader(hydra_context.config_loader)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
