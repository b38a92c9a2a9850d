"""Contenders of reseed, which run its own training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from contenders.base import (
    BANDWIDTH,
    L0,
    L1,
    LEARNING_RATE,
    PREFIXES,
    STEPS,
    THRESHOLD,
    THRESHOLD_RATE,
    Contender,
    K,
)


class Reseed(Contender):
    """reseed's own training step without clipping, as in sparsify's recipe.

    Args:
        sae_options, optimizer_options: overrides, from `Matched`.
    """

    max_grad_norm: float | None = None

    def __init__(
        self,
        architecture: str,
        d_in: int,
        num_latents: int,
        sae_options: Mapping[str, Any] | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
    ) -> None:
        import torch

        from reseed.train.optim.adam import SAEAdam

        config = configuration(architecture, num_latents, sae_options or {})
        self.module = config.build(d_in, torch.Generator().manual_seed(0))
        options = {"max_grad_norm": self.max_grad_norm, **(optimizer_options or {})}
        self.optimizer = SAEAdam(self.module, LEARNING_RATE, **options)
        self.dead = torch.zeros(num_latents, dtype=torch.bool)
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64)
        self.index = 0

    def start(self, x: Any) -> None:
        """Set b_dec to the mean, before the first step."""
        self.module.initialise_b_dec(x.mean(0))
        self.index = 1

    def step(self, x: Any) -> None:
        if self.index == 0:
            self.start(x)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(x)
        loss.total.backward()
        self.optimizer.step()
        self.tokens_since_fired.add_(len(x)).masked_fill_(loss.fired > 0, 0)
        self.index += 1

    def loss(self, x: Any) -> Any:
        return self._forward(x).total

    def parameters(self) -> dict[str, Any]:
        return dict(self.module.named_parameters())

    def _forward(self, x: Any) -> Any:
        from reseed.sae.base import Step

        return self.module.training_loss(x, Step(self.index, STEPS), self.dead)


class ReseedPlain(Reseed):
    """reseed without compiled loops."""

    def step(self, x: Any) -> None:
        from reseed.sae import kernels

        with kernels.override_enabled(False):
            super().step(x)


class ReseedClipped(Reseed):
    """reseed with clipped gradients, its default."""

    max_grad_norm = 1.0


class ReseedTopK(ReseedClipped):
    """TopK for any architecture, which shows the cost of selecting over the batch."""

    def __init__(self, architecture: str, *size: Any) -> None:
        super().__init__("topk", *size)


def configuration(architecture: str, num_latents: int, options: Mapping[str, Any]) -> Any:
    """Return the configuration of an architecture, without warm-ups and without AuxK."""
    from reseed.sae import batch_topk, gated, jumprelu, matryoshka, relu, topk

    k_sparse = {"k": K, "aux_alpha": 0.0}
    in_batch = {**k_sparse, "threshold_rate": THRESHOLD_RATE}
    l1 = {"l1_coefficient": L1, "l1_warmup_fraction": 0.0}
    jump = {
        "l0_coefficient": L0,
        "l0_warmup_fraction": 0.0,
        "threshold_init": THRESHOLD,
        "bandwidth": BANDWIDTH,
    }
    build, defaults = {
        "topk": (topk.TopKConfig, k_sparse),
        "batch_topk": (batch_topk.BatchTopKConfig, in_batch),
        "matryoshka": (matryoshka.MatryoshkaConfig, {**in_batch, "prefixes": PREFIXES}),
        "jumprelu": (jumprelu.JumpReLUConfig, jump),
        "gated": (gated.GatedConfig, l1),
        "relu": (relu.ReLUConfig, l1),
    }[architecture]
    return build(num_latents=num_latents, **{**defaults, **options})
