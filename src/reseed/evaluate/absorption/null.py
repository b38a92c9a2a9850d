"""Cosines of a decoder with random directions and with probes of permuted labels.

The published .1 and .025 suit 2,304 dimensions; in 128, every eighth random pair is beyond .1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.evaluate.absorption.projection import Alignment


@dataclass(frozen=True)
class NullCosines:
    """A high percentile of the cosines of decoder rows with null directions.

    Attributes:
        random: with directions drawn with the covariance of the activations.
        permuted: with probes of permuted labels.
    """

    random: float
    permuted: float

    @property
    def threshold(self) -> float:
        """The larger of the two; neither null explains a cosine above it."""
        return max(self.random, self.permuted)


def null_cosines(
    W_dec: Float[Tensor, "F D"],
    live: Int[Tensor, " some"],
    x: Float[Tensor, "n D"],
    permuted: Float[Tensor, "probes D"],
    *,
    directions: int,
    quantile: float,
    random: torch.Generator,
) -> NullCosines:
    """Compute the percentiles over all pairs of a direction and a live latent.

    Args:
        live: latents that fire on some word.
        x: the words' activations.
        permuted: probes of permuted labels.
        directions: number of random directions.
        random: generator on the CPU.
    """
    rows = W_dec[live.to(W_dec.device)]
    drawn = random_directions(x, directions, random)
    return NullCosines(
        random=_percentile(rows, drawn, quantile), permuted=_percentile(rows, permuted, quantile)
    )


def random_directions(
    x: Float[Tensor, "n D"], number: int, random: torch.Generator
) -> Float[Tensor, "number D"]:
    """Draw from N(0, Σ), Σ the covariance of x: sums of the centred rows with normal weights need
    no Σ."""
    weights = torch.randn(number, len(x), generator=random)
    return (weights @ (x - x.mean(0))) / len(x) ** 0.5


def _percentile(
    rows: Float[Tensor, "some D"], directions: Float[Tensor, "m D"], quantile: float
) -> float:
    if not len(rows):
        return float("nan")
    cosines = Alignment.of(rows, directions).cosine.flatten().cpu().numpy()
    return float(np.quantile(cosines, quantile))
