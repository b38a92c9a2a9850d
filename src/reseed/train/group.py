"""Training of one group: SAEs that read the same stream, in one pass of the language model."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import loggers

from reseed.activations.dataset import STRIPES, Position
from reseed.activations.source import ActivationSource
from reseed.activations.stream import ChunkStream
from reseed.distributed.launcher import Processes
from reseed.distributed.process_group import ALONE, ProcessGroup
from reseed.errors import ReseedError
from reseed.evaluate.reconstruction import Reconstruction, measure
from reseed.evaluate.true_features import TruthResult, measure_truth
from reseed.store.runs import CHECKPOINT_FILE, INITIAL_FILE, Run, RunStore
from reseed.system.console import counted, say, seconds_since
from reseed.system.devices import cpus, free_memory, is_out_of_memory, pick_device
from reseed.system.files import DiskFullError
from reseed.system.integrity import is_damaged
from reseed.train.callbacks import (
    CheckpointCallback,
    GroupProgress,
    ProgressWriter,
    StopOnSignal,
    StopSignal,
)
from reseed.train.config import RuntimeConfig
from reseed.train.plan import OutOfMemory, divide_runs
from reseed.train.record import GroupRun, PretrainedRun, write_results
from reseed.train.run_state import RunState
from reseed.train.spec import RunSpec
from reseed.train.trainer import ActivationData, GroupModule, StreamDataset, trainer_options


def fit_group(
    group: Sequence[RunSpec],
    store: RunStore,
    runtime: RuntimeConfig,
    processes: Processes | None = None,
    message: Any = None,
) -> dict[str, BaseException]:
    """Train, measure and record the runs of a group, whose locks the caller holds.

    SAEs that were trained elsewhere are only measured and recorded.

    Args:
        processes: the processes that train; by default only this one.
        message: plain values that tell the other processes what to train
            (`reseed.distributed.worker.group_message`).

    Returns:
        the error of each run that failed, by run id. A failed run does not stop the others.

    Raises:
        Interrupted: SIGINT or SIGTERM stopped training; the same command resumes it.
        OutOfMemory: memory did not suffice; the caller retries with half of the runs.
        DiskFullError: the disk is full; the runs count as interrupted, not as failed.
    """
    clock = time.perf_counter()
    runs = [spec.run(store) for spec in group]
    for spec, run in zip(group, runs, strict=True):
        run.begin(spec.record | {"group": [other.signature for other in group]})
    try:
        ranks = (
            ProcessGroup(device=pick_device(runtime.device))
            if processes is None
            else processes.ranks
        )
        ranks.broadcast_json(message)
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
        if not any(spec.role for spec in group):  # a calibration prints its own summary
            sound, took = len(runs) - len(failures), seconds_since(clock)
            say(f"  {sound} of {len(runs)} runs finished in {took:,.1f} s")
        return failures
    # Outside of the handler, because the error references every frame and so its tensors.
    _interrupt(runs)
    free_memory()
    raise OutOfMemory(f"out of memory with {counted(len(runs), 'SAE')} ({reason})")


def _interrupt(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.record["status"] == "running":
            with suppress(DiskFullError):  # `running` without an owner is read as interrupted
                run.update(status="interrupted")


def fit_on_process(
    group: Sequence[RunSpec], runs: Sequence[Run], runtime: RuntimeConfig, ranks: ProcessGroup
) -> dict[str, BaseException]:
    """Train this process's share of a group, which is all of it if there is only one process.

    With ``runtime=ddp`` every rank trains all SAEs on its stripes of each chunk, and the first rank
    records the runs; with ``runtime=spread`` each rank trains and records its own SAEs, and all
    ranks compute the chunks together. All ranks call this function together.

    Returns:
        the error of each run of the group that failed, by run id.
    """
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    elif ranks.several and ranks.device.type == "cpu":
        torch.set_num_threads(max(1, cpus() // ranks.local_count))
    share = ProcessShare.of(group, runs, runtime, ranks)
    first = group[0]
    needed = max(spec.needed for spec in group)
    source = first.open(ranks.device, needed, runtime.open_cache())
    stream = source.stream([spec.hookpoint for spec in group])
    training = [spec.training for spec in group if spec.pretrained is None]
    wanted = [(options.batch_size, options.steps) for options in training]
    source.check_length(stream, wanted, first.data.label)
    about_data = ranks.broadcast_json(source.record() if ranks.leads else None)
    for line in source.summary:
        say(line)

    states = [_run_state(spec, run, source, stream, share.batch_ranks) for spec, run in share.own]
    if runtime.strategy == "ddp":
        stream.divide(ranks)
    else:
        stream.share_computation(ranks)
    started = time.perf_counter()
    trained = [state for state in states if isinstance(state, RunState)]
    _train(trained, wanted, share, stream, runtime)
    training_s = seconds_since(started)
    for state in states:
        _check(state)
    failures: dict[str, BaseException] = {}
    if share.writes:
        timings = {"training_s": training_s, "group_runs": len(group)}
        failures = _finish(states, share.own, source, timings, about_data)
    if not ranks.several:
        return failures
    texts = ranks.gather_json({run: str(error) for run, error in failures.items()})
    return {run: ReseedError(text) for each in texts for run, text in each.items()} | failures


@dataclass(frozen=True)
class ProcessShare:
    """The share of a group that one rank trains.

    Attributes:
        ranks: all ranks, as this one sees them.
        own: the runs that this rank trains.
        writes: whether this rank writes checkpoints and results.
        batch_ranks: the ranks that share each batch.
    """

    ranks: ProcessGroup
    own: tuple[tuple[RunSpec, Run], ...]
    writes: bool
    batch_ranks: ProcessGroup

    @classmethod
    def of(
        cls,
        group: Sequence[RunSpec],
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
    def reads_to_end(self) -> bool:
        """True if the other ranks need this rank for every chunk, even after its own last step."""
        return self.ranks.several and not self.batch_ranks.several


def _run_state(
    spec: RunSpec, run: Run, source: ActivationSource, stream: ChunkStream, ranks: ProcessGroup
) -> GroupRun:
    """Return the run's state, from its checkpoint, the first chunk, or an SAE trained elsewhere."""
    if spec.pretrained is not None:
        return PretrainedRun(run.id, spec.hookpoint, spec.pretrained, source.device)
    given = (run.id, spec.hookpoint, spec.sae, spec.training, spec.d_in, spec.init_seed)
    state = RunState(*given, source.device, ranks)
    if spec.role == "steered":
        state.steer()
    with state.catch_error():
        _begin(state, run, source, stream)
    return state


