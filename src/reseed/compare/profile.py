"""Seed profile: the number of other seeds that share a latent (p_m), u_k and the limit of u_k.

Source: Paulo & Belrose (arXiv 2501.16615); their ring chart shows p_m, their line chart u_k with a
power law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special


@dataclass(frozen=True, eq=False)
class SeedProfile:
    """Numbers of other seeds that share the latents of n seeds.

    Attributes:
        shared_with: per base seed, m_i of each of its latents (0 … n−1).
        p: p_m for m = 0 … n−1, the distribution of m_i, averaged over base seeds.
        u: u_k for k = 2 … n, the fraction of latents that none of k−1 other seeds shares, averaged
            over base seeds and over the choices of the k−1.
    """

    shared_with: tuple[Int[np.ndarray, " num_latents"], ...]
    p: Float[np.ndarray, " n"]
    u: Float[np.ndarray, " n-1"]

    @property
    def k(self) -> Int[np.ndarray, " n-1"]:
        """The numbers of seeds, k = 2 … n, of `u`."""
        return np.arange(2, len(self.p) + 1)


def seed_profile(shared: Sequence[Bool[np.ndarray, "num_latents n-1"]]) -> SeedProfile:
    """Return p_m and u_k of n seeds.

    Args:
        shared: per base seed, true where each of its latents is shared with each of the others.
    """
    n = len(shared)
    if n < 2 or any(flags.ndim != 2 or flags.shape[1] != n - 1 for flags in shared):
        shapes = [list(flags.shape) for flags in shared]
        raise ValueError(f"each of n ≥ 2 seeds needs flags [num_latents, n−1]; got {shapes}")
    shared_with = tuple(flags.sum(axis=1, dtype=np.int64) for flags in shared)
    p = np.mean([np.bincount(m, minlength=n) / len(m) for m in shared_with], axis=0)
    return SeedProfile(shared_with, p, unshared_fractions(p))


def unshared_fractions(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n-1"]:
    """Return u_k for k = 2 … n from p_m: u_k = Σ_m p_m · C(n−1−m, k−1) / C(n−1, k−1).

    If m of the n−1 others share a latent, k−1 of them drawn at random all lack it with the
    probability that all are drawn from the n−1−m that do not share it.
    """
    n = len(p)
    m, k = np.arange(n), np.arange(2, n + 1)[:, None]
    return (special.comb(n - 1 - m, k - 1) / special.comb(n - 1, k - 1)) @ np.asarray(p)


class PowerLaw(NamedTuple):
    """Power law u_k ≈ a·k^(−b) + c; c is the fraction that no number of seeds would find again."""

    a: float
    b: float
    c: float

    def __call__(self, k: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        return self.a * np.asarray(k, dtype=np.float64) ** -self.b + self.c


def fit_power_law(u: Float[np.ndarray, " n-1"]) -> PowerLaw | None:
    """Fit a·k^(−b) + c to u_k for k = 2 … n by least squares, with a, b ≥ 0 and 0 ≤ c ≤ 1.

    Returns None with fewer than 4 values (the curve has 3 parameters), if they fall by less than
    0.01 (a flat line does not determine its limit), or if no fit is found.
    """
    if len(u) < 4 or u[0] - u[-1] < 0.01:
        return None
    k = np.arange(2.0, len(u) + 2)
    bounds = ([0, 0, 0], [np.inf, np.inf, 1])
    start = (max(float(u[0] - u[-1]), 1e-3) * 2, 1.0, float(np.clip(u[-1], 0, 1)) / 2)
    try:
        found, _ = optimize.curve_fit(lambda k, a, b, c: a * k**-b + c, k, u, start, bounds=bounds)
    except (RuntimeError, ValueError):
        return None
    return PowerLaw(*map(float, found))
