"""Train one group: SAEs that read the same stream, in one pass of the language model."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from reseed.activations.source import ActivationSource
from reseed.activations.stream import STRIPES, ChunkStream, Position
from reseed.atomic import DiskFullError
from reseed.config import ReseedError
from reseed.console import counted, say
from reseed.devices import free_memory, is_out_of_memory, pick_device
from reseed.evaluate.reconstruction import Reconstruction, measure
from reseed.evaluate.truth import TruthResult, measure_truth
from reseed.runs import INITIAL_FILE, Run, RunStore, seconds_since
from reseed.train.callbacks import Bookkeeper, GroupProgress, Heartbeat, StopAtBorder, Stopped
from reseed.train.config import RuntimeConfig
from reseed.train.data import ActivationData, StreamDataset
from reseed.train.imported import ImportedMember
from reseed.train.member import Member, NotFiniteError
from reseed.train.module import GroupModule
from reseed.train.plan import OutOfMemory
from reseed.train.record import AnyMember, record

if TYPE_CHECKING:
    from reseed.experiment import Resolved


def fit_group(
    group: Sequence[Resolved], store: RunStore, runtime: RuntimeConfig
) -> dict[str, BaseException]:
    """Train, measure and record the runs of a group. The caller holds their locks. What was
    trained elsewhere is measured and recorded with them.

    Returns:
        the error of each run that failed, by run id. One that fails does not stop the others.

    Raises:
        Interrupted: after SIGINT or SIGTERM; the same command goes on where this one stopped.
        OutOfMemory: so does it after this, but better with fewer of them.
        DiskFullError: no failure of these runs either.
    """
    clock = time.perf_counter()
    runs = [resolved.run(store) for resolved in group]
    for resolved, run in zip(group, runs, strict=True):
        run.begin(resolved.record() | {"group": [r.signature for r in group]})
    try:
        return _fit(group, runs, runtime, clock)
    except (KeyboardInterrupt, DiskFullError):
        _interrupt(runs)
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            # Members that were recorded already keep their own outcome.
            for run in runs:
                if run.record["status"] == "running":
                    run.fail(error)
            raise
        reason = str(error).splitlines()[0]
    # Outside of the handler: the error holds on to every frame, and so to the memory.
    _interrupt(runs)
    free_memory()
    raise OutOfMemory(f"out of memory with {counted(len(runs), 'SAE')} ({reason})")


def _interrupt(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.record["status"] == "running":
            with suppress(DiskFullError):  # then it is `running` without an owner: the same
                run.update(status="interrupted")


def _fit(
    group: Sequence[Resolved], runs: Sequence[Run], runtime: RuntimeConfig, clock: float
) -> dict[str, BaseException]:
    first = group[0]
    device = pick_device(runtime.device)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    needed = max(r.experiment.training.tokens for r in group)
    source = first.open(device, needed, runtime.open_cache())
    stream = source.stream([r.experiment.hook for r in group])
    training = [r.experiment.training for r in group if r.pretrained is None]
    wanted = [(recipe.batch_size, recipe.steps) for recipe in training]
    source.check_length(stream, wanted, first.data.label)
    calibrating = any(r.role for r in group)  # which says of itself what there is to say

    members = [_member(r, run, source, stream) for r, run in zip(group, runs, strict=True)]
    started = time.perf_counter()
    trained = [m for m in members if isinstance(m, Member)]
    if any(m.active for m in trained):
        _train(trained, runs, stream, runtime)
    training_s = seconds_since(started)

    started = time.perf_counter()
    for member in members:
        _check(member)
    sound = [m for m in members if m.error is None]
    measured = _measure(sound, source, first)
    truths = _measure_truth(measured, source, first)
    timings = {"training_s": training_s, "held_out_s": seconds_since(started)}
    failures: dict[str, BaseException] = {}
    for member, resolved, run in zip(members, group, runs, strict=True):
        if member.error is not None:
            failures[run.id] = member.error
            step = getattr(member.error, "step", member.step)
            run.fail(member.error, failed_at_step=step)
            continue
        own = measured[member.id], truths.get(member.id)
        record(member, resolved, run, *own, timings | {"group_runs": len(group)})
    if not calibrating:
        say(f"  {len(sound)} of {len(group)} runs finished in {seconds_since(clock):,.1f} s")
    return failures


def _train(
    members: Sequence[Member], runs: Sequence[Run], stream: ChunkStream, runtime: RuntimeConfig
) -> None:
    module = GroupModule(members, stream)
    own = {member.id for member in members}
    folders = {run.id: run.path for run in runs if run.id in own}
    books = Bookkeeper(folders, runtime.log_every_steps, runtime.checkpoint_every_s)
    border = StopAtBorder(books)
    progress = GroupProgress(members, runtime.progress)
    heartbeat = Heartbeat(members, folders, runtime.heartbeat_every_s)
    if progress.first:
        say(f"  going on after {progress.first:,} of {progress.total:,} tokens")
    device = stream.device
    with _quiet_lightning():
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_epochs=1,
            callbacks=[books, border, progress, heartbeat],
            plugins=[LightningEnvironment()],  # under SLURM too: who submits also requeues
            logger=_loggers(runtime),
            enable_checkpointing=False,  # checkpoints belong to runs: see Bookkeeper
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        sizes = [m.training.batch_size for m in members]
        start = min(stream.position(m.step, m.training.batch_size) for m in members if m.active)
        stop = max(_end(stream, m) for m in members)
        dataset = StreamDataset(stream, sizes, start, stop)
        try:
            with stream.prefetching(stop, min(sizes), runtime.prefetch):
                trainer.fit(module, datamodule=ActivationData(dataset))
        except Stopped:
            pass
        except SystemExit as end:
            # Lightning's way with a signal that comes before our handlers are in place.
            signalled = end.__context__ if isinstance(end.__context__, KeyboardInterrupt) else end
            raise signalled from None
        finally:
            border.restore()
    border.check()


def _end(stream: ChunkStream, member: Member) -> Position:
    """Where a member's last batch ends."""
    size = member.training.batch_size
    last = stream.position(member.training.steps - 1, size)
    return Position(last.chunk, last.row + size // STRIPES)


def _member(
    resolved: Resolved, run: Run, source: ActivationSource, stream: ChunkStream
) -> AnyMember:
    """The run's state: from its checkpoint, from the first chunk of activations, or as it is."""
    e = resolved.experiment
    if resolved.pretrained is not None:
        return ImportedMember(run.id, e.hook, resolved.pretrained, source.device)
    member = Member(
        run.id, e.hook, resolved.sae, e.training, resolved.d_in, resolved.init_seed, source.device
    )
    if resolved.role == "steered":
        member.steer()
    with member.failing_alone():
        _begin(member, run, source, stream)
    return member


def _begin(member: Member, run: Run, source: ActivationSource, stream: ChunkStream) -> None:
    checkpoint = run.path / "checkpoint.pt"
    if checkpoint.is_file():
        try:
            member.load(checkpoint)
            return
        except Exception as error:
            raise ReseedError(
                f"{checkpoint} cannot be read ({error}); delete it to train this run anew"
            ) from error
    truth = None if source.world is None else source.world.dictionary
    member.start(stream.chunk(0)[member.hookpoint].flatten(0, 1), truth)
    member.save_start(run.path / INITIAL_FILE)


def _measure(
    members: Sequence[AnyMember], source: ActivationSource, first: Resolved
) -> dict[str, Reconstruction]:
    if not members:
        return {}
    dataset = first.experiment.dataset
    hooks = [m.hookpoint for m in members]
    chunks = source.held_out(hooks, dataset.held_out_tokens)
    return measure({m.id: (m.hookpoint, m.result()) for m in members}, chunks)


def _measure_truth(
    measured: Mapping[str, Reconstruction], source: ActivationSource, first: Resolved
) -> dict[str, TruthResult]:
    """Against the features of a world, on the same held-out tokens; of a model nothing."""
    if source.world is None or not measured:
        return {}
    samples = source.held_out_samples(first.experiment.dataset.held_out_tokens)
    return measure_truth({id: m.sae for id, m in measured.items()}, source.world, samples)


def _check(member: AnyMember) -> None:
    if member.error is None:
        try:
            member.check_weights()
        except NotFiniteError as error:
            member.error = error


def _loggers(runtime: RuntimeConfig) -> list[Any]:
    """TensorBoard and W&B on demand; training.csv is always written, by ourselves."""
    from lightning.pytorch import loggers

    made: list[Any] = []
    if "tensorboard" in runtime.loggers:
        made.append(loggers.TensorBoardLogger(Path(runtime.outputs) / "tensorboard", name=""))
    if "wandb" in runtime.loggers:
        made.append(loggers.WandbLogger(project="reseed", save_dir=runtime.outputs))
    return made


@contextmanager
def _quiet_lightning():
    """Lightning's hints on devices and workers say nothing that our own lines do not."""
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
