"""How SAEs are trained: the options of ``training=``. Importable without lightning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from reseed.config import Config, ConfigError, setting

if TYPE_CHECKING:
    from reseed.sae.base import SAEConfig


@dataclass(frozen=True)
class TrainingConfig(Config, family="training"):
    """Budget, optimiser and constraints; every field enters the signature.

    The architecture has a published learning rate of its own (`SAEConfig.published_lr`), which
    falls as 1/√F; ``lr_law=width`` takes that of the TopK family for every architecture, and
    ``lr_scale`` multiplies it. ``lr`` overrides both.
    """

    recipe: str = setting("standard", signed=False)
    """Name of the option set, for tables."""
    tokens: int = setting(1_000_000, at_least=1)
    """Activations that each SAE sees; rounded down to whole batches."""
    batch_size: int = setting(4_096, at_least=1)
    """Activations in a step."""
    lr: float | None = setting(None, above=0)
    lr_law: str = setting("published", choices=("published", "width"))
    lr_scale: float = setting(1.0, above=0)
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.999, at_least=0, below=1)
    eps: float = setting(1e-8, above=0)
    warmup_fraction: float = setting(0.01, at_least=0, at_most=1)
    decay_fraction: float = setting(0.2, at_least=0, at_most=1)
    gradient_clip: float | None = setting(1.0, above=0)
    encoder_weight_decay: float = setting(0.0, at_least=0)
    decoder_weight_decay: float = setting(0.0, at_least=0)
    normalize_activations: bool = True
    """Scale inputs by one number so that E‖x‖ = √D; the saved SAE takes raw activations."""
    b_dec_init: str = setting("mean", choices=("mean", "zeros"))
    """Of the first chunk of activations."""
    b_dec: str = setting("learned", choices=("learned", "frozen"))
    dead_after_tokens: int | None = setting(None, at_least=1)
    """A latent that has not fired for so many tokens is dead; null: min(10M, budget/10)."""
    precision: str = setting("float32", choices=("float32", "bfloat16"))
    """Of the SAE's products; parameters and optimiser state stay in float32."""

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

    @property
    def steps(self) -> int:
        """Whole batches in the budget."""
        return self.tokens // self.batch_size

    def peak_lr(self, sae: SAEConfig, num_latents: int) -> float:
        """The learning rate after warm-up."""
        if self.lr is not None:
            return self.lr
        law = 2e-4 / math.sqrt(num_latents / 2**14)
        published = sae.published_lr(num_latents)
        return self.lr_scale * (law if self.lr_law == "width" else published)

    def dead_after(self) -> int:
        """Tokens without firing after which a latent is dead."""
        return self.dead_after_tokens or max(1, min(10_000_000, self.tokens // 10))


@dataclass(frozen=True)
class RuntimeConfig(Config, family="runtime"):
    """Where and how, never what: no field enters a signature."""

    device: str = setting("auto", signed=False)
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = setting(None, at_least=1, signed=False)
    """CPU threads of torch; null: torch's own choice."""
    outputs: str = setting("outputs", signed=False)
    sweeps: str = setting("sweeps", signed=False)
    cache: str | None = setting(None, signed=False)
    """Tokens, extracted text, fingerprints; null: RESEED_CACHE or ~/.cache/reseed."""
    checkpoint_every_s: float = setting(30.0, above=0, signed=False)
    log_every_steps: int = setting(50, at_least=1, signed=False)
    progress: bool = setting(True, signed=False)
    loggers: tuple[str, ...] = setting((), signed=False)
    """Beside training.csv: tensorboard, wandb."""

    def validate(self) -> None:
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
