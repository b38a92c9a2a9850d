"""Cycle consistency: agreement of the three matchings between three seeds.

A latent i of A has a partner j in B, and j has a partner k in C. The cycle closes if k is also the
partner of i in C: σ_AC(i) = σ_BC(σ_AB(i)). Partners assigned by chance, because nothing else was
left, close one cycle in F.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, permutations
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int

from reseed.compare.statistics import Interval, leave_one_out_interval

if TYPE_CHECKING:
    from reseed.compare.stability import PairSide

Which = Literal["encoder", "decoder"]
ESTIMATES = (
    "cycle_encoder",
    "cycle_decoder",
    "cycle_encoder_shared",
    "cycle_decoder_shared",
    "cycle_shared",
)
_LEAST_SEEDS = 4
"""With fewer seeds, leaving one out leaves no triple."""


def cycle_estimates(
    sides: Mapping[tuple[int, int], PairSide], confidence: float = 0.95
) -> dict[str, Interval]:
    """Return the fractions of cycles that close over the triples of n seeds.

    - ``cycle_encoder``, ``cycle_decoder``: the fraction of all latents, by the matching named. A
      cycle is the same from each of its three latents, so a triple has 3·#/(F_A + F_B + F_C).
    - ``cycle_encoder_shared``, ``cycle_decoder_shared``: the fraction of chains i, j, k (i shared
      with j, and j with k) in which the matching gives i the partner k.
    - ``cycle_shared``: the fraction of these chains in which i is shared with k too.

    Counts are summed over triples. This is a U-statistic of degree 3, for which leaving one seed
    out gives an interval from 4 seeds on; three seeds make one triple, and the reason says so.

    Args:
        sides: ordered pair (s, t) of seeds → the matches of s in t.
    """
    n = 1 + max((s for s, _ in sides), default=0)
    triples = list(combinations(range(n), 3))
    if not triples:
        none = Interval(float("nan"), None, None, None, n, "a cycle needs 3 seeds")
        return dict.fromkeys(ESTIMATES, none)
    counted = [_counts(sides, triple) for triple in triples]
    return {name: _estimate(triples, [c[name] for c in counted], n, confidence)
            for name in ESTIMATES}  # fmt: skip


def _counts(
    sides: Mapping[tuple[int, int], PairSide], triple: tuple[int, ...]
) -> dict[str, tuple[int, int]]:
    """Return, for each estimate, how many cycles close and out of how many."""
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
    """Take the latents of ``middle`` that both other seeds share. Return, for each, if its two
    partners are shared with each other, are partners by encoder, are partners by decoder."""
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
