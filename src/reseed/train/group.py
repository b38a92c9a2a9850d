"""Training of one group: SAEs that read the same stream, in one pass of the language model."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from reseed.activations.source import ActivationSource
from reseed.activations.stream import STRIPES, ChunkStream, Position
from reseed.distributed.launcher import Processes
from reseed.distributed.process_group import ALONE, ProcessGroup
from reseed.errors import ReseedError
from reseed.evaluate.reconstruction import Reconstruction, measure
from reseed.evaluate.true_features import TruthResult, measure_truth
from reseed.store.runs import INITIAL_FILE, Run, RunStore
from reseed.system.console import counted, say, seconds_since
from reseed.system.devices import cpus, free_memory, is_out_of_memory, pick_device
from reseed.system.files import DiskFullError
from reseed.train.callbacks import (
    CheckpointCallback,
    GroupProgress,
    ProgressWriter,
    StopOnSignal,
    StopSignal,
)
from reseed.train.config import RuntimeConfig
from reseed.train.plan import OutOfMemory, divide_runs
from reseed.train.record import GroupRun, PretrainedRun, record
from reseed.train.run_state import RunState
from reseed.train.trainer import ActivationData, GroupModule, StreamDataset, trainer_options

if TYPE_CHECKING:
    from reseed.experiment.resolve import Resolved


def fit_group(
    group: Sequence[Resolved],
    store: RunStore,
    runtime: RuntimeConfig,
    team: Processes | None = None,
    order: Any = None,
) -> dict[str, BaseException]:
    """Train, measure and record the runs of a group; the caller holds their locks. SAEs that were
    trained elsewhere are only measured and recorded.

    Args:
        team: the processes that train; by default this one alone.
        order: the message that tells the other processes what to train (`reseed.distributed.worker`).

    Returns:
        the error of each run that failed, by run id. A failed run does not stop the others.

    Raises:
        Interrupted: SIGINT or SIGTERM stopped training; the same command resumes it.
        OutOfMemory: memory did not suffice; the caller retries with half of the runs.
        DiskFullError: the disk is full; the runs count as interrupted, not as failed.
    """
    clock = time.perf_counter()
    runs = [resolved.run(store) for resolved in group]
    for resolved, run in zip(group, runs, strict=True):
        run.begin(resolved.record() | {"group": [r.signature for r in group]})
    try:
        ranks = ProcessGroup(device=pick_device(runtime.device)) if team is None else team.ranks
        ranks.tell(order)
        failures = fit_on_process(group, runs, runtime, ranks)
    except (KeyboardInterrupt, DiskFullError):
        _interrupt(runs)
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            # Runs that were recorded already keep their own outcome.
            for run in runs:
                if run.record["status"] == "running":
                    run.fail(error)
            raise
        reason = str(error).splitlines()[0]
    else:
        if not any(r.role for r in group):  # a calibration prints its own summary
            sound, took = len(runs) - len(failures), seconds_since(clock)
            say(f"  {sound} of {len(runs)} runs finished in {took:,.1f} s")
        return failures
    # Outside of the handler, since the error references every frame and so the memory.
    _interrupt(runs)
    free_memory()
    raise OutOfMemory(f"out of memory with {counted(len(runs), 'SAE')} ({reason})")


def _interrupt(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.record["status"] == "running":
            with suppress(DiskFullError):  # it stays `running` without an owner, which is the same
                run.update(status="interrupted")


def fit_on_process(
    group: Sequence[Resolved], runs: Sequence[Run], runtime: RuntimeConfig, ranks: ProcessGroup
) -> dict[str, BaseException]:
    """Do this process's share of a group: all of it if it is the only process.

    With ``runtime=ddp`` every rank trains all SAEs on its stripes of each chunk, and the first rank
    records; with ``runtime=spread`` each rank trains and records its own SAEs, and all compute the
    chunks together. All ranks call this function together.

    Returns:
        the error of each run of the group that failed, by run id.
    """
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    elif ranks.several and ranks.device.type == "cpu":
        torch.set_num_threads(max(1, cpus() // ranks.local_count))
    share = ProcessShare.of(group, runs, runtime, ranks)
    first = group[0]
    needed = max(r.experiment.training.tokens for r in group)
    source = first.open(ranks.device, needed, runtime.open_cache())
    stream = source.stream([r.experiment.hook for r in group])
    training = [r.experiment.training for r in group if r.pretrained is None]
    wanted = [(recipe.batch_size, recipe.steps) for recipe in training]
    source.check_length(stream, wanted, first.data.label)

    members = [_run_state(r, run, source, stream, share.of_batch) for r, run in share.own]
    if runtime.strategy == "ddp":
        stream.divide(ranks)
    else:
        stream.compute_together(ranks)
    started = time.perf_counter()
    trained = [member for member in members if isinstance(member, RunState)]
    _train(trained, wanted, share, stream, runtime)
    training_s = seconds_since(started)
    for member in members:
        _check(member)
    failures: dict[str, BaseException] = {}
    if share.keeps:
        timings = {"training_s": training_s, "group_runs": len(group)}
        failures = _finish(members, share.own, source, timings)
    if not ranks.several:
        return failures
    # Send errors as text: not every exception can be pickled.
    told = ranks.collect({run: str(error) for run, error in failures.items()})
    return {run: ReseedError(words) for each in told for run, words in each.items()} | failures


@dataclass(frozen=True)
class ProcessShare:
    """The share of a group that one rank trains.

    Attributes:
        ranks: all ranks of the team, as this one sees them.
        own: the runs that it trains.
        keeps: whether it writes checkpoints and results.
        of_batch: the ranks that share each batch.
    """

    ranks: ProcessGroup
    own: tuple[tuple[Resolved, Run], ...]
    keeps: bool
    of_batch: ProcessGroup

    @classmethod
    def of(
        cls,
        group: Sequence[Resolved],
        runs: Sequence[Run],
        runtime: RuntimeConfig,
        ranks: ProcessGroup,
    ) -> ProcessShare:
        pairs = tuple(zip(group, runs, strict=True))
        if runtime.strategy == "ddp":
            return cls(ranks, pairs, ranks.leads, ranks)
        own = divide_runs(group, ranks.count)[ranks.index]
        return cls(ranks, tuple(pairs[i] for i in own), True, ALONE)

    @property
    def waits(self) -> bool:
        """True if the other ranks need this one for every chunk, even after its own last step."""
        return self.ranks.several and not self.of_batch.several


def _finish(
    members: Sequence[GroupRun],
    own: Sequence[tuple[Resolved, Run]],
    source: ActivationSource,
    timings: dict[str, Any],
) -> dict[str, BaseException]:
    """Measure and record the runs; return the errors of those that failed, by run id."""
    started = time.perf_counter()
    sound = [m for m in members if m.error is None]
    measured = _measure(sound, source, [resolved for resolved, _ in own])
    truths = _measure_truth(measured, source, [resolved for resolved, _ in own])
    timings = timings | {"held_out_s": seconds_since(started)}
    failures: dict[str, BaseException] = {}
    for member, (resolved, run) in zip(members, own, strict=True):
        if member.error is not None:
            failures[run.id] = member.error
            step = getattr(member.error, "step", member.step)
            run.fail(member.error, failed_at_step=step)
        else:
            truth = truths.get(member.id)
            record(member, resolved, run, measured[member.id], truth, timings)
    return failures


def _train(
    members: Sequence[RunState],
    wanted: Sequence[tuple[int, int]],
    share: ProcessShare,
    stream: ChunkStream,
    runtime: RuntimeConfig,
) -> None:
    """Make the remaining steps.

    Args:
        members: the runs of this rank.
        wanted: batch size and number of steps of each run of the group.
    """
    begin = [stream.position(m.step, m.training.batch_size) for m in members if m.active]
    starts = [at for at in share.ranks.collect(min(begin, default=None)) if at is not None]
    if not starts:
        return
    module = GroupModule(members, stream, share.of_batch)
    own = {member.id for member in members}
    folders = {run.id: run.path for _, run in share.own if run.id in own}
    books = CheckpointCallback(
        folders, runtime.log_every_steps, runtime.checkpoint_every_s, share.keeps, share.waits
    )
    border = StopOnSignal(books, agrees=share.of_batch.several)
    callbacks: list[L.Callback] = [books, border]
    if members:
        progress = GroupProgress(members, runtime.progress and share.ranks.leads)
        callbacks.append(progress)
        if progress.first and share.ranks.leads:
            say(f"  resuming after {progress.first:,} of {progress.total:,} tokens")
    if share.keeps:
        callbacks.append(ProgressWriter(members, folders, runtime.heartbeat_every_s))
    with _quiet_lightning():
        trainer = L.Trainer(
            max_epochs=1,
            callbacks=callbacks,
            logger=_loggers(runtime) if share.keeps else False,
            enable_checkpointing=False,  # checkpoints belong to runs: see Bookkeeper
            enable_model_summary=False,
            enable_progress_bar=bool(members),
            use_distributed_sampler=False,
            **trainer_options(share.of_batch, stream.device),
        )
        sizes = [size for size, _ in wanted]
        stop = max(_end(stream, size, steps) for size, steps in wanted)
        dataset = StreamDataset(stream, sizes, min(starts), stop, share.of_batch)
        try:
            with stream.prefetching(stop, min(sizes), runtime.prefetch):
                trainer.fit(module, datamodule=ActivationData(dataset))
        except StopSignal:
            pass
        except SystemExit as end:
            # Lightning exits like this on a signal that comes before our handlers are installed.
            signalled = end.__context__ if isinstance(end.__context__, KeyboardInterrupt) else end
            raise signalled from None
        finally:
            border.restore()
    border.check()


def _end(stream: ChunkStream, size: int, steps: int) -> Position:
    """Return the position at which the last of ``steps`` batches ends."""
    last = stream.position(steps - 1, size)
    return Position(last.chunk, last.row + size // STRIPES)


def _run_state(
    resolved: Resolved, run: Run, source: ActivationSource, stream: ChunkStream, ranks: ProcessGroup
) -> GroupRun:
    """Return the run's state: from its checkpoint, from the first chunk, or as imported."""
    e = resolved.experiment
    if resolved.pretrained is not None:
        return PretrainedRun(run.id, e.hook, resolved.pretrained, source.device)
    given = (run.id, e.hook, resolved.sae, e.training, resolved.d_in, resolved.init_seed)
    member = RunState(*given, source.device, ranks)
    if resolved.role == "steered":
        member.steer()
    with member.failing_alone():
        _begin(member, run, source, stream)
    return member


