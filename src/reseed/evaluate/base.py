"""Base classes of evaluations: settings, inputs and results.

    EvaluationConfig (evaluation=)  ──evaluate(runs, inputs)──►  Result of each run

An evaluation measures each SAE by itself; `compare` measures pairs. It receives all runs that were
trained on one source together, so that results about the model alone (probes, activations of words)
are computed once for all SAEs and stored in a `ModelCache`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reseed.activations.found_model import FoundModel
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_files import no_logits
from reseed.activations.source import ActivationSource, ResolvedSource
from reseed.activations.text_source import TextSource
from reseed.config import digest
from reseed.errors import ConfigError
from reseed.sae.base import SAE
from reseed.store.results import EvaluationDeclaration, EvaluationError, Table
from reseed.store.results import Metric as Metric
from reseed.system.files import hold_lock
from reseed.system.integrity import is_intact, write_checked


@dataclass(frozen=True)
class EvaluationConfig(EvaluationDeclaration, ABC):
    """Base class of the configurations that ``evaluation=`` selects.

    A class declares its metrics and its table by `title`, `metrics` and the other attributes of
    `EvaluationDeclaration`.

    Attributes:
        with_untrained: whether the evaluation needs each run's untrained SAE.
    """

    with_untrained: ClassVar[bool] = True

    def check(self, source: RunSource) -> None:
        """Refuse a run that cannot be evaluated, before anything is computed.

        Args:
            source: the source of the run's activations.

        Raises:
            ConfigError: with a key relative to ``evaluation``.
        """

    @abstractmethod
    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        """Yield the id and result of each run as soon as it is computed.

        Args:
            runs: at least one run; runs may differ in hookpoint.
            inputs: the source that all of them were trained on.
        """

    def check_result(self, result: Result) -> None:
        """Raise `EvaluationError` unless a result has the metrics and latents that are declared."""
        parts = (
            ("metrics", self.metrics, result.metrics),
            ("latents", self.latents, result.latents),
        )
        for kind, declared, returned in parts:
            known = {metric.name: metric for metric in declared}
            place = f"`{type(self).__name__}.{kind}`"
            if extra := [name for name in returned if name not in known]:
                raise EvaluationError(
                    f"evaluation={self.name} returned {_listed(extra)}, which {place} does not "
                    "declare: add a `Metric` for each"
                )
            lacking = [
                n for n, metric in known.items() if n not in returned and not metric.optional
            ]
            if lacking:
                raise EvaluationError(
                    f"evaluation={self.name} did not return {_listed(lacking)}, which {place} "
                    "declares: return None for a metric that cannot be evaluated, or declare it "
                    "with `optional=True`"
                )


@dataclass(frozen=True, eq=False)
class RunSource:
    """The source of a run's activations, found but not opened.

    Attributes:
        model: the language model, the world or the stored activations.
        label: name of the model in tables and messages, followed by that of the surrogate
            (``embedded+random_weights``).
        surrogate: replacement of the model's activations: ``none``, ``gaussian`` (random draws with
            the same moments) or ``random_weights``.
    """

    model: ResolvedSource
    label: str
    surrogate: str

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer; None if there is no language model."""
        return self.model.tokenizer if isinstance(self.model, FoundModel) else None


def needs_language_model(config: EvaluationConfig, source: RunSource) -> None:
    """Raise `ConfigError` if the activations are not those of a language model."""
    if not source.model.fingerprints.keys() >= {"model", "tokenizer"}:
        raise ConfigError(
            f"evaluation={config.name} needs a language model; {source.label} is "
            f"{source.model.kind}, without tokens. Use evaluation=reconstruction"
        )
    if source.surrogate == "gaussian":
        raise ConfigError(
            f"evaluation={config.name} needs a language model; activations of surrogate=gaussian "
            "are random draws, without tokens. Use evaluation=reconstruction"
        )


def needs_unembedding(config: EvaluationConfig, source: RunSource) -> None:
    """Raise `ConfigError` if the language model is known to lack its unembedding."""
    if isinstance(source.model, FoundModel) and not source.model.has_unembedding:
        raise ConfigError(
            f"evaluation={config.name} needs the model's predictions; "
            f"{no_logits(source.model.location)}"
        )


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A run to evaluate.

    Attributes:
        id: the run's id.
        sae: the SAE, for raw activations, on the device of the source.
        hook: the hookpoint of the activations.
        untrained: the SAE at initialisation, also for raw activations; None if it is not known.
    """

    id: str
    sae: SAE
    hook: Hookpoint
    untrained: SAE | None = None


@dataclass(frozen=True, eq=False)
class EvaluationInput:
    """The open source of activations that the runs were trained on.

    Attributes:
        source: gives held-out activations (`ActivationSource.held_out`).
        model_cache: stores results about the model.
        progress: shows a line of progress.
    """

    source: ActivationSource
    model_cache: ModelCache
    progress: Callable[[str], None] = lambda message: None

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def model(self) -> LanguageModel | None:
        """The language model, which loads its weights on first use; None for other sources and
        for Gaussian draws."""
        return self.source.model if isinstance(self.source, TextSource) else None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if there is no model."""
        return None if self.model is None else self.model.resolved.tokenizer


@dataclass(frozen=True, eq=False)
class Result:
    """The result of evaluating one SAE.

    Attributes:
        metrics: columns for the tables of sweeps, by name (``absorption_fraction``); None (not 0)
            if the metric cannot be evaluated. `EvaluationConfig.metrics` declares them.
        tables: long tables by name (``letters``).
        latents: arrays [num_latents] by name, columns of ``latents.parquet``.
            `EvaluationConfig.latents` declares them.
    """

    metrics: Mapping[str, float | int | None]
    tables: Mapping[str, Table] = field(default_factory=dict)
    latents: Mapping[str, np.ndarray] = field(default_factory=dict)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


_DIGITS = 24


@dataclass(frozen=True)
class ModelCache:
    """A folder of tensors, each file keyed by what determines its content.

        <cache>/evaluations/<what>-<digest of key>.safetensors

    Attributes:
        cache: the folder of derived data.
    """

    cache: Path

    def get(
        self, what: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of ``key`` on the CPU; compute and store them if they are missing. If
        two processes need the same tensors, one computes and the other waits.

        Args:
            what: short name for the file.
            key: everything that determines the tensors, in plain values: fingerprints of model and
                tokenizer, dtype and attention, hookpoint, settings, seeds, a version.
            compute: computes the tensors.
        """
        path = self._path(what, key)
        found = _read(path)
        if found is None:
            with hold_lock(path.with_suffix(".lock")):
                found = _read(path)  # another process may have written the file meanwhile
                if found is None:
                    found = _write(path, key, compute())
        return found

    def is_missing(self, what: str, key: Mapping[str, Any]) -> bool:
        """Return whether no tensors are stored under ``key``."""
        return not is_intact(self._path(what, key))

    def put(self, what: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors that another computation produced, equal to those of `get`.

        This takes no lock: the holder of the lock may be waiting for a lock of this process, and
        would write the same tensors.
        """
        _write(self._path(what, key), key, tensors)

    def _path(self, what: str, key: Mapping[str, Any]) -> Path:
        return self.cache / "evaluations" / f"{what}-{digest(dict(key), _DIGITS)}.safetensors"


def _write(path: Path, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {"key": json.dumps(dict(key), sort_keys=True)}
    write_checked(path, lambda part: save_file(found, part, about))
    return found


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the stored tensors; None if the file is missing or damaged: it is recomputed."""
    return load_file(path) if is_intact(path) else None
