"""Resolved experiments: their source, data and shapes are known and checked.

`resolve_experiment` makes a `Resolved` from a declared `Experiment`. `Resolved.identity` is
everything that changes the result, `signature` is the digest of the identity, and `spec` is the
part that training needs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from reseed.activations.cache import ActivationCache
from reseed.activations.source import ActivationSource, ResolvedData, ResolvedSource, SourceConfig
from reseed.activations.synthetic.surrogate import open_source, surrogate_label, surrogate_source
from reseed.config import digest
from reseed.errors import ConfigError
from reseed.evaluate.base import RunSource
from reseed.experiment import Experiment, experiment_from
from reseed.sae.base import SAEConfig
from reseed.sae.pretrained import Pretrained, PretrainedConfig
from reseed.store.runs import Run, RunStore
from reseed.system.environment import derived_data, derived_folder
from reseed.system.files import shorten
from reseed.train.config import ArchetypalDecoder, RuntimeConfig, TruthStart
from reseed.train.optim import peak_lr
from reseed.train.spec import RunSpec

SIGNATURE_VERSION = 1
"""Increase this when a code change alters the results of every run."""


@dataclass(frozen=True)
class Resolved:
    """An experiment whose source, data set and shapes are known and consistent.

    Created by `resolve_experiment`, which raises `ConfigError` if they are inconsistent.

    Attributes:
        role: empty, or the role of a calibration run: ``steered`` or ``calibration``.
        penalty: the penalty weight if the experiment asks for an L0 (`sae.target_l0`); None for a
            compared run until its cell is calibrated.
        calibration: the search that found the penalty weight, for run.json.
        pretrained: the SAE that is used instead of training one, if any.
    """

    experiment: Experiment
    model: ResolvedSource
    data: ResolvedData
    d_in: int
    num_latents: int
    role: str = ""
    penalty: float | None = None
    calibration: dict[str, Any] | None = None
    pretrained: Pretrained | None = None

    @property
    def sae(self) -> SAEConfig:
        """Configuration of the SAE, with the calibrated penalty weight."""
        declared = self.experiment.architecture
        return declared if self.penalty is None else declared.calibrated(self.penalty)

    @property
    def needs_calibration(self) -> bool:
        """True if the penalty weight has not been found yet."""
        return (
            self.experiment.architecture.needs_calibration
            and not self.role
            and self.penalty is None
        )

    def without_seeds(self) -> Resolved:
        """Return the cell for its calibration, independent of the seeds of the compared runs.

        The calibration has its own initial weights. Its data are in the order of seed 0, so that
        it shares the stream of the runs with that order.
        """
        e = self.experiment
        cell = replace(e, seed=0, seed_scope="cell", dataset=e.dataset.at_first_seeds())
        data = self.data.at_first_seeds()
        return replace(self, experiment=cell, data=data, penalty=None, calibration=None)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that changes the result, in plain values: the content of the signature."""
        if self.pretrained:
            return self._pretrained_identity(self.pretrained)
        signed = self.experiment.signed()
        # Width and budget can be given in several ways; only the resolved values count.
        width = {"num_latents": self.num_latents, "expansion_factor": None}
        # A compared run's penalty follows from its configuration; a calibration round's does not.
        role = {"role": self.role, "penalty": self.penalty} if self.role else {}
        return {
            "reseed": SIGNATURE_VERSION,
            **role,
            **signed,
            "sae": signed["sae"] | width,
            "training": signed["training"] | {"tokens": self.tokens},
            **self.model.site_identity(self.experiment.hook),
            "fingerprints": {**self.model.fingerprints, **self.data.fingerprints},
        }

    def _pretrained_identity(self, found: Pretrained) -> dict[str, Any]:
        """Return the identity of a pretrained SAE: its weights and the data it is measured on."""
        signed = self.experiment.signed()
        del signed["training"], signed["seed"]
        return {
            "reseed": SIGNATURE_VERSION,
            **signed,
            "sae": {"type": PretrainedConfig.name, "fingerprint": found.fingerprint},
            **self.model.site_identity(self.experiment.hook),
            "fingerprints": {**self.model.fingerprints, **self.data.fingerprints},
        }

    @cached_property
    def signature(self) -> str:
        return digest(self.identity)

    @cached_property
    def init_seed(self) -> int:
        """Seed of the weights: the declared seed, salted with the cell.

        Two architectures, layers or data sets with the same ``seed`` must not start from the same
        weights, because their agreement could then come from the start. The salt leaves out order
        and subset of the data, which have their own seeds, the held-out settings, which are not
        part of training, and the penalty, so that all rounds of a calibration start alike.
        """
        if self.experiment.seed_scope == "shared":
            salted: dict[str, Any] = {"seed": self.experiment.seed}
        else:
            unsalted = ("order_seed", "subset_seed", "held_out_tokens", "held_out_dedup")
            dataset = {k: v for k, v in self.identity["dataset"].items() if k not in unsalted}
            salted = {k: v for k, v in self.identity.items() if k != "penalty"}
            salted["dataset"] = dataset
        sha = hashlib.sha256(digest(salted, 64).encode()).digest()
        return int.from_bytes(sha[:8], "big") >> 1

    @cached_property
    def stream(self) -> str:
        """Digest of everything that determines the activations and their order.

        Runs with equal digests can train together, even if hookpoints, architectures, budgets and
        batch sizes differ.
        """
        e = self.experiment
        parts: list[Any] = [e.model.signed(), e.dataset.signed(), e.surrogate]
        if self.data.depends_on_budget:
            parts.append(self.tokens)
        return digest([*parts, self.identity["fingerprints"]])

    @property
    def tokens(self) -> int:
        """Number of training activations, in whole batches; 0 for a pretrained SAE."""
        return (
            0
            if self.pretrained
            else self.experiment.training.steps * self.experiment.training.batch_size
        )

    @property
    def model_label(self) -> str:
        """Name of the source of activations, for folders and tables."""
        return surrogate_label(self.model.label, self.experiment.surrogate)

    @property
    def source(self) -> RunSource:
        """The source of activations, which `EvaluationConfig.check` checks."""
        return RunSource(self.model, self.model_label, self.experiment.surrogate)

    @property
    def warning(self) -> str:
        """A warning if a pretrained SAE reads activations of another place than its own, or ""."""
        e, found = self.experiment, self.pretrained
        is_module = not self.model.site_identity(e.hook)
        return found.misplaced(e.layer, e.hookpoint.site, is_module) if found else ""

    @property
    def sparsity(self) -> str:
        """The setting of the sparsity, for tables (``k=32``)."""
        declared = self.experiment.architecture
        # The penalty that a pretrained SAE was trained with is unknown.
        return "as is" if self.pretrained and declared.penalty_field else declared.sparsity

    @property
    def label(self) -> str:
        """Readable part of the name of the run's folder."""
        e = self.experiment
        sparsity = self.sparsity.replace("=", "").replace("λ", "l")
        last = self.role or ("pretrained" if self.pretrained else f"seed{e.seed}")

        def named(model: str, data: str) -> str:
            what = (model, e.hook, data, self.sae.name, self.num_latents, sparsity, last)
            return re.sub(r"[^\w.+-]+", "_", "-".join(map(str, what)))

        whole = named(model := self.model_label, data := self.data.label)
        return whole if whole == shorten(whole) else named(shorten(model, 60), shorten(data, 60))

    def run(self, store: RunStore) -> Run:
        """Return the run of this experiment in ``store``."""
        return store.run(self.signature, self.label)

    def open(
        self,
        device: torch.device | str = "cpu",
        needed: int | None = None,
        cache: ActivationCache | None = None,
    ) -> ActivationSource:
        """Open the source of the activations.

        Args:
            device: device of the activations.
            needed: number of training activations, by default the budget; a streamed text is read
                no further.
            cache: stores activations on disk (`RuntimeConfig.open_cache`).
        """
        needed = needed or self.spec.needed
        where = torch.device(device)
        return open_source(self.data, self.experiment.surrogate, where, needed, cache)

    def record(self) -> dict[str, Any]:
        """Return the entries of run.json that are known before training."""
        e, found = self.experiment, self.pretrained
        own = {} if found is None else {"pretrained": found.record()}
        recipe, training = e.training, found is None
        dead_after = recipe.dead_after() if training else e.dataset.held_out_tokens
        return {
            **own,
            "name": self.label,
            "labels": {"model": self.model_label, "dataset": self.data.label},
            "experiment": e.to_dict(),
            "identity": self.identity,
            "fingerprints": self.identity["fingerprints"],
            "d_in": self.d_in,
            "num_latents": self.num_latents,
            "sparsity": self.sparsity,
            "penalty_weight": self.penalty,
            "calibration": self.calibration,
            "init_seed": self.init_seed if training else None,
            "start_is_drawn": training and recipe.start_is_drawn,
            "peak_lr": peak_lr(recipe, e.architecture, self.num_latents) if training else None,
            "dead_after_tokens": dead_after,
            "tokens": self.tokens,
            "steps": recipe.steps if training else 0,
        }

    def _metadata(self) -> dict[str, Any]:
        """Return the SAE's origin for sae.json."""
        e, found = self.experiment, self.pretrained
        own = {"seed": e.seed} if found is None else {"pretrained": found.record()}
        return {
            "signature": self.signature,
            "model": self.model_label,
            "model_fingerprint": self.model.fingerprint,
            "hookpoint": str(e.hook),
            "site": e.hookpoint.site,
            "layer": e.layer,
            "dataset": self.data.label,
            "context_length": self.data.context_length,
            "tokens": self.tokens,
            **own,
        }

    @cached_property
    def spec(self) -> RunSpec:
        """The run as `reseed.train` needs it."""
        e = self.experiment
        return RunSpec(
            signature=self.signature,
            label=self.label,
            role=self.role,
            model=self.model,
            model_label=self.model_label,
            data=self.data,
            surrogate=e.surrogate,
            stream=self.stream,
            hookpoint=e.hook,
            d_in=self.d_in,
            sae=self.sae,
            num_latents=self.num_latents,
            sparsity=self.sparsity,
            training=e.training,
            tokens=self.tokens,
            init_seed=self.init_seed,
            pretrained=self.pretrained,
            waits_for=self.without_seeds().signature if self.needs_calibration else None,
            record=self.record(),
            metadata=self._metadata(),
        )


