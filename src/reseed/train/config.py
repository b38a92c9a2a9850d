"""How SAEs are trained: the options of ``training=``. Importable without lightning."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from reseed.config import Config, ConfigError, setting

if TYPE_CHECKING:
    from reseed.activations.cache import ActivationCache
    from reseed.sae.base import SAEConfig


@dataclass(frozen=True)
class TrainingConfig(Config, family="training"):
    """Budget, optimiser and constraints; every field enters the signature.

    For Adam the architecture has a published learning rate of its own (`SAEConfig.published_lr`),
    which may fall as 1/√F; ``lr_law=width`` takes that of the TopK family for every architecture.
    The other optimisers have one law each, for every architecture. ``lr_scale`` multiplies any of
    them; ``lr`` overrides all.
    """

    recipe: str = setting("standard", signed=False)
    """Name of the option set, for tables."""
    tokens: int = setting(1_000_000, at_least=1)
    """Activations that each SAE sees; rounded down to whole batches."""
    batch_size: int = setting(4_096, at_least=1)
    """Activations in a step."""
    optimizer: str = setting("adam", choices=("adam", "sign_sgd", "muon"), neutral="adam")
    """sign_sgd is schedule-free (its mean takes the place of a decay); muon is for W_enc and W_dec,
    beside Adam for the rest."""
    lr: float | None = setting(None, above=0)
    lr_law: str = setting("published", choices=("published", "width"))
    lr_scale: float = setting(1.0, above=0)
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.999, at_least=0, below=1)
    eps: float = setting(1e-8, above=0)
    momentum: float = setting(0.95, at_least=0, below=1, neutral=0.95)
    """Of sign_sgd and muon; beta1, beta2 and eps are Adam's."""
    warmup_fraction: float = setting(0.01, at_least=0, at_most=1)
    decay_fraction: float = setting(0.2, at_least=0, at_most=1)
    gradient_clip: float | None = setting(1.0, above=0)
    encoder_weight_decay: float = setting(0.0, at_least=0)
    decoder_weight_decay: float = setting(0.0, at_least=0)
    normalize_activations: bool = True
    """Scale inputs by one number so that E‖x‖ = √D; the saved SAE takes raw activations."""
    b_dec_init: str = setting("mean", choices=("mean", "geometric_median", "zeros"))
    """Of the first chunk of activations."""
    b_dec: str = setting("learned", choices=("learned", "frozen"))
    start: str = setting("random", choices=("random", "truth"), neutral="random")
    """truth: latent i starts at feature i of a world (`model=world_*`), to see what training makes
    of the right answer."""
    start_noise: float = setting(0.1, at_least=0, neutral=0.1)
    """Length of the noise that turns the rows of ``start=truth``."""
    aligned: bool = setting(False, neutral=False)
    """Hold E_j · d_j = 1 for every latent (2605.18629), from the start: along d_j it overrides
    ``sae.encoder_init_scale``."""
    decoder: str = setting("free", choices=("free", "archetypal"), neutral="free")
    """archetypal: rows are mixtures of centroids of the first activations (2502.12892)."""
    archetypes: int | None = setting(None, at_least=2, neutral=None)
    """How many centroids; null: num_latents. Each step costs F × this × D more."""
    archetype_seed: str = setting("shared", choices=("shared", "own"), neutral="shared")
    """shared: the runs of a cell have the same centroids; own: each draws its k-means."""
    archetype_relaxation: float = setting(1.0, at_least=0, neutral=1.0)
    """How far a row may leave its mixture, in units of the scaled activations."""
    dead_after_tokens: int | None = setting(None, at_least=1)
    """A latent that has not fired for so many tokens is dead; null: min(10M, budget/10)."""
    precision: str = setting("float32", choices=("float32", "bfloat16"))
    """Of the SAE's products; parameters, updates and optimiser state stay in float32, and so do
    the products of gated and jumprelu SAEs."""

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
        if self.optimizer == "sign_sgd" and self.decay_fraction != 0:
            raise ConfigError(
                "{key} must be 0 with `optimizer=sign_sgd`, whose mean takes the place of a decay; "
                f"got {self.decay_fraction:g}. training=sign_sgd sets what belongs together.",
                "decay_fraction",
            )
        if self.decoder == "archetypal" and self.start == "truth":
            raise ConfigError(
                "{key} must be random with `decoder=archetypal`, whose rows are mixtures", "start"
            )
        if self.decoder == "archetypal" and self.decoder_weight_decay != 0:
            raise ConfigError(
                "{key} must be 0 with `decoder=archetypal`, whose rows are mixtures; "
                f"got {self.decoder_weight_decay:g}",
                "decoder_weight_decay",
            )

    def _check_heeded(self) -> None:
        """Options that nothing heeds are refused: as part of the cell they would move the start,
        and so seem to have an effect."""
        rules = (
            ("momentum", self.optimizer != "adam", "optimizer=sign_sgd and muon"),
            ("start_noise", self.start == "truth", "start=truth"),
            ("archetypes", self.decoder == "archetypal", "decoder=archetypal"),
            ("archetype_seed", self.decoder == "archetypal", "decoder=archetypal"),
            ("archetype_relaxation", self.decoder == "archetypal", "decoder=archetypal"),
        )
        neutral = {f.name: f.metadata.get("neutral") for f in dataclasses.fields(self)}
        for name, heeded, by in rules:
            value = getattr(self, name)
            if not heeded and value != neutral[name]:
                raise ConfigError(f"{{key}} is for training.{by} alone; got {value!r}", name)

    @property
    def start_is_drawn(self) -> bool:
        """Whether the weights of the start are those that the architecture draws from its seed."""
        return self.decoder == "free" and not self.aligned and self.start == "random"

    @property
    def steps(self) -> int:
        """Whole batches in the budget."""
        return self.tokens // self.batch_size

    def peak_lr(self, sae: SAEConfig, num_latents: int) -> float:
        """The learning rate after warm-up; muon's is that of its matrices.

        sign_sgd: 5e-3 / √(F / 2¹⁴), muon: 2e-3 at every width, both as sparsify's trainer has them.
        """
        if self.lr is not None:
            return self.lr
        if self.optimizer == "sign_sgd":
            return self.lr_scale * 5e-3 / math.sqrt(num_latents / 2**14)
        if self.optimizer == "muon":
            return self.lr_scale * 2e-3
        return self.adam_lr(sae, num_latents)

    def adam_lr(self, sae: SAEConfig, num_latents: int) -> float:
        """Adam's law, which muon's biases follow too, whatever ``lr`` says of its matrices."""
        law = 2e-4 / math.sqrt(num_latents / 2**14)
        published = sae.published_lr(num_latents)
        return self.lr_scale * (law if self.lr_law == "width" else published)

    def dead_after(self) -> int:
        """Tokens without firing after which a latent is dead."""
        return self.dead_after_tokens or max(1, min(10_000_000, self.tokens // 10))


STRATEGIES = ("single", "ddp", "spread")


@dataclass(frozen=True)
class RuntimeConfig(Config, family="runtime"):
    """Where and how, never what: no field enters a signature."""

    device: str = setting("auto", signed=False)
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = setting(None, at_least=1, signed=False)
    """CPU threads of torch, in each process; null: torch's own choice, an equal share of the CPUs
    where several processes train together on them."""
    strategy: str = setting("single", choices=STRATEGIES, signed=False, neutral="single")
    """How several processes train a group: ``ddp``, each a part of every batch; ``spread``, each
    some of its SAEs; ``single``: there is one."""
    ranks: int | None = setting(None, at_least=1, signed=False, neutral=None)
    """How many processes train together on this machine; null: one on each GPU."""
    outputs: str = setting("outputs", signed=False)
    sweeps: str = setting("sweeps", signed=False)
    cache: str | None = setting(None, signed=False)
    """Tokens, extracted text, fingerprints; null: RESEED_CACHE or ~/.cache/reseed."""
    activation_cache: str | None = setting(None, signed=False, neutral=None)
    """Folder for the activations of language models; null: they are not kept."""
    activation_cache_gib: float = setting(50.0, above=0, signed=False, neutral=50.0)
    """Most that is kept in that folder."""
    prefetch: bool | None = setting(None, signed=False, neutral=None)
    """Whether the next chunk is computed while SAEs train on this one; null: on a GPU, and where
    torch has no more than half of the CPUs."""
    plan_only: bool = setting(False, signed=False)
    """Print what would be trained, in which groups, and what it takes; train nothing."""
    wait: bool = setting(True, signed=False, neutral=True)
    """With hydra/launcher=slurm: whether the command waits for what it submitted."""
    memory_gib: float | None = setting(None, above=0, signed=False)
    """What a group of runs may take; null: what is free on the device, but for a reserve."""
    tflops: float | None = setting(None, above=0, signed=False)
    """Speed of a plain product, to plan for another machine; null: measured here."""
    checkpoint_every_s: float = setting(30.0, above=0, signed=False)
    heartbeat_every_s: float = setting(5.0, above=0, signed=False, neutral=5.0)
    """How often progress.json says how far a run is."""
    log_every_steps: int = setting(50, at_least=1, signed=False)
    progress: bool = setting(True, signed=False)
    loggers: tuple[str, ...] = setting((), signed=False)
    """Beside training.csv: tensorboard, wandb."""

    def open_cache(self) -> ActivationCache | None:
        """The folder of activations, where one is declared."""
        from reseed.activations.cache import ActivationCache

        if self.activation_cache is None:
            return None
        folder = Path(self.activation_cache).expanduser()
        return ActivationCache(folder, int(self.activation_cache_gib * 2**30))

    def validate(self) -> None:
        if self.strategy == "single" and self.ranks not in (None, 1):
            raise ConfigError(
                f"{{key}} (={self.ranks}) needs runtime=ddp or runtime=spread: with "
                "runtime.strategy=single one process trains",
                "ranks",
            )
        if self.strategy == "ddp" and self.ranks is not None:
            _check_ranks(self.ranks)
        if self.strategy != "single" and ":" in self.device:
            raise ConfigError(
                f"{{key}} must be auto, cpu or cuda with runtime={self.strategy}, where each "
                f"process has a device of its own; got {self.device}",
                "device",
            )
        if self.activation_cache is not None and Path(self.activation_cache).is_file():
            raise ConfigError(
                f"{{key}} must be a folder; got {self.activation_cache}, which is a file",
                "activation_cache",
            )
        for logger in self.loggers:
            if logger not in ("tensorboard", "wandb"):
                raise ConfigError(
                    f"{{key}} may hold tensorboard and wandb; got {logger!r}", "loggers"
                )
            if find_spec(logger) is None:
                raise ConfigError(
                    f"{{key}}: {logger} is not installed (pip install 'reseed[{logger}]')",
                    "loggers",
                )


def _check_ranks(ranks: int) -> None:
    from reseed.activations.stream import STRIPES  # imports torch, which few commands need

    if STRIPES % ranks:
        raise ConfigError(
            f"{{key}} must divide {STRIPES} with runtime=ddp: each chunk is dealt into {STRIPES} "
            f"stripes, of which every process reads whole ones; got {ranks}",
            "ranks",
        )
