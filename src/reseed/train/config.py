"""The options of ``training=`` and ``runtime=``. Imports neither torch nor lightning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Self

from reseed.activations.cache import ActivationCache
from reseed.activations.dataset import STRIPES
from reseed.config import Config, setting
from reseed.errors import ConfigError
from reseed.system.files import user_path


class Variant:
    """Base of the choices in the training options that have options of their own.

    Users write flat keys (``training.optimizer=muon training.momentum=.9``). Code gets an object of
    the chosen class, which has only the options that it heeds.

    Attributes:
        keys: the flat keys that are heeded only with some choices, this one included.
    """

    keys: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, training: TrainingConfig) -> Self:
        """Take the options of this choice from the flat ones."""
        return cls()

    def check(self, training: TrainingConfig) -> None:
        """Raise `ConfigError` if other options contradict this choice."""


@dataclass(frozen=True)
class Adam(Variant):
    """``optimizer=adam``."""

    beta1: float
    beta2: float
    eps: float

    @classmethod
    def of(cls, training: TrainingConfig) -> Self:
        return cls(training.beta1, training.beta2, training.eps)


@dataclass(frozen=True)
class SignSGD(Variant):
    """``optimizer=sign_sgd``, schedule-free: a mean of the weights replaces the rate's decay."""

    keys: ClassVar[tuple[str, ...]] = ("momentum",)
    momentum: float

    @classmethod
    def of(cls, training: TrainingConfig) -> Self:
        return cls(training.momentum)

    def check(self, training: TrainingConfig) -> None:
        if training.decay_fraction != 0:
            raise ConfigError(
                "{key} must be 0 with `optimizer=sign_sgd`, which averages weights instead; "
                f"got {training.decay_fraction:g}. training=sign_sgd sets all options for it.",
                "decay_fraction",
            )


@dataclass(frozen=True)
class Muon(Variant):
    """``optimizer=muon``: Muon updates W_enc and W_dec, Adam the other parameters."""

    keys: ClassVar[tuple[str, ...]] = ("momentum",)
    momentum: float
    adam: Adam

    @classmethod
    def of(cls, training: TrainingConfig) -> Self:
        return cls(training.momentum, Adam.of(training))


@dataclass(frozen=True)
class FreeDecoder(Variant):
    """``decoder=free``: the rows of W_dec are parameters."""


@dataclass(frozen=True)
class ArchetypalDecoder(Variant):
    """``decoder=archetypal``: rows are mixtures of centroids of the first activations (2502.12892).

    Attributes:
        archetypes: number of centroids; None: one for each latent.
        own_seed: each run seeds its own k-means; otherwise the runs of a cell share the centroids.
        relaxation: maximum distance of a row from its mixture, in units of the scaled activations.
    """

    keys: ClassVar[tuple[str, ...]] = ("archetypes", "archetype_seed", "archetype_relaxation")
    archetypes: int | None
    own_seed: bool
    relaxation: float

    @classmethod
    def of(cls, training: TrainingConfig) -> Self:
        own = training.archetype_seed == "own"
        return cls(training.archetypes, own, training.archetype_relaxation)

    def count(self, num_latents: int) -> int:
        """Return the number of centroids."""
        return self.archetypes or num_latents

    def check(self, training: TrainingConfig) -> None:
        mixed = "with `decoder=archetypal`, whose rows mix centroids"
        if training.start == "truth":
            raise ConfigError(f"{{key}} must be random {mixed}", "start")
        if training.decoder_weight_decay != 0:
            raise ConfigError(
                f"{{key}} must be 0 {mixed}; got {training.decoder_weight_decay:g}",
                "decoder_weight_decay",
            )


@dataclass(frozen=True)
class RandomStart(Variant):
    """``start=random``: the architecture draws the initial weights."""


@dataclass(frozen=True)
class TruthStart(Variant):
    """``start=truth``: latent i starts at feature i of a world.

    Attributes:
        noise: length of the noise added to the unit rows.
    """

    keys: ClassVar[tuple[str, ...]] = ("start_noise",)
    noise: float

    @classmethod
    def of(cls, training: TrainingConfig) -> Self:
        return cls(training.start_noise)


OPTIMIZERS = {"adam": Adam, "sign_sgd": SignSGD, "muon": Muon}
DECODERS = {"free": FreeDecoder, "archetypal": ArchetypalDecoder}
STARTS = {"random": RandomStart, "truth": TruthStart}
VARIANTS: dict[str, dict[str, type[Variant]]] = {
    "optimizer": {**OPTIMIZERS},
    "decoder": {**DECODERS},
    "start": {**STARTS},
}
"""Option → its choices."""