def resolved_from(values: Mapping[str, Any]) -> tuple[Resolved, RuntimeConfig]:
    """Build, resolve and check the experiment of a composed configuration, given as plain values.

    Raises:
        ConfigError: see `experiment_from` and `resolve_experiment`.
    """
    experiment, runtime = experiment_from(values)
    return resolve_experiment(experiment, runtime), runtime


def resolve_experiment(experiment: Experiment, runtime: RuntimeConfig) -> Resolved:
    """Find source and data set, and check that everything is consistent.

    The only file written is the cache of the tokenised text.

    Raises:
        ConfigError: a setting breaks a rule; the message has the full key, the rule and the value.
    """
    found = None
    if isinstance(experiment.sae, PretrainedConfig):
        try:
            found = experiment.sae.resolve()
        except ConfigError as error:
            raise error.within("sae") from None
        experiment = experiment.of_pretrained(found)
    model = find_model(experiment, runtime)
    experiment = replace(experiment, model=model.config)
    model.check(experiment.hook)
    with derived_data(cache_folder(runtime)) as cache:
        try:
            data = model.data(experiment.dataset, cache)
        except ConfigError as error:
            raise error.within("dataset") from None
    d_in = model.d_in(experiment.hook)
    architecture = experiment.architecture
    try:
        if found is not None:
            found.check_d_in(d_in)
        architecture.check_d_in(d_in)
    except ConfigError as error:
        raise error.within("sae") from None
    _check_start(experiment, model, architecture.width(d_in))
    with derived_data(cache_folder(runtime)):
        data.check_budget(experiment.training.steps, experiment.training.batch_size)
    return Resolved(experiment, model, data, d_in, architecture.width(d_in), pretrained=found)


