"""The Lightning strategy for processes that share each batch (`reseed.ranks`)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module

from reseed.ranks import PATIENCE, Ranks


class RanksEnvironment(ClusterEnvironment):
    """The environment of processes that are already started and connected."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        raise RuntimeError("the ranks have met already")

    @property
    def main_port(self) -> int:
        raise RuntimeError("the ranks have met already")

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.ranks.count

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.ranks.index

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.ranks.local_index

    def node_rank(self) -> int:
        return self.ranks.index // self.ranks.local_count


class RanksStrategy(DDPStrategy):
    """The strategy of data-parallel training, without the wrapper `DistributedDataParallel`.

    The wrapper averages the gradients of one backward pass over all parameters, but every SAE of a
    group makes its own backward passes and steps, as many as its budget and batch size need.
    `Member.train` averages the gradients instead.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(cluster_environment=RanksEnvironment(ranks), timeout=PATIENCE)

    def _configure_launcher(self) -> None:
        """Launch nothing and leave the number of threads to us."""

    def _setup_model(self, model: Module) -> Module:  # pyright: ignore
        return model

    def _register_ddp_hooks(self) -> None:
        pass


def trainer_options(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Return the options of a `lightning.Trainer` for devices and processes.

    Args:
        ranks: the processes that share each batch, and only those. Lightning synchronises them
            before every block; with ``runtime=spread`` processes take blocks at their own pace and
            would deadlock.
    """
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    if ranks.several:
        return {
            "accelerator": accelerator,
            "devices": ranks.local_count,
            "num_nodes": ranks.count // ranks.local_count,
            "strategy": RanksStrategy(ranks),
        }
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    return {
        "accelerator": accelerator,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "plugins": [LightningEnvironment()],  # under SLURM too: our launcher requeues jobs
    }
