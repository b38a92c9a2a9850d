"""Base classes of evaluations: settings, inputs and results.

    EvaluationConfig (evaluation=)  ──evaluate(subjects, evaluated)──►  Result of each run

An evaluation measures each SAE by itself; `compare` measures pairs. It receives all runs that were
trained on one source together, so that results about the model alone are computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.reading import Reading
from reseed.activations.source import ActivationSource
from reseed.config import Config, ConfigError
from reseed.evaluate.shared import SharedResults
from reseed.evaluations import Table
from reseed.sae.base import SAE

if TYPE_CHECKING:
    from reseed.experiment import Resolved


@dataclass(frozen=True, eq=False)
class Subject:
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
class Result:
    """The result of evaluating one SAE.

    Attributes:
        metrics: columns for the tables of sweeps, by name (``absorption_fraction``); None (not 0)
            if the metric cannot be evaluated.
        tables: long tables by name (``letters``).
        latents: arrays [num_latents] by name, columns of ``latents.parquet``.
    """

    metrics: Mapping[str, float | int | None]
    tables: Mapping[str, Table] = field(default_factory=dict)
    latents: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The open source of activations that the runs were trained on.

    Attributes:
        source: gives held-out activations (`ActivationSource.held_out`).
        shared: stores results about the model.
        note: shows a line of progress.
    """

    source: ActivationSource
    shared: SharedResults
    note: Callable[[str], None] = lambda message: None

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def model(self) -> LanguageModel | None:
        """The language model, which loads its weights on first use; None for a world and for
        Gaussian draws."""
        return self.source.model if isinstance(self.source, Reading) else None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if there is no model."""
        return None if self.model is None else self.model.resolved.tokenizer


@dataclass(frozen=True)
class EvaluationConfig(Config, ABC, family="evaluation"):
    """Base class of the configurations that ``evaluation=`` selects.

    Attributes:
        with_untrained: whether the evaluation needs each run's untrained SAE.
    """

    with_untrained: ClassVar[bool] = True

    def check(self, resolved: Resolved) -> None:
        """Refuse a run that cannot be evaluated, before anything is computed.

        Args:
            resolved: the run's experiment.

        Raises:
            ConfigError: with a key relative to ``evaluation``.
        """

    @abstractmethod
    def evaluate(
        self, subjects: Sequence[Subject], evaluated: Evaluated
    ) -> Iterator[tuple[str, Result]]:
        """Yield the id and result of each run as soon as it is computed.

        Args:
            subjects: at least one run; runs may differ in hookpoint.
            evaluated: the source that all of them were trained on.
        """


def needs_language_model(config: EvaluationConfig, resolved: Resolved) -> None:
    """Raise `ConfigError` if the activations are not those of a language model."""
    if not resolved.model.fingerprints.keys() >= {"model", "tokenizer"}:
        raise ConfigError(
            f"evaluation={config.name} needs a language model; {resolved.model_label} is a world "
            "of known features, without tokens. Use evaluation=reconstruction"
        )
    if resolved.experiment.surrogate == "gaussian":
        raise ConfigError(
            f"evaluation={config.name} needs a language model; activations of surrogate=gaussian "
            "are draws, without tokens. Use evaluation=reconstruction"
        )