def find_model(experiment: Experiment, runtime: RuntimeConfig) -> ResolvedSource:
    """Find the source of an experiment's activations, without its data set.

    Raises:
        ConfigError: the source is not found, or the surrogate does not apply to it.
    """
    with derived_data(cache_folder(runtime)) as cache:
        try:
            model = _resolve_source(experiment.model, cache, experiment.model.stamp())
        except ConfigError as error:
            raise error.within("model") from None
    return _standing_in(model, experiment.surrogate)


def cache_folder(runtime: RuntimeConfig) -> Path:
    """Return the folder of derived data: tokens, extracted text, fingerprints.

    Raises:
        ConfigError: it is in the home folder, which is unknown.
    """
    return derived_folder(runtime.cache)


def _check_start(experiment: Experiment, model: ResolvedSource, num_latents: int) -> None:
    training, there = experiment.training, experiment.dataset.chunk_tokens
    decoder = training.decoder_options
    if isinstance(decoder, ArchetypalDecoder) and decoder.count(num_latents) > there:
        raise ConfigError(
            f"{{key}} (={decoder.count(num_latents):,}) must not exceed the activations of the "
            f"first chunk (dataset.chunk_tokens={there:,}), because archetypes are their centroids",
            "training.archetypes",
        )
    if not isinstance(training.start_options, TruthStart):
        return
    features = None if experiment.surrogate != "none" else model.num_features
    if features is None:
        raise ConfigError(
            "{key}=truth needs activations whose features are known: model=world_*",
            "training.start",
        )
    if num_latents > features:
        raise ConfigError(
            f"{{key}} (={num_latents}) must not exceed the {features} features of {model.label} "
            "with training.start=truth",
            "sae.num_latents",
        )


@lru_cache(maxsize=32)
def _resolve_source(config: SourceConfig, cache: Path, stamp: Hashable) -> ResolvedSource:
    return config.resolve(cache)


@lru_cache(maxsize=32)
def _standing_in(source: ResolvedSource, surrogate: str) -> ResolvedSource:
    return surrogate_source(source, surrogate)
