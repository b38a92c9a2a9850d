"""Execution of evaluations: each result is written as soon as it is computed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from reseed.activations.source import ActivationSource
from reseed.compare.dictionary import untrained_sae
from reseed.config import digest
from reseed.errors import ConfigError, ReseedError
from reseed.evaluate.base import EvaluationConfig, EvaluationInput, LoadedRun, ModelCache, Result
from reseed.experiment.resolve import Resolved, cache_folder
from reseed.sae.checkpoint import WEIGHTS_FILE, load_sae
from reseed.store.results import (
    FOLDER,
    EvaluationError,
    StoredEvaluation,
    result_folder,
    write_failure,
)
from reseed.store.runs import Run
from reseed.store.sweeps import Sweep
from reseed.study.held_out import held_out_settings, resolve_record
from reseed.system.console import counted, say, seconds_since
from reseed.system.devices import free_memory, pick_device
from reseed.system.environment import allow_open_files
from reseed.system.files import DiskFullError, lock_file, room_for
from reseed.system.integrity import sha256_of
from reseed.train.config import RuntimeConfig

MOST_LOCKS = 256
"""Maximum number of SAEs that a process locks at a time. Each lock is an open file, and a process
may have about 1,024 of them."""
LOCK = ".lock"
"""File in a result's folder, locked by the process that computes the result."""
BYTES_PER_PASS = 8 * 2**30
"""Maximum size of the SAEs that are evaluated in one pass; more SAEs take several passes."""


@dataclass(frozen=True)
class SavedRun:
    """An SAE to be evaluated.

    Attributes:
        folder: the folder of the run, or of an SAE that is not a run.
        resolved: the resolved experiment that the SAE was trained in.
    """

    folder: Path
    resolved: Resolved

    @property
    def id(self) -> str:
        return self.folder.name if Run(self.folder).exists else str(self.folder)

    @property
    def is_run(self) -> bool:
        """True if the folder is a run, whose record says what it was trained on."""
        return Run(self.folder).exists

    @property
    def trained(self) -> bool:
        """True if the folder holds a finished run."""
        return Run(self.folder).finished

    @property
    def source(self) -> str:
        """Digest of all that determines the held-out activations except the hookpoint.

        SAEs with the same source are evaluated together.
        """
        identity = self.resolved.identity
        parts = [
            identity["model"],
            held_out_settings(identity["dataset"]),
            identity.get("surrogate"),
        ]
        return digest([*parts, identity["fingerprints"]])

    def result_folder(self, config: EvaluationConfig) -> Path:
        """Return the folder of an evaluation's result.

        The record of a run contains its model and data. For an SAE that is not a run, the digest in
        the folder's name includes its weights and the activations that it is evaluated on.
        """
        signed = config.signed()
        if not Run(self.folder).exists:
            hook = self.resolved.experiment.hook
            weights = sha256_of(self.folder / WEIGHTS_FILE)
            signed |= {"source": self.source, "hookpoint": str(hook), "weights": weights}
            signed |= self.resolved.model.site_identity(hook)
        return result_folder(self.folder, config.name, signed)

    def has_result(self, config: EvaluationConfig) -> bool:
        """Return True if a readable result of the evaluation exists."""
        return self.lack(config) is None

    def lack(self, config: EvaluationConfig) -> str | None:
        """Return None if a readable result exists, "" if there is none, else what is wrong."""
        try:
            StoredEvaluation.read(self.result_folder(config), self.weights)
        except FileNotFoundError:
            return ""
        except EvaluationError as error:
            return str(error)
        return None

    @property
    def weights(self) -> str | None:
        """SHA-256 of the weights of a run; None if its record lacks it, and for other SAEs."""
        return Run(self.folder).hashes().get(WEIGHTS_FILE) if self.is_run else None

    def load(self, device: str, with_untrained: bool) -> LoadedRun:
        """Load the SAE.

        Raises:
            ReseedError: the SAE cannot be loaded.
        """
        if self.is_run:
            Run(self.folder).verify()
        sae = load_sae(self.folder, device)
        untrained = untrained_sae(Run(self.folder)) if with_untrained else None
        hook = self.resolved.experiment.hook
        return LoadedRun(self.id, sae, hook, untrained.to(device) if untrained else None)


