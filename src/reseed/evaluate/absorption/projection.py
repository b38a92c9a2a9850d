"""Absorption by projections on a probe's direction: valid at every layer, from one encoding.

For a word with activation a and the unit direction p of its class: P = a·p, latent j contributes
proj_j = f_j·(d_j·p), cos_j = cos(d_j, p), S are the main latents of the class and
M = Σ_{j∈S} proj_j. Chanin et al. 2024, App. A.9; SAEBench.

The published cosine thresholds, .1 and .025, suit 2,304 dimensions; in 128 dimensions, one random
pair in eight exceeds .1. `null_cosines` measures the cosines of a decoder with random directions
and with probes of permuted labels, which give thresholds for any width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reseed.evaluate.sparse_latents import SparseLatents, gather_pairs

SILENT = 1e-8
"""A latent below this activation is silent."""


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of absorption.

    Attributes:
        cosine: minimum cosine of an absorbing latent, for the fraction.
        full_cosine: minimum cosine of the top contributor, for full absorption.
        share: minimum share of P that absorbing latents contribute.
        absorbers: maximum number of latents that absorb a word together; the largest contributors
            count.
    """

    cosine: float = 0.1
    full_cosine: float = 0.025
    share: float = 0.4
    absorbers: int = 3


@dataclass(frozen=True, eq=False)
class Absorption:
    """Absorption of each word, in float64.

    Attributes:
        fraction: share of the direction that absorbing latents took over, 0 to 1.
        full: true if the main latents are silent and a single other latent contributes enough.
        projection: P.
        main: M.
        absorbing: A, the sum of the absorbing latents' contributions.
        absorbers: these latents, the largest contribution first; −1 if there are fewer. They absorb
            only if ``fraction`` is above 0.
        contributions: contribution of each of `absorbers`.
        top: the latent with the largest contribution of all, for `full`; −1 if none is active.
    """

    fraction: Float[Tensor, " n"]
    full: Bool[Tensor, " n"]
    projection: Float[Tensor, " n"]
    main: Float[Tensor, " n"]
    absorbing: Float[Tensor, " n"]
    absorbers: Int[Tensor, "n absorbers"]
    contributions: Float[Tensor, "n absorbers"]
    top: Int[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Alignment of decoder rows with the direction of each class.

    Attributes:
        along: d_j·p_c.
        cosine: cos(d_j, p_c); 0 for a row of zeros.
    """

    along: Float[Tensor, "C F"]
    cosine: Float[Tensor, "C F"]

    @classmethod
    def of(cls, W_dec: Float[Tensor, "F D"], directions: Float[Tensor, "C D"]) -> Alignment:
        """Compute the alignment; the directions may have any length."""
        unit = F.normalize(directions.to(W_dec.device).float(), dim=1)
        rows = W_dec.detach().float()
        along = unit @ rows.T
        length = rows.norm(dim=1)
        return cls(along, torch.where(length > 0, along / length, 0.0))


def absorption(
    codes: SparseLatents,
    x: Float[Tensor, "n D"],
    classes: Int[Tensor, " n"],
    directions: Float[Tensor, "C D"],
    alignment: Alignment,
    main: Sequence[Int[Tensor, " S"]],
    thresholds: Thresholds,
) -> Absorption:
    """Measure the absorption of each word, from its active latents alone.

    Args:
        codes: latents of the words.
        x: activations of the words.
        classes: classes of the words.
        directions: probe of each class, of any length.
        alignment: alignment of the decoder with the directions.
        main: S of each class.

    Returns:
        Tensors on the device of the codes.
    """
    device, n = codes.value.device, len(codes)
    classes, word = classes.to(device), codes.token
    unit = F.normalize(directions.double(), dim=1).to(device)
    projection = (x.to(device).double() * unit[classes]).sum(1)

    owner = classes[word]
    contribution = codes.value.double() * alignment.along[owner, codes.latent].double()
    cosine = alignment.cosine[owner, codes.latent]
    is_main = torch.zeros(len(directions), codes.num_latents, dtype=torch.bool, device=device)
    for number, latents in enumerate(main):
        is_main[number, latents.to(device)] = True
    of_main = is_main[owner, codes.latent]

    zeros = torch.zeros(n, dtype=torch.float64, device=device)
    by_main = zeros.index_add(0, word, torch.where(of_main, contribution, 0.0))
    speaks = of_main & (codes.value >= SILENT)
    main_fires = torch.zeros(n, dtype=torch.int64, device=device).index_add(0, word, speaks.long())

    candidate = ~of_main & (cosine >= thresholds.cosine) & (contribution > 0)
    absorbers = codes.top_pairs(contribution, thresholds.absorbers, candidate)
    contributions = gather_pairs(contribution, absorbers, 0.0)
    top = codes.top_pairs(contribution, 1)[:, 0]
    top_contribution, top_cosine = (gather_pairs(v, top, 0.0) for v in (contribution, cosine))

    absorbing = contributions.sum(1)
    # P may be 0, so compare products, not quotients.
    present = projection > 0
    enough = present & (absorbing >= thresholds.share * projection)
    missing = projection - by_main
    taken = torch.minimum(absorbing, missing)
    partly = taken / torch.where(by_main > 0, taken + by_main, 1.0)
    fraction = torch.where(by_main > 0, partly, 1.0)
    return Absorption(
        fraction=torch.where(enough & (missing > 0), fraction, 0.0),
        full=present
        & (main_fires == 0)
        & (top_cosine >= thresholds.full_cosine)
        & (top_contribution >= thresholds.share * projection),
        projection=projection,
        main=by_main,
        absorbing=absorbing,
        absorbers=gather_pairs(codes.latent, absorbers, -1),
        contributions=contributions,
        top=gather_pairs(codes.latent, top, -1),
    )


@dataclass(frozen=True)
class NullCosines:
    """A high percentile of the cosines of decoder rows with null directions.

    Attributes:
        random: percentile for directions drawn with the covariance of the activations.
        permuted: percentile for probes of permuted labels.
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
        quantile: the percentile, as a fraction.
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
    """Draw from N(0, Σ), where Σ is the covariance of x, as sums of the centred rows with normal
    weights, without computing Σ."""
    weights = torch.randn(number, len(x), generator=random)
    return (weights @ (x - x.mean(0))) / len(x) ** 0.5


def _percentile(
    rows: Float[Tensor, "some D"], directions: Float[Tensor, "m D"], quantile: float
) -> float:
    if not len(rows):
        return float("nan")
    cosines = Alignment.of(rows, directions).cosine.flatten().cpu().numpy()
    return float(np.quantile(cosines, quantile))