def _begin(member: RunState, run: Run, source: ActivationSource, stream: ChunkStream) -> None:
    checkpoint = run.path / "checkpoint.pt"
    if checkpoint.is_file():
        try:
            member.load(checkpoint)
            return
        except Exception as error:
            raise ReseedError(
                f"{checkpoint} cannot be read ({error}); delete it to train this run from the start"
            ) from error
    truth = None if source.world is None else source.world.dictionary
    member.start(stream.chunk(0)[member.hookpoint].flatten(0, 1), truth)
    if member.ranks.leads:
        member.save_start(run.path / INITIAL_FILE)


def _measure(
    members: Sequence[GroupRun], source: ActivationSource, group: Sequence[Resolved]
) -> dict[str, Reconstruction]:
    if not members:
        return {}
    dataset = group[0].experiment.dataset
    hooks = [m.hookpoint for m in members]
    chunks = source.held_out(hooks, dataset.held_out_tokens)
    return measure({m.id: (m.hookpoint, m.result()) for m in members}, chunks)


def _measure_truth(
    measured: Mapping[str, Reconstruction], source: ActivationSource, group: Sequence[Resolved]
) -> dict[str, TruthResult]:
    """Measure SAEs against a world's features on the same held-out tokens; {} without a world."""
    if source.world is None or not measured:
        return {}
    samples = source.held_out_samples(group[0].experiment.dataset.held_out_tokens)
    return measure_truth({id: m.sae for id, m in measured.items()}, source.world, samples)


def _check(member: GroupRun) -> None:
    if member.error is None:
        try:
            member.check_weights()
        except ReseedError as error:
            member.error = error


def _loggers(runtime: RuntimeConfig) -> list[Any]:
    """Make the loggers that the user asked for; training.csv is always written, without them."""
    from lightning.pytorch import loggers

    made: list[Any] = []
    if "tensorboard" in runtime.loggers:
        made.append(loggers.TensorBoardLogger(Path(runtime.outputs) / "tensorboard", name=""))
    if "wandb" in runtime.loggers:
        made.append(loggers.WandbLogger(project="reseed", save_dir=runtime.outputs))
    return made


@contextmanager
def _quiet_lightning():
    """Silence Lightning's hints on devices and workers, which our own messages cover."""
    found = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            for logger, level in zip(found, levels, strict=True):
                logger.setLevel(level)