def saved_run(
    folder: Path, runtime: RuntimeConfig, declared: Callable[[], Resolved] | None = None
) -> SavedRun:
    """Return the SAE in a folder with the experiment it was trained in.

    Args:
        declared: resolves the experiment that the command line declares; called for an SAE that is
            not a run.

    Raises:
        ReseedError: the model or data of a run is missing or has changed, or the width of an SAE
            differs from that of the declared activations.
    """
    run = Run(folder)
    if run.exists:
        return SavedRun(folder, resolve_record(run.record, runtime))
    assert declared is not None
    resolved, d_in = declared(), load_sae(folder).d_in
    if d_in != resolved.d_in:
        raise ReseedError(
            f"{folder}: its `d_in` (={d_in}) must equal that of {resolved.experiment.hook} of "
            f"{resolved.model_label} (={resolved.d_in})"
        )
    return SavedRun(folder, resolved)


def check_evaluations(
    configs: Sequence[EvaluationConfig], experiments: Mapping[str, Resolved]
) -> None:
    """Raise `ConfigError` if an evaluation does not apply to an SAE.

    Args:
        experiments: the experiments of the SAEs, by name.
    """
    for config in configs:
        for name, resolved in experiments.items():
            try:
                config.check(resolved.source)
            except ConfigError as error:
                raise ConfigError(f"{error.within('evaluation')} ({name})") from error


def show_evaluations(configs: Sequence[EvaluationConfig], sweeps: Sequence[Sweep]) -> None:
    """Register evaluations for the tables of sweeps.

    If several share a name, the last is used, with a notice.
    """
    names = [config.name for config in configs]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        say(
            f"tables show evaluation={name} with its last settings; the runs' folders hold all "
            "results"
        )
    for sweep in sweeps:
        sweep.add_evaluations({config.name: config for config in configs})


Evaluate = Callable[
    [Sequence[SavedRun], Sequence[EvaluationConfig], RuntimeConfig, Path], list[Exception]
]


def evaluate_saved(
    saved: Sequence[SavedRun],
    configs: Sequence[EvaluationConfig],
    sweeps: Sequence[Sweep],
    runtime: RuntimeConfig,
    evaluate: Evaluate,
) -> list[Exception]:
    """Check evaluations, and perform those without a result.

    Args:
        sweeps: the sweeps whose tables show the results.
        evaluate: performs them, and returns the errors.

    Returns:
        the errors.

    Raises:
        ConfigError: none is given, or one does not apply to an SAE.
    """
    if not configs:
        raise ConfigError(
            "{key} is required, for example evaluation=reconstruction,faithfulness", "evaluation"
        )
    check_evaluations(configs, {one.id: one.resolved for one in saved})
    show_evaluations(configs, sweeps)
    folder = sweeps[0].path if sweeps else saved[0].folder
    return evaluate(saved, configs, runtime, folder / FOLDER)