@dataclass(frozen=True)
class TrainingConfig(Config, family="training"):
    """Budget, optimiser and constraints; every field but ``recipe`` enters the signature.

    With Adam each architecture has its published learning rate (`SAEConfig.published_lr`), which
    may decrease as 1/√F; ``lr_law=width`` takes that of the TopK family for every architecture.
    Each of the other optimisers has one law for every architecture. ``lr_scale`` multiplies the
    learning rate of any law; ``lr`` replaces it.
    """

    recipe: str = setting("standard", signed=False)
    """Name of the option set, for tables."""
    tokens: int = setting(1_000_000, at_least=1)
    """Number of activations that each SAE sees; rounded down to whole batches."""
    batch_size: int = setting(4_096, at_least=1)
    """Number of activations per step."""
    optimizer: str = setting("adam", choices=tuple(OPTIMIZERS), neutral="adam")
    lr: float | None = setting(None, above=0)
    lr_law: str = setting("published", choices=("published", "width"))
    lr_scale: float = setting(1.0, above=0)
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.999, at_least=0, below=1)
    eps: float = setting(1e-8, above=0)
    momentum: float = setting(0.95, at_least=0, below=1, neutral=0.95)
    """Used by sign_sgd and muon; Adam uses beta1, beta2 and eps."""
    warmup_fraction: float = setting(0.01, at_least=0, at_most=1)
    decay_fraction: float = setting(0.2, at_least=0, at_most=1)
    gradient_clip: float | None = setting(1.0, above=0)
    encoder_weight_decay: float = setting(0.0, at_least=0)
    decoder_weight_decay: float = setting(0.0, at_least=0)
    normalize_activations: bool = True
    """Scale inputs by one number so that E‖x‖ = √D. The saved SAE takes raw activations."""
    b_dec_init: str = setting("mean", choices=("mean", "geometric_median", "zeros"))
    """The initial b_dec: the mean or geometric median of the first chunk of activations, or 0."""
    b_dec: str = setting("learned", choices=("learned", "frozen"))
    start: str = setting("random", choices=tuple(STARTS), neutral="random")
    """truth: latent i starts at feature i of a world (`model=world_*`), to test whether training
    preserves the true features."""
    start_noise: float = setting(0.1, at_least=0, neutral=0.1)
    """Length of the noise added to the unit rows of ``start=truth``."""
    aligned: bool = setting(False, neutral=False)
    """Hold E_j · d_j = 1 for every latent (2605.18629), before the first step too: this overrides
    ``sae.encoder_init_scale`` in the direction of d_j."""
    decoder: str = setting("free", choices=tuple(DECODERS), neutral="free")
    """archetypal: rows are mixtures of centroids of the first activations (2502.12892)."""
    archetypes: int | None = setting(None, at_least=2, neutral=None)
    """Number of centroids; null: num_latents. They add a product of F × archetypes × D to each
    step."""
    archetype_seed: str = setting("shared", choices=("shared", "own"), neutral="shared")
    """shared: the runs of a cell have the same centroids; own: each run seeds its own k-means."""
    archetype_relaxation: float = setting(1.0, at_least=0, neutral=1.0)
    """Maximum distance of a row from its mixture, in units of the scaled activations."""
    dead_after_tokens: int | None = setting(None, at_least=1)
    """A latent that has not fired for this many tokens is dead; null: min(10M, budget/10)."""
    precision: str = setting("float32", choices=("float32", "bfloat16"))
    """Precision of the SAE's products. Parameters, updates and optimiser state stay in float32, and
    so do the products of gated and jumprelu SAEs."""

    def validate(self) -> None:
        if self.tokens < self.batch_size:
            raise ConfigError(
                f"{{key}} must be at least one batch (training.batch_size={self.batch_size}); "
                f"got {self.tokens}",
                "tokens",
            )
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ConfigError(
                f"{{key}} and decay_fraction must not exceed 1 together; got "
                f"{self.warmup_fraction:g} + {self.decay_fraction:g}",
                "warmup_fraction",
            )
        self._check_heeded()
        for group in VARIANTS:
            self._chosen(group).check(self)

    def _check_heeded(self) -> None:
        """Refuse options that have no effect here. They would enter the signature of the cell and
        so change the initial weights, which would look like an effect."""
        neutral = {f.name: f.metadata.get("neutral") for f in dataclasses.fields(self)}
        for group, choices in VARIANTS.items():
            for key in dict.fromkeys(key for variant in choices.values() for key in variant.keys):
                heeding = [name for name, variant in choices.items() if key in variant.keys]
                value = getattr(self, key)
                if getattr(self, group) not in heeding and value != neutral[key]:
                    needed = f"training.{group}={' or '.join(heeding)}"
                    raise ConfigError(f"{{key}} needs {needed}; got {value!r}", key)

    def _chosen(self, group: str) -> Variant:
        return VARIANTS[group][getattr(self, group)].of(self)

    @cached_property
    def optimizer_options(self) -> Adam | SignSGD | Muon:
        """The chosen optimiser, with the options that it heeds."""
        return OPTIMIZERS[self.optimizer].of(self)

    @cached_property
    def decoder_options(self) -> FreeDecoder | ArchetypalDecoder:
        """The chosen decoder, with the options that it heeds."""
        return DECODERS[self.decoder].of(self)

    @cached_property
    def start_options(self) -> RandomStart | TruthStart:
        """The chosen start, with the options that it heeds."""
        return STARTS[self.start].of(self)

    @property
    def start_is_drawn(self) -> bool:
        """True if the architecture draws the initial weights from its seed."""
        drawn = isinstance(self.start_options, RandomStart)
        return drawn and isinstance(self.decoder_options, FreeDecoder) and not self.aligned

    @property
    def steps(self) -> int:
        """Number of whole batches in the budget."""
        return self.tokens // self.batch_size

    def dead_after(self) -> int:
        """Return the number of tokens without firing after which a latent is dead."""
        return self.dead_after_tokens or max(1, min(10_000_000, self.tokens // 10))


STRATEGIES = ("single", "ddp", "spread")


@dataclass(frozen=True)
class RuntimeConfig(Config, family="runtime"):
    """Device, paths, processes and printing; no field changes results or enters a signature."""

    device: str = setting("auto", signed=False)
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = setting(None, at_least=1, at_most=1_024, signed=False)
    """CPU threads of torch in each process; null: torch's default, or an equal share of the CPUs
    if several processes train together on them."""
    strategy: str = setting("single", choices=STRATEGIES, signed=False, neutral="single")
    """The division of a group among processes. ``ddp``: each process trains all SAEs on a share of
    every batch; ``spread``: each trains some of the SAEs; ``single``: one process trains all."""
    ranks: int | None = setting(None, at_least=1, at_most=64, signed=False, neutral=None)
    """Number of processes that train together on this machine; null: one per GPU."""
    outputs: str = setting("outputs", signed=False)
    sweeps: str = setting("sweeps", signed=False)
    cache: str | None = setting(None, signed=False)
    """Folder for tokens, extracted text and fingerprints; null: RESEED_CACHE or ~/.cache/reseed."""
    activation_cache: str | None = setting(None, signed=False, neutral=None)
    """Folder to cache the activations of language models; null: no cache."""
    activation_cache_gib: float = setting(50.0, above=0, signed=False, neutral=50.0)
    """Maximum size of ``activation_cache``."""
    prefetch: bool | None = setting(None, signed=False, neutral=None)
    """Compute the next chunk while SAEs train on the current one; null: true on a GPU, or if torch
    uses at most half of the CPUs."""
    plan_only: bool = setting(False, signed=False)
    """Print the runs that would be trained, their groups and their cost, and train nothing."""
    wait: bool = setting(True, signed=False, neutral=True)
    """With hydra/launcher=slurm, wait for the jobs that the command submitted."""
    memory_gib: float | None = setting(None, above=0, signed=False)
    """Memory that a group of runs may take; null: the device's free memory, less a reserve."""
    tflops: float | None = setting(None, above=0, signed=False)
    """Speed of a float32 product, to plan for another machine; null: measured on this machine."""
    checkpoint_every_s: float = setting(30.0, above=0, signed=False)
    heartbeat_every_s: float = setting(5.0, above=0, signed=False, neutral=5.0)
    """Seconds between updates of a run's progress.json."""
    log_every_steps: int = setting(50, at_least=1, signed=False)
    progress: bool = setting(True, signed=False)
    loggers: tuple[str, ...] = setting((), signed=False)
    """Loggers in addition to training.csv: tensorboard, wandb."""

    def open_cache(self) -> ActivationCache | None:
        """Open the folder of cached activations; return None if none is declared."""
        if self.activation_cache is None:
            return None
        folder = user_path(self.activation_cache)
        return ActivationCache(folder, int(self.activation_cache_gib * 2**30))

    def validate(self) -> None:
        for name in ("outputs", "sweeps"):
            if not getattr(self, name).strip():
                raise ConfigError("{key} must name a folder; it is empty", name)
        if self.strategy == "single" and self.ranks not in (None, 1):
            raise ConfigError(
                f"{{key}} (={self.ranks}) needs runtime=ddp or runtime=spread: with "
                "runtime.strategy=single only one process trains",
                "ranks",
            )
        if self.strategy == "ddp" and self.ranks is not None and STRIPES % self.ranks:
            raise ConfigError(
                f"{{key}} must divide {STRIPES} with runtime=ddp: each chunk is divided into "
                f"{STRIPES} stripes, and every process reads whole stripes; got {self.ranks}",
                "ranks",
            )
        if self.strategy != "single" and ":" in self.device:
            raise ConfigError(
                f"{{key}} must be auto, cpu or cuda with runtime={self.strategy}, where each "
                f"process has its own device; got {self.device}",
                "device",
            )
        folder = self.activation_cache
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ConfigError(
                f"{{key}} must be a folder; got {folder}, which is a file", "activation_cache"
            )
        for logger in self.loggers:
            if logger not in ("tensorboard", "wandb"):
                raise ConfigError(
                    f"{{key}} may contain only tensorboard and wandb; got {logger!r}", "loggers"
                )
            if find_spec(logger) is None:
                raise ConfigError(
                    f"{{key}}: {logger} is not installed (pip install 'reseed[{logger}]')",
                    "loggers",
                )
