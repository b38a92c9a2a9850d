"""Agreement of matched latents: Pearson correlation and Jaccard index, in one pass over tokens.

Cosines compare the weights of two latents; these measures compare their behaviour: Pearson's
correlation of their activations over held-out tokens (zeros included), and the Jaccard index of the
sets of tokens at which they fire (Paulo & Belrose, arXiv 2501.16615, and its replications). Five
sums per pair suffice; no F_A × F_B matrix is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.compare.codes import Codes


@dataclass(eq=False)
class Firing:
    """Sums over tokens for each latent x of one SAE: its firing count, Σx and Σx²."""

    count: Int[Tensor, " F"]
    total: Float[Tensor, " F"]
    squares: Float[Tensor, " F"]
    tokens: int = 0

    @classmethod
    def of(cls, num_latents: int, device: torch.device) -> Self:
        """Return the sums before the first token."""
        zeros = torch.zeros(num_latents, dtype=torch.float64, device=device)
        return cls(zeros.long(), zeros, zeros.clone())

    def add(self, codes: Codes) -> None:
        exact = codes.value.double()
        self.count += torch.bincount(codes.latent, minlength=codes.num_latents)
        self.total += codes.summed(exact)
        self.squares += codes.summed(exact.square())
        self.tokens += codes.tokens


@dataclass(eq=False)
class Together:
    """Sums over tokens for each latent x of A and its partner y in B: Σxy, and how often both fire.

    Attributes:
        partner: latent of B for each latent of A; −1 for none. Latents of B may repeat.
    """

    partner: Int[Tensor, " F_A"]
    both: Int[Tensor, " F_A"]
    products: Float[Tensor, " F_A"]

    @classmethod
    def of(cls, partner: Int[Tensor, " F_A"]) -> Self:
        """Return the sums before the first token."""
        zeros = torch.zeros(len(partner), dtype=torch.float64, device=partner.device)
        return cls(partner, zeros.long(), zeros)

    def add(self, a: Codes, b: Codes) -> None:
        """Add a batch of tokens, encoded by A and by B."""
        partner = self.partner[a.latent]
        there = partner >= 0
        values = b.at(a.token[there], partner[there])
        latent = a.latent[there]
        products = a.value[there].double() * values
        self.products += torch.bincount(latent, products, minlength=a.num_latents)
        self.both += torch.bincount(latent[values != 0], minlength=a.num_latents)


class Agreement(NamedTuple):
    """A value per latent of A; NaN without a partner or where undefined.

    Attributes:
        pearson: correlation of its activations with its partner's; undefined if either is constant,
            for example never fires.
        jaccard: number of tokens at which both fire, over that at which at least one fires.
    """

    pearson: Float[np.ndarray, " F_A"]
    jaccard: Float[np.ndarray, " F_A"]


def agreement(a: Firing, b: Firing, together: Together) -> Agreement:
    """Return the agreement of each latent of A with its partner in B."""
    matched = together.partner >= 0
    other = together.partner.clamp(min=0)
    covariance = a.tokens * together.products - a.total * b.total[other]
    spread_a, spread_b = (x.tokens * x.squares - x.total.square() for x in (a, b))
    scale = (spread_a * spread_b[other]).clamp(min=0).sqrt()
    either = a.count + b.count[other] - together.both
    return Agreement(
        _ratio(covariance, scale, matched).clip(-1, 1),
        _ratio(together.both, either, matched),
    )


def _ratio(part: Tensor, whole: Tensor, known: Tensor) -> Float[np.ndarray, " F_A"]:
    """Return part / whole; NaN where not ``known`` or the whole is 0."""
    value = part.double() / whole
    return torch.where(known & (whole > 0), value, torch.nan).cpu().numpy()
