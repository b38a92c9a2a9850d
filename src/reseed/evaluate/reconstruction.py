"""How well an SAE reconstructs held-out activations, how often its latents fire, and what these
activations are like: their mean and covariance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.moments import MomentSums
from reseed.sae.base import SAE

_BLOCK = 4_096
"""Activations encoded at once: dense latents are [block, num_latents]."""


@dataclass
class Reconstruction:
    """Sums over the evaluation set, from which the measures are taken once at the end.

    The mean is that of the whole evaluation set: fractions of variance averaged over batches
    would depend on the batch size. ``moments`` has those of the activations, where `measure` took
    them: one object for all SAEs of a hookpoint.
    """

    sae: SAE
    moments: MomentSums | None = None
    tokens: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    total: Float[Tensor, " d_in"] | None = None
    active: int = 0
    cosine: float = 0.0
    firing: Int[Tensor, " num_latents"] = field(init=False)
    activation_sum: Float[Tensor, " num_latents"] = field(init=False)
    activation_square_sum: Float[Tensor, " num_latents"] = field(init=False)

    def __post_init__(self) -> None:
        zeros = {"size": (self.sae.num_latents,), "device": self.sae.W_dec.device}
        self.firing = torch.zeros(**zeros, dtype=torch.int64)
        self.activation_sum = torch.zeros(**zeros, dtype=torch.float64)
        self.activation_square_sum = torch.zeros(**zeros, dtype=torch.float64)

    @torch.inference_mode()
    def add(self, x: Float[Tensor, "tokens d_in"]) -> None:
        """Count the activations of ``x``."""
        for part in x.split(_BLOCK):
            part = part.to(self.sae.W_dec.device, torch.float32)
            output = self.sae(part)
            error = (part - output.reconstruction).double()
            exact = part.double()
            fired = output.latents != 0
            self.tokens += len(part)
            self.squared_error += float(error.square().sum())
            self.squared_norm += float(exact.square().sum())
            self.total = exact.sum(0) if self.total is None else self.total + exact.sum(0)
            self.active += int(fired.sum())
            self.firing += fired.sum(0)
            # Sums of a block in float32: a double copy of dense latents would be large.
            self.activation_sum += output.latents.sum(0)
            self.activation_square_sum += torch.linalg.vector_norm(output.latents, dim=0) ** 2
            cosine = torch.cosine_similarity(part, output.reconstruction, dim=1)
            self.cosine += float(cosine.double().sum())

    def metrics(self, live_at_least: int = 10) -> dict[str, Any]:
        """FVU, L0, cosine and the numbers of live latents over everything that was added."""
        if self.tokens == 0 or self.total is None:
            raise ValueError("no activations were added: there is nothing to measure")
        variance = self.squared_norm - float(self.total.square().sum()) / self.tokens
        fired = self.firing
        return {
            "tokens": self.tokens,
            "fvu": self.squared_error / variance if variance > 0 else float("nan"),
            "explained_variance": 1 - self.squared_error / variance if variance > 0 else None,
            "l0": self.active / self.tokens,
            "cosine": self.cosine / self.tokens,
            "num_latents": len(fired),
            "live": {str(n): int((fired >= n).sum()) for n in (1, live_at_least, 100)},
            "live_fraction": float((fired >= live_at_least).double().mean()),
            "silent_fraction": float((fired == 0).double().mean()),
        }


def measure(
    saes: Mapping[str, tuple[Hookpoint, SAE]],
    chunks: Iterable[dict[Hookpoint, Float[Tensor, "tokens d_in"]]],
) -> dict[str, Reconstruction]:
    """Measure many SAEs in one pass over held-out activations; each reads its own hookpoint."""
    moments = {hookpoint: MomentSums() for hookpoint, _ in saes.values()}
    measured = {name: Reconstruction(sae, moments[hook]) for name, (hook, sae) in saes.items()}
    for chunk in chunks:
        for hookpoint, found in moments.items():
            found.add(chunk[hookpoint])
        for name, (hookpoint, _) in saes.items():
            measured[name].add(chunk[hookpoint])
    return measured
