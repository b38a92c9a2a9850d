"""Lightning callbacks of training: curves, checkpoints, progress, and stopping on signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reseed.errors import Interrupted
from reseed.store.runs import CHECKPOINT_FILE, PROGRESS_FILE
from reseed.system.console import console, has_terminal, say
from reseed.system.files import write_json_unsynced
from reseed.train.run_state import NotFiniteError, RunState
from reseed.train.trainer import GroupModule


class CheckpointCallback(L.Callback):
    """A callback that closes curve rows and saves each run's state into its own folder.

    A checkpoint belongs to a run, not to a group: a run resumes from its own checkpoint, whatever
    groups the next command forms. Runs that are ahead wait for the run that is furthest behind.

    Args:
        folders: the folders of the runs, by id.
        writes: whether this process writes; if several ranks train the same SAEs, only one does.
        reads_to_end: whether other ranks need this rank to read the stream to its end.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        log_every_steps: int,
        checkpoint_every_s: float,
        writes: bool = True,
        reads_to_end: bool = False,
    ) -> None:
        self.folders, self.writes, self.reads_to_end = folders, writes, reads_to_end
        self.log_every_steps = log_every_steps
        self.checkpoint_every_s = checkpoint_every_s
        self.started = self.saved = time.perf_counter()
        self.cost = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: GroupModule) -> None:
        self.started = self.saved = time.perf_counter()
        self.trainer = trainer
        pl_module.after_step = self.after_step

    def after_step(self, run: RunState) -> None:
        """Close a row of the curve if one is due; save the run if it has made all its steps."""
        last = not run.active
        if last or run.step % self.log_every_steps == 0:
            self._log(run)
        if last and run.error is None:
            self._save(run)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GroupModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Checkpoints of a large group take long: limit them to a twentieth of the time, unless the
        # user asks for more than one per second.
        spared = 20 * self.cost if self.checkpoint_every_s >= 1 else 0.0
        if time.perf_counter() - self.saved >= max(self.checkpoint_every_s, spared):
            self.save(pl_module)
        if not (pl_module.active or self.reads_to_end):
            trainer.should_stop = True

    def save(self, module: GroupModule) -> None:
        """Checkpoint every run that still has steps to make."""
        started = time.perf_counter()
        for run in module.runs:
            if run.active:
                self._save(run)
        self.saved = time.perf_counter()
        self.cost = self.saved - started

    def _save(self, run: RunState) -> None:
        if run.failed or not self.writes:
            return  # keep the last checkpoint with finite values
        folder = self.folders[run.id]
        run.save(folder / CHECKPOINT_FILE, time.perf_counter() - self.started)
        run.write_curve(folder)

    def _log(self, run: RunState) -> None:
        try:
            row = run.close_curve_row(time.perf_counter() - self.started)
        except NotFiniteError as error:
            run.error = error
            say(f"failed: {run.id}: {error}")
            return
        for logger in self.trainer.loggers:
            logger.log_metrics({f"{run.id}/{k}": v for k, v in row.items()}, step=run.step)


class StopSignal(BaseException):
    """Exception that the signal handler raises if training can end at once.

    It is not a KeyboardInterrupt, because Lightning would end the process without a message.
    """


class StopOnSignal(L.Callback):
    """A callback that, on SIGINT or SIGTERM, ends training between two steps with a checkpoint.

    A signal that comes while the next activations are computed, which may take long, ends training
    at once. A second SIGINT ends training without another checkpoint; the last one stays valid.

    Args:
        synchronous: whether several ranks make each step together and so must end after the same
            step. If true, training ends only after the current activations are computed.
    """

    def __init__(self, checkpoints: CheckpointCallback, synchronous: bool = False) -> None:
        self.checkpoints, self.synchronous = checkpoints, synchronous
        self.signal: int | None = None
        self.stepping = False
        self.module: GroupModule | None = None
        # Read them before fit begins, when Lightning installs its own SIGTERM handler, which only
        # notes the signal.
        main = threading.current_thread() is threading.main_thread()  # others get no signals
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def on_train_start(self, trainer: L.Trainer, pl_module: GroupModule) -> None:
        # Not earlier: Lightning would replace the handlers.
        self.module = pl_module
        for number in self._before:
            signal.signal(number, self._note)

    def check(self) -> None:
        """Raise `Interrupted` if a signal stopped training."""
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            raise Interrupted(
                f"stopped by {name}; saved. The same command continues from here.", self.signal
            )

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.stepping = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GroupModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.stopping if self.synchronous else self.signal is not None:
            self.signal = self.signal or signal.SIGTERM  # another rank received it
            self.checkpoints.save(pl_module)
            trainer.should_stop = True
        self.stepping = False
        if self.signal is not None and not (trainer.should_stop or self.synchronous):
            raise StopSignal  # the signal came after the check above

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        # Between batches the state of every run is consistent.
        if isinstance(exception, StopSignal) and not (self.stepping or self.synchronous):
            self.checkpoints.save(pl_module)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        if again and number != signal.SIGINT:
            return
        self.signal = self.signal or number
        if self.module is not None and self.synchronous:
            self.module.wants_to_stop = True
        elif self.module is not None:
            self.module.stopping = True
        if again or not (self.stepping or self.synchronous):
            raise StopSignal


