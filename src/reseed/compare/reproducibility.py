"""Reproducibility: the estimated probability that one more seed shares a latent.

Latent i is shared with m_i of n−1 other seeds. Model these as draws with the latent's own
probability, beta-distributed over the latents of a run; m is then beta-binomial. With α and β
fitted to the run's m_i (empirical Bayes; Efron & Morris 1973), the probability of latent i given
m_i is beta again: Beta(m_i + α, n − 1 − m_i + β), with mean (m_i + α)/(n − 1 + α + β).

The n−1 others are one sample of seeds, the same for all latents of a run. Intervals hold for single
latents; errors of several latents are correlated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

_LEAST_OTHERS = 2
"""One other seed determines only the mean of the probabilities, not their spread."""
_BORDER = 7.0
"""Bound on |log α| and |log β|; a fit that reaches it has not converged."""


class Prior(NamedTuple):
    """The beta distribution of the probabilities; ``fitted`` is false for Jeffreys' Beta(½, ½)."""

    alpha: float
    beta: float
    fitted: bool


JEFFREYS = Prior(0.5, 0.5, False)


@dataclass(frozen=True, eq=False)
class Reproducibility:
    """The probability that another seed shares a latent, with its interval; a value per latent."""

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
    """Estimate the reproducibility of every latent of one run.

    Args:
        shared_with: m_i, the number of ``others`` that each latent is shared with.
        others: n−1 ≥ 1.
        kept: latents that the prior is fitted to (those with non-zero rows); all by default.

    Raises:
        ValueError: m_i is out of range.
    """
    m = np.asarray(shared_with)
    if others < 1 or m.min() < 0 or m.max() > others:
        raise ValueError(
            f"latents can be shared with 0 to {others} of {others} others; got {m.min()} to "
            f"{m.max()}"
        )
    counts = np.bincount(m if kept is None else m[kept], minlength=others + 1)
    prior = fit_prior(counts)
    # Compute quantiles once per m instead of per latent (up to 131,072).
    levels = np.arange(others + 1)
    a, b = levels + prior.alpha, others - levels + prior.beta
    tail = (1 - confidence) / 2
    low, high = special.betaincinv(a, b, tail), special.betaincinv(a, b, 1 - tail)
    return Reproducibility((a / (a + b))[m], low[m], high[m], prior)


def fit_prior(counts: Int[np.ndarray, " n"]) -> Prior:
    """Fit α and β by maximum likelihood; fall back to Jeffreys' ½, ½ where there is no fit.

    There is none with fewer than 2 others, or at the bounds: if all latents are shared with all or
    none (α and β go to 0), or if m spreads no more than with one common probability (they diverge).

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