def _begin(state: RunState, run: Run, source: ActivationSource, stream: ChunkStream) -> None:
    checkpoint = run.path / CHECKPOINT_FILE
    if checkpoint.exists() and is_damaged(checkpoint):
        say(f"  {checkpoint} is damaged: training begins at the first step")
    elif checkpoint.exists():
        try:
            state.load(checkpoint)
            return
        except Exception as error:
            raise ReseedError(
                f"{checkpoint} cannot be read ({error}); delete it to train this run from the start"
            ) from error
    truth = None if source.world is None else source.world.dictionary
    state.start(stream.chunk(0)[state.hookpoint].flatten(0, 1), truth)
    if state.ranks.leads:
        state.save_start(run.path / INITIAL_FILE)


def _train(
    states: Sequence[RunState],
    wanted: Sequence[tuple[int, int]],
    share: ProcessShare,
    stream: ChunkStream,
    runtime: RuntimeConfig,
) -> None:
    """Make the remaining steps.

    Args:
        states: the runs of this rank.
        wanted: batch size and number of steps of each run of the group.
    """
    begin = [stream.position(s.step, s.training.batch_size) for s in states if s.active]
    first = [(at.chunk, at.row) for at in sorted(begin)[:1]]
    starts = [Position(*at) for each in share.ranks.gather_json(first) for at in each]
    if not starts:
        return
    module = GroupModule(states, stream, share.batch_ranks)
    own = {state.id for state in states}
    folders = {run.id: run.path for _, run in share.own if run.id in own}
    checkpoints = CheckpointCallback(
        folders,
        runtime.log_every_steps,
        runtime.checkpoint_every_s,
        share.writes,
        share.reads_to_end,
    )
    stop_on_signal = StopOnSignal(checkpoints, synchronous=share.batch_ranks.several)
    callbacks: list[L.Callback] = [checkpoints, stop_on_signal]
    if states:
        progress = GroupProgress(states, runtime.progress and share.ranks.leads)
        callbacks.append(progress)
        if progress.first and share.ranks.leads:
            say(f"  resuming after {progress.first:,} of {progress.total:,} tokens")
    if share.writes:
        callbacks.append(ProgressWriter(states, folders, runtime.heartbeat_every_s))
    with _quiet_lightning():
        trainer = L.Trainer(
            max_epochs=1,
            callbacks=callbacks,
            logger=_loggers(runtime) if share.writes else False,
            enable_checkpointing=False,  # checkpoints belong to runs: see CheckpointCallback
            enable_model_summary=False,
            enable_progress_bar=bool(states),
            use_distributed_sampler=False,
            **trainer_options(share.batch_ranks, stream.device),
        )
        sizes = [size for size, _ in wanted]
        stop = max(_end(stream, size, steps) for size, steps in wanted)
        dataset = StreamDataset(stream, sizes, min(starts), stop, share.batch_ranks)
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
            stop_on_signal.restore()
    stop_on_signal.check()


