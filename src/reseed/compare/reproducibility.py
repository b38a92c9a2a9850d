"""How likely is it that one more seed shares this latent?

Latent i is shared with m_i of n−1 other seeds. Taken as draws with a chance of its own, which over
the latents of a run has a beta distribution, m is beta-binomial; with α and β from the run's own
m_i (empirical Bayes; Efron & Morris 1973) the chance of latent i given m_i is beta again:
Beta(m_i + α, n − 1 − m_i + β), with mean (m_i + α)/(n − 1 + α + β).

The n−1 others are one sample of seeds, the same for all latents of a run: of the chances of single
latents the intervals say what they say, but errors of several latents go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

_LEAST_OTHERS = 2
"""Of one other seed only the mean of the chances shows, not how they spread."""
_BORDER = 7.0
"""|log α| and |log β| are sought up to here; a fit that ends there has no proper end."""


class Prior(NamedTuple):
    """The beta distribution of the chances. ``fitted`` is false for Jeffreys' Beta(½, ½)."""

    alpha: float
    beta: float
    fitted: bool


JEFFREYS = Prior(0.5, 0.5, False)


@dataclass(frozen=True, eq=False)
class Reproducibility:
    """The chance that another seed shares a latent, and its interval, a value per latent."""

    mean: Float[np.ndarray, " num_latents"]
    low: Float[np.ndarray, " num_latents"]
    high: Float[np.ndarray, " num_latents"]
    prior: Prior


def reproducibility(
    shared_with: Int[np.ndarray, " num_latents"],
    others: int,
    kept: Bool[np.ndarray, " num_latents"] | None = None,
    confidence: float = 0.95,
) -> Reproducibility:
    """The estimate of every latent of one run.

    Args:
        shared_with: m_i, with how many of the ``others`` each latent is shared.
        others: n−1 ≥ 1.
        kept: latents that the prior is fitted to (those that have a direction); all by default.

    Raises:
        ValueError: m_i out of range.
    """
    m = np.asarray(shared_with)
    if others < 1 or m.min() < 0 or m.max() > others:
        raise ValueError(
            f"latents can be shared with 0 to {others} of {others} others; got {m.min()} to "
            f"{m.max()}"
        )
    counts = np.bincount(m if kept is None else m[kept], minlength=others + 1)
    prior = fit_prior(counts)
    # One value per m: quantiles of 131,072 latents would all be the same few.
    levels = np.arange(others + 1)
    a, b = levels + prior.alpha, others - levels + prior.beta
    tail = (1 - confidence) / 2
    low, high = special.betaincinv(a, b, tail), special.betaincinv(a, b, 1 - tail)
    return Reproducibility((a / (a + b))[m], low[m], high[m], prior)


def fit_prior(counts: Int[np.ndarray, " n"]) -> Prior:
    """α and β of greatest likelihood; Jeffreys' ½, ½ where there is no such fit.

    There is none with fewer than 2 others, and at the border: where all latents are shared with
    all or none (α and β fall to 0), or m spreads no more than with one chance for all (they grow
    without end).

    Args:
        counts: the number of latents shared with m = 0 … n−1 others.
    """
    others = len(counts) - 1
    if others < _LEAST_OTHERS or not counts.sum():
        return JEFFREYS
    m, weights = np.arange(others + 1), counts / counts.sum()

    def loss(logs: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        gain = special.betaln(m + alpha, others - m + beta) - special.betaln(alpha, beta)
        return -float(weights @ gain)

    found = min(
        (
            optimize.minimize(loss, start, method="L-BFGS-B", bounds=[(-_BORDER, _BORDER)] * 2)
            for start in ([-1.0, -1.0], [1.0, 1.0])
        ),
        key=lambda result: result.fun,
    )
    if not found.success or np.abs(found.x).max() > _BORDER - 0.1:
        return JEFFREYS
    alpha, beta = np.exp(found.x)
    return Prior(float(alpha), float(beta), True)
