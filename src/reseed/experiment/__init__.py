"""One experiment as the user declares it: the five knobs and the other option groups.

`reseed.experiment.resolve` finds its model and data, checks it, and gives it its signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reseed.activations.dataset import DatasetConfig, check_batch_size
from reseed.activations.hookpoints import Hookpoint, HookpointConfig
from reseed.activations.source import SourceConfig
from reseed.activations.synthetic.surrogate import SURROGATES
from reseed.config import Config, build, make, setting
from reseed.errors import ConfigError, did_you_mean
from reseed.sae.base import SAEConfig, SAEOption
from reseed.sae.pretrained import Pretrained
from reseed.train.config import ArchetypalDecoder, RuntimeConfig, TrainingConfig, TruthStart

_GROUPS = {
    "model": SourceConfig,
    "hookpoint": HookpointConfig,
    "dataset": DatasetConfig,
    "sae": SAEOption,
    "training": TrainingConfig,
}
_SCALARS = ("layer", "seed", "seed_scope", "surrogate")
_REQUIRED = (*_GROUPS, *_SCALARS, "runtime")
_ROOT = (*_REQUIRED, "source", "comparison", "evaluation", "plan_only", "wait", "objective")


@dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """One SAE to be trained: the five knobs and the other option groups."""

    model: SourceConfig
    layer: int = setting(at_least=0)
    hookpoint: HookpointConfig
    dataset: DatasetConfig
    sae: SAEOption
    training: TrainingConfig
    seed: int = setting(at_least=0)
    seed_scope: str = setting("cell", choices=("cell", "shared"), neutral="cell")
    """``cell``: initial weights depend on the seed and on everything else in the cell; ``shared``:
    on the seed alone, so that runs of different cells with one seed start from equal draws."""
    surrogate: str = setting("none", choices=SURROGATES, neutral="none")
    """Replacement of the source's activations: ``gaussian``, draws with their moments;
    ``random_weights``, those of the same language model before any training."""

    def validate(self) -> None:
        if self.surrogate == "gaussian":  # the moments do not depend on a subset or a budget
            object.__setattr__(self, "dataset", self.dataset.without_subset())
        check_batch_size(self.dataset, self.training.batch_size)
        archetypal = isinstance(self.training.decoder_options, ArchetypalDecoder)
        start = "decoder=archetypal" if archetypal else "start=truth"
        made = archetypal or isinstance(self.training.start_options, TruthStart)
        if made and isinstance(self.sae, SAEConfig) and self.sae.encoder_init == "untied":
            raise ConfigError(
                f"{{key}} must be tied with training.{start}, which sets both rows of a latent; "
                "got untied",
                "sae.encoder_init",
            )

    @property
    def hook(self) -> Hookpoint:
        return Hookpoint.of(self.hookpoint, self.layer)

    @property
    def architecture(self) -> SAEConfig:
        """Configuration of the SAE; for a pretrained one, known once it is resolved."""
        assert isinstance(self.sae, SAEConfig)
        return self.sae

    def of_pretrained(self, found: Pretrained) -> Experiment:
        """Return the experiment of a pretrained SAE: its architecture, and no training settings.

        The budget of one batch is the smallest valid one; it is not used.
        """
        size = self.training.batch_size
        return replace(
            self,
            sae=found.config,
            training=TrainingConfig(recipe="none", tokens=size, batch_size=size),
            dataset=self.dataset.at_first_seeds().without_subset(),
            seed=0,
            seed_scope="cell",
        )


def experiment_from(values: Mapping[str, Any]) -> tuple[Experiment, RuntimeConfig]:
    """Build the typed experiment of a composed configuration.

    Raises:
        ConfigError: a key is unknown or missing, or a value has a wrong type or is out of range.
    """
    for key in values:
        if key not in _ROOT:
            raise ConfigError(f"there is no key {{key}}.{did_you_mean(key, _ROOT)}", key)
    if values.get("evaluation") is not None:
        raise ConfigError(
            "{key} is for `reseed evaluate` and `reseed run`; here it would change nothing",
            "evaluation",
        )
    for key in _REQUIRED:
        if key not in values:
            raise ConfigError("{key} is required: do not remove it", key)
    if values.get("objective") is not None:
        raise ConfigError("{key} is for hydra/sweeper=optuna, which optimises it", "objective")
    parts = {group: build(values[group], group, base) for group, base in _GROUPS.items()}
    scalars = {key: values[key] for key in _SCALARS}
    runtime = build(values["runtime"], "runtime", RuntimeConfig)
    return make(Experiment, {**parts, **scalars}, ""), runtime
