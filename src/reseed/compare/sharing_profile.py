"""Latents over several seeds: sharing with the other seeds, cycles of partners, reproducibility.

*Seed profile*: the number of other seeds that share a latent (p_m), u_k and the limit of u_k.
Source: Paulo & Belrose (arXiv 2501.16615); their ring chart shows p_m, their line chart u_k with a
power law.

*Cycle consistency*: agreement of the three matchings between three seeds. A latent i of A has a
partner j in B, and j has a partner k in C. The cycle closes if k is also the partner of i in C:
σ_AC(i) = σ_BC(σ_AB(i)). If partners are assigned by chance, because no similar latents are left,
one cycle in F closes.

*Reproducibility*: the estimated probability that one more seed shares a latent. Latent i is shared
with m_i of n−1 other seeds. Model these as draws with the latent's own probability,
beta-distributed over the latents of a run; m is then beta-binomial. With α and β fitted to the
run's m_i (empirical Bayes; Efron & Morris 1973), the probability of latent i given m_i is beta
again: Beta(m_i + α, n − 1 − m_i + β), with mean (m_i + α)/(n − 1 + α + β). The n−1 other seeds are
the same for all latents of a run. Intervals therefore hold for single latents; errors of several
latents are correlated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

from reseed.compare.dictionary import Dictionary, incompatible
from reseed.compare.pair import CellRuns, PairSide
from reseed.compare.registry import Column, Interval, measures
from reseed.compare.statistics import leave_one_out_interval

Which = Literal["encoder", "decoder"]
CYCLES = (
    "cycle_encoder",
    "cycle_decoder",
    "cycle_encoder_shared",
    "cycle_decoder_shared",
    "cycle_shared",
)
"""Names of the estimates of `cycle_estimates`."""
_LEAST_SEEDS = 4
"""With fewer seeds, leaving one out leaves no triple."""
_LEAST_OTHERS = 2
"""One other seed determines only the mean of the probabilities, not their spread."""
_BORDER = 7.0
"""Bound on |log α| and |log β|; a fit that reaches it has not converged."""


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


def cycle_estimates(
    sides: Mapping[tuple[int, int], PairSide], confidence: float = 0.95
) -> dict[str, Interval]:
    """Return the fractions of cycles that close over the triples of n seeds.

    - ``cycle_encoder``, ``cycle_decoder``: the fraction of all latents, by the matching named. A
      closed cycle counts for its three latents, so a triple has 3·#/(F_A + F_B + F_C).
    - ``cycle_encoder_shared``, ``cycle_decoder_shared``: the fraction of chains i, j, k (i shared
      with j, and j with k) in which the matching gives i the partner k.
    - ``cycle_shared``: the fraction of these chains in which i is shared with k too.

    Counts are summed over triples. This is a U-statistic of degree 3, for which leaving one seed
    out gives an interval if there are at least 4 seeds. Three seeds make one triple, which has no
    interval (`Interval.reason`).

    Args:
        sides: ordered pair (s, t) of seeds → the matches of s in t.
    """
    n = 1 + max((s for s, _ in sides), default=0)
    triples = list(combinations(range(n), 3))
    if not triples:
        none = Interval(float("nan"), None, None, None, n, "a cycle needs 3 seeds")
        return dict.fromkeys(CYCLES, none)
    counted = [_counts(sides, triple) for triple in triples]
    return {name: _estimate(triples, [c[name] for c in counted], n, confidence)
            for name in CYCLES}  # fmt: skip


_OF_CHAINS = "among chains in which i is shared with j and j with k, the fraction in which {}"


@measures(
    Column("cycle_encoder", "fraction of latents whose partner's partner in a third run is their "
           "own partner there, by encoder", heading="cycle, enc", formula="σ_AC(i) = σ_BC(σ_AB(i))",
           advice="Matches of latents that are merely left over close one cycle in F. An interval "
           "needs 4 seeds."),
    Column("cycle_decoder", "the same by decoder", heading="cycle, dec"),
    Column("cycle_encoder_shared", _OF_CHAINS.format("the encoder matches i to k")),
    Column("cycle_decoder_shared", _OF_CHAINS.format("the decoder matches i to k")),
    Column("cycle_shared", _OF_CHAINS.format("i is shared with k"), heading="cycle, shared",
           advice="Shows whether sharing is transitive: one latent found again, rather than a "
           "chain of similar ones."),
    level="cell",
    table="cycles",
)  # fmt: skip
def cycles(cell: CellRuns) -> tuple[Interval, ...]:
    found = cycle_estimates(cell.sides, cell.settings.confidence)
    return tuple(found[name] for name in CYCLES)


def _counts(
    sides: Mapping[tuple[int, int], PairSide], triple: tuple[int, ...]
) -> dict[str, tuple[int, int]]:
    """Return, for each estimate, the number of closed cycles and the number of all cycles."""
    found: dict[str, tuple[int, int]] = {}
    r, s, t = triple
    latents = sum(len(sides[pair].shared) for pair in ((r, s), (s, t), (t, r)))
    for which in ("encoder", "decoder"):
        partner = {p: _partner(sides[p], which) for p in permutations(triple, 2)}
        there, back = partner[r, s], partner[s, t]
        middle = np.where(there >= 0, there, 0)
        end = np.where(there >= 0, back[middle], -1)
        closed = (end >= 0) & (partner[r, t] == end)
        found[f"cycle_{which}"] = 3 * int(closed.sum()), latents
    chains = [_chains(sides, first, middle, last)
              for middle, (first, last) in ((s, (r, t)), (r, (s, t)), (t, (r, s)))]  # fmt: skip
    number = sum(len(flags) for flags, *_ in chains)
    for i, name in enumerate(("cycle_shared", "cycle_encoder_shared", "cycle_decoder_shared")):
        found[name] = sum(int(chain[i].sum()) for chain in chains), number
    return found


def _chains(
    sides: Mapping[tuple[int, int], PairSide], first: int, middle: int, last: int
) -> tuple[Bool[np.ndarray, " chains"], Bool[np.ndarray, " chains"], Bool[np.ndarray, " chains"]]:
    """Take the latents of ``middle`` that both other seeds share. Return, for each, whether its two
    partners are shared with each other, are partners by encoder, and are partners by decoder."""
    j = np.flatnonzero(sides[middle, first].shared & sides[middle, last].shared)
    i, k = sides[middle, first].partner_encoder[j], sides[middle, last].partner_encoder[j]
    side = sides[first, last]
    by_encoder, by_decoder = side.partner_encoder[i] == k, side.partner_decoder[i] == k
    return side.shared[i] & by_encoder, by_encoder, by_decoder


def _partner(side: PairSide, which: Which) -> Int[np.ndarray, " n"]:
    return side.partner_encoder if which == "encoder" else side.partner_decoder


def _estimate(
    triples: list[tuple[int, ...]], counts: list[tuple[int, int]], n: int, confidence: float
) -> Interval:
    table = np.array(counts, dtype=np.float64)

    def fraction(kept: Bool[np.ndarray, " triples"]) -> float:
        closed, out_of = table[kept].sum(axis=0)
        return float(closed / out_of) if out_of else float("nan")

    mean = fraction(np.ones(len(triples), dtype=bool))
    if np.isnan(mean):
        return Interval(mean, None, None, None, n, "no latent is shared by two others")
    if n < _LEAST_SEEDS:
        reason = f"fewer than {_LEAST_SEEDS} seeds: one triple has no interval"
        return Interval(mean, None, None, None, n, reason)
    without = [fraction(np.array([s not in triple for triple in triples])) for s in range(n)]
    return leave_one_out_interval(mean, without, confidence, "logit")


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
    mean, low, high = posterior(np.arange(others + 1), others, prior, confidence)
    return Reproducibility(mean[m], low[m], high[m], prior)


def posterior(
    shared_with: Int[np.ndarray, " n"], others: int, prior: Prior, confidence: float
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the mean and an equal-tailed interval of Beta(m + α, n − 1 − m + β), for each m."""
    a, b = shared_with + prior.alpha, others - shared_with + prior.beta
    tail = (1 - confidence) / 2
    return a / (a + b), special.betaincinv(a, b, tail), special.betaincinv(a, b, 1 - tail)


def fit_prior(counts: Int[np.ndarray, " n"]) -> Prior:
    """Fit α and β by maximum likelihood; fall back to Jeffreys' ½, ½ where there is no fit.

    There is no fit with fewer than 2 other seeds, or at the bounds: if all latents are shared with
    all or none (α and β go to 0), or if m spreads no more than with one common probability (α and β
    diverge).

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


def run_reproducibilities(
    trained: Sequence[Dictionary],
    shared_with: Iterable[Int[np.ndarray, " num_latents"]],
    confidence: float,
) -> list[Reproducibility]:
    """Return each run's `reproducibility` among other runs of its ``d_in``; NaN without any."""
    found = []
    for s, (x, m) in enumerate(zip(trained, shared_with, strict=True)):
        others = sum(not incompatible(x, y) for t, y in enumerate(trained) if t != s)
        if others:
            found.append(reproducibility(m, others, ~x.zero, confidence))
            continue
        unknown = np.full(x.num_latents, np.nan)
        prior = Prior(float("nan"), float("nan"), False)
        found.append(Reproducibility(unknown, unknown, unknown, prior))
    return found
