"""Lightning's side of training: a module for many SAEs on one stream, its data, and the strategy.

StreamDataset   the stream in blocks of whole batches      ActivationData   feeds them
GroupModule     trains every run of the group on each block
SharedBatchStrategy   for processes that share each batch (`reseed.distributed.process_group`)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from jaxtyping import Float
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from reseed.activations.dataset import STRIPES, Position
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.stream import ChunkStream
from reseed.distributed.process_group import ALONE, PATIENCE, ProcessGroup
from reseed.train.run_state import RunState

MAX_BLOCK_STEPS = 64
"""Maximum number of batches of the smallest size in a block; a larger block is allowed if it needs
to hold one batch of every size."""
MAX_BLOCK_BYTES = 32 * 2**20
"""Maximum size of the activations in a block, with the same exception."""
BLOCK_SECONDS = 0.5
"""Seconds that the group should take for a block: long enough that the work between blocks
(checkpoints, progress) costs little, and short enough that it is not delayed."""


class Block(NamedTuple):
    """The rows ``start`` to ``stop`` (exclusive) of every stripe of a chunk."""

    chunk: int
    start: int
    stop: int
    activations: dict[Hookpoint, Float[Tensor, "stripes rows d_in"]]


class StreamDataset(IterableDataset[Block]):
    """A stream from one position to another, in blocks that hold whole batches of every size.

    A block is a pure function of its position, so resuming means starting at another position. Each
    run of a group makes all its steps of a block before the next run does: its weights and moments,
    which are far larger than its batches, then enter the cache once per block, not once per step.
    The length of blocks changes no result.

    Args:
        batch_sizes: the batch sizes of the runs.
        start: position at which the first batch begins that any run needs.
        stop: position at which the last batch ends that any run needs.
        ranks: the processes that make each step together and so take the same blocks.
    """

    def __init__(
        self,
        stream: ChunkStream,
        batch_sizes: Sequence[int],
        start: Position,
        stop: Position,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        super().__init__()
        self.stream, self.start, self.stop, self.ranks = stream, start, stop, ranks
        rows = [size // STRIPES for size in batch_sizes]
        self.unit, self.smallest = math.lcm(*rows), min(rows)
        self._most = max(1, MAX_BLOCK_STEPS * self.smallest // self.unit)
        self._units = 1

    def __iter__(self) -> Iterator[Block]:
        # Round down to the start of a block; runs that are further ahead wait.
        chunk, row = self.start.chunk, self.start.row // self.unit * self.unit
        while Position(chunk, row) < self.stop:
            yield from self._blocks(chunk, row)
            chunk, row = chunk + 1, 0

    def _blocks(self, chunk: int, row: int) -> Iterator[Block]:
        rows = self.stream.rows(chunk)
        if rows - row < self.smallest:  # the rest is too short for any run's batch
            return
        dealt = self.stream.chunk(chunk)
        row_bytes = sum(len(x) * x.shape[2] * x.element_size() for x in dealt.values())
        most = max(1, min(self._most, MAX_BLOCK_BYTES // (row_bytes * self.unit)))
        while row < rows and Position(chunk, row) < self.stop:
            end = min(row + min(self._units, most) * self.unit, rows)
            started = time.perf_counter()
            yield Block(chunk, row, end, {hook: x[:, row:end] for hook, x in dealt.items()})
            self._choose_length(time.perf_counter() - started)
            row = end

    def _choose_length(self, seconds: float) -> None:
        """Choose the length of the next block by the time that the last block took."""
        if self.ranks.several:
            seconds = float(self.ranks.max_(torch.tensor(seconds)))
        if seconds < BLOCK_SECONDS / 2:
            self._units = min(2 * self._units, self._most)
        elif seconds > BLOCK_SECONDS:
            self._units = max(1, self._units // 2)


class ActivationData(L.LightningDataModule):
    """The data module that feeds every SAE of a group from one stream."""

    def __init__(self, dataset: StreamDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def train_dataloader(self) -> DataLoader:
        # The language model is in this process; each data-loader worker would need its own copy.
        return DataLoader(self.dataset, batch_size=None, num_workers=0)


class GroupModule(L.LightningModule):
    """A module that trains every run of a group on each block of activations.

    Each run has its own optimiser and batch size. Runs share no sum and no random number, so a
    run's results equal those of the run trained alone. If a run fails, the others continue.

    Args:
        ranks: the processes that share each batch and make each step together.

    Attributes:
        after_step: function that is called with a run after each of its steps; it may set the run's
            `error`.
        stopping: whether to end the block after the current step.
        wants_to_stop: whether this rank wants to stop; ranks that share each batch stop together.
    """

    def __init__(
        self, runs: Sequence[RunState], stream: ChunkStream, ranks: ProcessGroup = ALONE
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.runs = list(runs)
        self.saes = nn.ModuleList(run.sae for run in runs)
        self.stream = stream
        self.after_step: Callable[[RunState], None] = lambda run: None
        self.ranks = ranks
        self.stopping = self.wants_to_stop = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [run.optimizer for run in self.runs]

    def training_step(self, batch: Block, batch_idx: int) -> Tensor | None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for run, optimizer in zip(self.runs, optimizers, strict=True):
            for x in self._batches(run, batch):
                with run.catch_error():
                    run.train(x, optimizer)
                    self.after_step(run)
                if self.ranks.several:
                    self.stopping = bool(self.ranks.max_(torch.tensor(int(self.wants_to_stop))))
                if self.stopping:
                    return None
        return None

    def _batches(self, run: RunState, block: Block) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Yield the batches of a block that a run still needs. A run may be ahead of the stream if
        its checkpoint is newer than another run's."""
        size = run.training.batch_size
        rows = size // STRIPES
        first = self.stream.steps_before(block.chunk, size) + block.start // rows
        x = block.activations[run.hookpoint]
        for number in range((block.stop - block.start) // rows):
            if run.active and run.step == first + number:
                yield x[:, number * rows : (number + 1) * rows].flatten(0, 1)

    @property
    def active(self) -> bool:
        """True while any run still has steps to make."""
        return any(run.active for run in self.runs)


class ConnectedEnvironment(ClusterEnvironment):
    """Environment of processes that are already started and connected."""

    def __init__(self, ranks: ProcessGroup) -> None:
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


class SharedBatchStrategy(DDPStrategy):
    """Strategy of data-parallel training without the wrapper `DistributedDataParallel`.

    The wrapper averages the gradients of one backward pass over all parameters, but every SAE of a
    group makes its own backward passes and steps, as many as its budget and batch size need.
    `RunState.train` averages the gradients instead.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        super().__init__(cluster_environment=ConnectedEnvironment(ranks), timeout=PATIENCE)

    def _configure_launcher(self) -> None:
        """Launch no processes, and do not change the number of threads."""

    def _setup_model(self, model: nn.Module) -> nn.Module:  # pyright: ignore
        return model

    def _register_ddp_hooks(self) -> None:
        pass


def trainer_options(ranks: ProcessGroup, device: torch.device) -> dict[str, Any]:
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
            "strategy": SharedBatchStrategy(ranks),
        }
    return {
        "accelerator": accelerator,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "plugins": [LightningEnvironment()],  # under SLURM too: our launcher requeues jobs
    }