class ProgressWriter(L.Callback):
    """A callback that periodically writes each run's progress to progress.json, which
    `reseed status` reads."""

    def __init__(
        self, runs: Sequence[RunState], folders: Mapping[str, Path], every_s: float
    ) -> None:
        self.runs, self.folders, self.every_s = runs, folders, every_s
        self.cost = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_written = self.started = time.perf_counter()
        self.first = {run.id: run.step for run in self.runs}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GroupModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        # On a slow shared file system, limit the writing to a twentieth of the time.
        if now - self.last_written < max(self.every_s, 20 * self.cost):
            return
        for run in self.runs:
            if run.active:
                size = run.training.batch_size
                made = (run.step - self.first[run.id]) * size
                said = {"tokens": run.step * size, "tokens_per_s": made / (now - self.started),
                        "at": time.time()}  # fmt: skip
                write_json_unsynced(self.folders[run.id] / PROGRESS_FILE, said)
        self.last_written = time.perf_counter()
        self.cost = self.last_written - now


class GroupProgress(ProgressBar):
    """A progress line for the group: tokens/s, and mean FVU, L0 and dead fraction of its runs.

    It shows the tokens of the run that has seen the most tokens. On a terminal it is a bar;
    otherwise a line is printed every ten seconds.
    """

    def __init__(self, runs: Sequence[RunState], shown: bool) -> None:
        super().__init__()
        self.runs, self.shown = runs, shown
        self.total = max(run.training.steps * run.training.batch_size for run in runs)
        self.first = self.tokens
        self.bar: Progress | None = None
        self.last_printed = self.started = time.perf_counter()

    @property
    def tokens(self) -> int:
        """Number of tokens that the run furthest ahead has seen."""
        return max(run.step * run.training.batch_size for run in self.runs)

    def disable(self) -> None:
        self.shown = False

    def enable(self) -> None:
        self.shown = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last_printed = self.started = time.perf_counter()
        if self.shown and has_terminal():
            # In a narrow window the end is cut off, so the measures are last.
            columns = (BarColumn(12), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn())
            columns += (TextColumn("left"), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[text]}"),
                                console=console(), transient=True)  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.first, text="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GroupModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.shown:
            return
        now, tokens = time.perf_counter(), self.tokens
        interval = 0.25 if self.bar is not None else 10.0
        if now - self.last_printed < interval:
            return
        self.last_printed = now
        rate = (tokens - self.first) / max(now - self.started, 1e-9)
        text = f"{rate:,.0f} tokens/s{_measures(self.runs)}"
        if self.bar is not None:
            self.bar.update(self.task, completed=tokens, text=text)
        else:
            say(f"  {tokens:,} of {self.total:,} tokens · {text}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _measures(runs: Sequence[RunState]) -> str:
    rows = [run.curve.rows[-1] for run in runs if run.curve.rows and run.error is None]
    if not rows:
        return ""
    mean = f"mean of {len(rows)}: " if len(rows) > 1 else ""
    fvu, l0, dead = (
        sum(row[name] for row in rows) / len(rows) for name in ("fvu", "l0", "dead_fraction")
    )
    return f" · {mean}FVU {fvu:.3f} · L0 {l0:.1f} · dead {dead:.0%}"