def _end(stream: ChunkStream, size: int, steps: int) -> Position:
    """Return the position at which the last of ``steps`` batches ends."""
    last = stream.position(steps - 1, size)
    return Position(last.chunk, last.row + size // STRIPES)


def _loggers(runtime: RuntimeConfig) -> list[Any]:
    """Make the loggers that the user asked for; training.csv is always written without a logger."""
    made: list[Any] = []
    if "tensorboard" in runtime.loggers:
        made.append(loggers.TensorBoardLogger(Path(runtime.outputs) / "tensorboard", name=""))
    if "wandb" in runtime.loggers:
        made.append(loggers.WandbLogger(project="reseed", save_dir=runtime.outputs))
    return made


@contextmanager
def _quiet_lightning():
    """Silence Lightning's messages on devices and workers, which repeat our own messages."""
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


def _check(state: GroupRun) -> None:
    if state.error is None:
        try:
            state.check_weights()
        except ReseedError as error:
            state.error = error


def _finish(
    states: Sequence[GroupRun],
    own: Sequence[tuple[RunSpec, Run]],
    source: ActivationSource,
    timings: dict[str, Any],
    about_data: dict[str, Any],
) -> dict[str, BaseException]:
    """Measure and record the runs; return the errors of those that failed, by run id."""
    started = time.perf_counter()
    sound = [state for state in states if state.error is None]
    held_out_tokens = own[0][0].data.config.held_out_tokens if own else 0
    measured = _measure(sound, source, held_out_tokens)
    truths = _measure_truth(measured, source, held_out_tokens)
    timings = timings | {"held_out_s": seconds_since(started)}
    failures: dict[str, BaseException] = {}
    for state, (spec, run) in zip(states, own, strict=True):
        if state.error is not None:
            failures[run.id] = state.error
            step = getattr(state.error, "step", state.step)
            run.fail(state.error, failed_at_step=step)
        else:
            truth = truths.get(state.id)
            entries = {"timings": timings} | ({"data": about_data} if about_data else {})
            write_results(state, spec, run, measured[state.id], truth, entries)
    return failures


def _measure(
    states: Sequence[GroupRun], source: ActivationSource, held_out_tokens: int
) -> dict[str, Reconstruction]:
    if not states:
        return {}
    chunks = source.held_out([state.hookpoint for state in states], held_out_tokens)
    return measure({state.id: (state.hookpoint, state.trained_sae()) for state in states}, chunks)


def _measure_truth(
    measured: Mapping[str, Reconstruction], source: ActivationSource, held_out_tokens: int
) -> dict[str, TruthResult]:
    """Measure SAEs against a world's features on the same held-out tokens; {} without a world."""
    if source.world is None or not measured:
        return {}
    samples = source.held_out_samples(held_out_tokens)
    return measure_truth({id: m.sae for id, m in measured.items()}, source.world, samples)
