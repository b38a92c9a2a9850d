"""What every evaluation of SAEs has: its settings, what it is given, what it gives.

    EvaluationConfig (evaluation=)  ──evaluate(subjects, evaluated)──►  Result for each subject

An evaluation looks at one SAE at a time (pairs are for `compare`); but all that were trained on
one source are given together, so that what is about the model alone is made once.
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
    """One SAE under evaluation.

    Attributes:
        id: the run's.
        sae: for raw activations, on the device of the source.
        hook: where these are read.
        untrained: the SAE as it was born, for raw activations too; None where that is not known.
    """

    id: str
    sae: SAE
    hook: Hookpoint
    untrained: SAE | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """What an evaluation found of one SAE.

    Attributes:
        metrics: flat columns for the tables of sweeps, by name (``absorption_fraction``); None
            where it cannot be evaluated, which is not 0.
        tables: long tables by name (``letters``).
        latents: arrays [num_latents] by name, which join ``latents.parquet``.
    """

    metrics: Mapping[str, float | int | None]
    tables: Mapping[str, Table] = field(default_factory=dict)
    latents: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What subjects were trained on, opened.

    Attributes:
        source: gives held-out activations (`ActivationSource.held_out`).
        shared: keeps results about the model.
        note: told how far it is, in a line.
    """

    source: ActivationSource
    shared: SharedResults
    note: Callable[[str], None] = lambda message: None

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def model(self) -> LanguageModel | None:
        """The language model, which loads its weights when they are first needed; None for a world
        and for draws."""
        return self.source.model if isinstance(self.source, Reading) else None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, None where there is no model."""
        return None if self.model is None else self.model.resolved.tokenizer


@dataclass(frozen=True)
class EvaluationConfig(Config, ABC, family="evaluation"):
    """What ``evaluation=`` may name.

    Attributes:
        with_untrained: whether subjects shall come with their untrained selves.
    """

    with_untrained: ClassVar[bool] = True

    def check(self, resolved: Resolved) -> None:
        """Refuse what cannot be evaluated before anything is computed.

        Args:
            resolved: the experiment of a subject.

        Raises:
            ConfigError: with a key relative to ``evaluation``.
        """

    @abstractmethod
    def evaluate(
        self, subjects: Sequence[Subject], evaluated: Evaluated
    ) -> Iterator[tuple[str, Result]]:
        """The result of each subject, with its id, as soon as it is there.

        Args:
            subjects: at least one; they may differ in hookpoint.
            evaluated: what all of them were trained on.
        """


def needs_language_model(config: EvaluationConfig, resolved: Resolved) -> None:
    """Raise `ConfigError` where the activations are not those of a language model."""
    if not resolved.model.fingerprints.keys() >= {"model", "tokenizer"}:
        raise ConfigError(
            f"evaluation={config.name} needs a language model; {resolved.model_label} is a world "
            "of known features, without tokens. What can be evaluated there is "
            "evaluation=reconstruction"
        )
    if resolved.experiment.surrogate == "gaussian":
        raise ConfigError(
            f"evaluation={config.name} needs a language model; activations of surrogate=gaussian "
            "are draws, without tokens. What can be evaluated there is evaluation=reconstruction"
        )
