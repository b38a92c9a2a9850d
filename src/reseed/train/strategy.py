"""Lightning's view of processes that share each batch (`reseed.ranks`)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module

from reseed.ranks import PATIENCE, Ranks


class RanksEnvironment(ClusterEnvironment):
    """Processes that are there already, and have met."""

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
    """Data-parallel training.

    Without the wrapper `DistributedDataParallel`: it averages the gradients of one backward pass
    over all parameters, and here every SAE of a group makes backward passes and steps of its own,
    as many as its budget and batch size want. `Member.train` averages them.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(cluster_environment=RanksEnvironment(ranks), timeout=PATIENCE)

    def _configure_launcher(self) -> None:
        """Nothing is launched; the number of threads is ours to set."""

    def _setup_model(self, model: Module) -> Module:  # pyright: ignore
        return model

    def _register_ddp_hooks(self) -> None:
        pass


def trainer_options(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Where a `lightning.Trainer` trains.

    Args:
        ranks: those that share each batch. Before every block Lightning exchanges a word with all
            of them, so that others than those, which take blocks at a pace of their own
            (``runtime=spread``), would wait for each other for ever.
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
        "plugins": [LightningEnvironment()],  # under SLURM too: who submits also requeues
    }