class Evaluator:
    """Evaluator of SAEs, with the activation sources that they read.

    The first evaluation that needs a source opens it; the next ones reuse it.

    Args:
        runs: the SAEs.
        runtime: device, threads and folders.
    """

    def __init__(self, runs: Sequence[SavedRun], runtime: RuntimeConfig) -> None:
        self.runtime, self.device = runtime, pick_device(runtime.device)
        self.groups: dict[str, list[SavedRun]] = {}
        for run in runs:
            self.groups.setdefault(run.source, []).append(run)
        self._opened: dict[str, ActivationSource] = {}
        if runtime.threads is not None:
            torch.set_num_threads(runtime.threads)

    def outcome(self, config: EvaluationConfig) -> Exception | None:
        """Evaluate the SAEs without a result; a failure of one does not stop the others.

        Returns:
            None, or an error that describes the failures.
        """
        failed: dict[str, Exception] = {}
        for source, runs in self.groups.items():
            lacks = [(run, run.lack(config)) for run in runs]
            missing = [run for run, lack in lacks if lack is not None]
            for damage in (lack for _, lack in lacks if lack):
                say(f"  {damage}")
            done = len(runs) - len(missing)
            if done:
                say(f"  {config.name}: {counted(done, 'SAE')} already evaluated")
            for first in range(0, len(missing), MOST_LOCKS):
                failed |= self._evaluate_some(source, missing[first : first + MOST_LOCKS], config)
        if not failed:
            return None
        (first, error), *others = failed.items()
        more = f" (and {len(others)} more)" if others else ""
        return ReseedError(f"evaluation={config.name}: {first}: {error}{more}")

    def _evaluate_some(
        self, source: str, runs: Sequence[SavedRun], config: EvaluationConfig
    ) -> dict[str, Exception]:
        """Evaluate the SAEs that no other process has locked, then those that the other processes
        did not finish."""
        with _claimed(runs, config) as mine:
            failed = self._evaluate_all(source, mine, config) if mine else {}
        others = [t for t in runs if t.id not in failed and not t.has_result(config)]
        if others:
            say(f"  {config.name}: waiting for another process ({counted(len(others), 'SAE')})")
        for run in others:
            with _claimed([run], config, wait=True) as mine:
                failed |= self._evaluate_all(source, mine, config) if mine else {}
        return failed

    def _evaluate_all(
        self, source: str, runs: Sequence[SavedRun], config: EvaluationConfig
    ) -> dict[str, Exception]:
        """Evaluate SAEs together; after a failure, the remaining ones one by one."""
        resolved = runs[0].resolved
        on = f"{resolved.model_label} and {resolved.data.label}"
        say(f"  {config.name}: evaluating {counted(len(runs), 'SAE')} on {on}")
        start = time.perf_counter()
        left = {run.id: run for run in runs}
        try:
            self._evaluate(source, left, config)
        except DiskFullError:  # the SAEs are not at fault, and the next one would fail too
            raise
        except Exception as error:
            alone = len(left) == 1 or isinstance(error, ConfigError)
            failed = dict.fromkeys(left, error) if alone else {}
        else:
            failed = {}
        if left and not failed:  # outside of the handler, whose exception keeps memory alive
            free_memory()
            failed = self._one_by_one(source, list(left.values()), config)
        for run in runs:
            if run.id in failed:
                write_failure(run.result_folder(config), failed[run.id])
        done = f"{len(runs) - len(failed)} of {counted(len(runs), 'SAE')}"
        say(f"  {config.name}: {done} in {seconds_since(start):,.1f} s")
        return failed

    def _one_by_one(
        self, source: str, runs: Sequence[SavedRun], config: EvaluationConfig
    ) -> dict[str, Exception]:
        failed: dict[str, Exception] = {}
        for run in runs:
            try:
                self._evaluate(source, {run.id: run}, config)
            except DiskFullError:
                raise
            except Exception as error:
                failed[run.id] = error
        return failed

    def _evaluate(self, source: str, left: dict[str, SavedRun], config: EvaluationConfig) -> None:
        """Evaluate the SAEs in ``left``, and remove each from it when its result is written."""
        cache = ModelCache(cache_folder(self.runtime))
        evaluated = EvaluationInput(
            self._open(source), cache, lambda message: say(f"    {message}")
        )
        for part in _passes(list(left.values())):
            weights = {t.id: t.weights for t in part}  # a run may be trained again meanwhile
            loaded = [t.load(str(self.device), config.with_untrained) for t in part]
            start = time.perf_counter()
            for name, result in config.evaluate(loaded, evaluated):
                _write(left[name], config, result, weights[name], seconds_since(start))
                del left[name]
                start = time.perf_counter()

    def _open(self, source: str) -> ActivationSource:
        if source not in self._opened:
            self._opened.clear()  # one model at a time
            free_memory()
            runs = self.groups[source]
            needed = max(t.resolved.tokens for t in runs)
            resolved = runs[0].resolved
            self._opened[source] = resolved.open(self.device, needed, self.runtime.open_cache())
        return self._opened[source]


def _passes(runs: Sequence[SavedRun]) -> list[list[SavedRun]]:
    """Split the runs into lists of at least one whose weights fit into `BYTES_PER_PASS`."""
    parts: list[list[SavedRun]] = []
    size = 0
    for run in runs:
        own = 8 * run.resolved.num_latents * run.resolved.d_in  # two matrices in float32
        if not parts or size + own > BYTES_PER_PASS:
            parts.append([])
            size = 0
        parts[-1].append(run)
        size += own
    return parts


@contextmanager
def _claimed(
    runs: Sequence[SavedRun], config: EvaluationConfig, wait: bool = False
) -> Iterator[list[SavedRun]]:
    """Lock and yield the runs without a result that no other process has locked for this
    evaluation.

    Args:
        wait: wait for runs that another process has locked, instead of leaving them out.
    """
    handles: list[int] = []
    allow_open_files(len(runs), f"an evaluation of {len(runs):,} runs")
    try:
        mine = []
        for run in runs:
            folder = run.result_folder(config)
            with room_for(folder):
                folder.mkdir(parents=True, exist_ok=True)
                handle = lock_file(folder / LOCK, wait_s=None if wait else 0.0)
            if handle is not None:
                handles.append(handle)
                if not run.has_result(config):  # another process may just have written it
                    mine.append(run)
        yield mine
    finally:
        for handle in handles:
            os.close(handle)


def _write(
    run: SavedRun, config: EvaluationConfig, result: Result, weights: str | None, seconds: float
) -> None:
    config.check_result(result)
    stored = StoredEvaluation(
        config.name, config.to_dict(), result.metrics, result.tables, result.latents
    )
    own = {"subject": run.id, "weights": weights, "seconds": seconds}
    stored.write(run.result_folder(config), **own)
