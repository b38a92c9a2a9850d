"""Pairs of dictionaries that differ in ``d_in``, so that their rows have no cosine.

Their weights are not compared: every such column is NaN, and no latent has a partner. They are only
compared by their activations on the same tokens (`compare.activations`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from reseed.compare.dictionary import Dictionary
from reseed.compare.measures import DENSE
from reseed.compare.reproducibility import Prior, Reproducibility, reproducibility
from reseed.compare.stability import PairResult, PairSide, compare_pair

REASON = "runs of different `d_in` have no common space"
"""Reason given where an estimate over such a cell is not known."""
NO_SPACE = "weights_note"
"""Column of the pairs of such a cell: `REASON`, or empty if the pair has a common space."""
Value = TypeVar("Value")


def apart(a: Dictionary, b: Dictionary) -> bool:
    """Return True if the rows of both are vectors of different spaces."""
    return a.d_in != b.d_in


def any_apart(trained: Sequence[Dictionary]) -> bool:
    """Return True if some two of the dictionaries differ in ``d_in``."""
    return any(apart(trained[0], x) for x in trained)


def in_one_space(
    trained: Sequence[Dictionary], sides: Mapping[tuple[int, int], Value]
) -> dict[tuple[int, int], Value]:
    """Return those of the ordered pairs (s, t) whose rows can be compared."""
    return {(s, t): x for (s, t), x in sides.items() if not apart(trained[s], trained[t])}


def pair_apart(a: Dictionary, b: Dictionary, live_at_least: int) -> PairResult:
    """Return a result in the form of `stability.compare_pair`: sizes and counts, else NaN."""
    measures: dict[str, float] = dict.fromkeys(_names(), float("nan"))
    for letter, x in (("a", a), ("b", b)):
        measures |= {
            f"num_latents_{letter}": x.num_latents,
            f"live_{letter}": int(x.live(live_at_least).sum()),
            f"dead_{letter}": int(x.dead.sum()),
            f"zero_{letter}": int(x.zero.sum()),
            f"dense_{letter}": int((x.density > DENSE).sum()),
        }
    return PairResult(_side(a, live_at_least), _side(b, live_at_least), measures)


def _side(x: Dictionary, live_at_least: int) -> PairSide:
    none, nothing = np.full(x.num_latents, -1), np.zeros(x.num_latents)
    never, zero = np.zeros(x.num_latents, dtype=bool), np.zeros(x.num_latents, dtype=np.int64)
    return PairSide(
        id=x.id,
        seed=x.seed,
        partner_encoder=none,
        partner_decoder=none,
        cosine_encoder=nothing,
        cosine_decoder=nothing,
        agrees=never,
        shared=never,
        within=zero,
        live_within=zero,
        live=x.live(live_at_least),
    )


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    """Return the names of a pair's measures, from comparing a pair of single latents."""
    one = Dictionary(
        id="one",
        seed="0",
        encoder=np.ones((1, 1)),
        decoder=np.ones((1, 1)),
        firing=np.zeros(1, dtype=np.int64),
        held_out_tokens=0,
        dead=np.zeros(1, dtype=bool),
    )
    return tuple(compare_pair(one, one).measures)


def chances(
    trained: Sequence[Dictionary],
    shared_with: Iterable[Int[np.ndarray, " num_latents"]],
    confidence: float,
) -> list[Reproducibility]:
    """Return each run's `reproducibility` among the runs of the same ``d_in``; NaN without any."""
    found = []
    for s, (x, m) in enumerate(zip(trained, shared_with, strict=True)):
        others = sum(not apart(x, y) for t, y in enumerate(trained) if t != s)
        if others:
            found.append(reproducibility(m, others, ~x.zero, confidence))
            continue
        unknown = np.full(x.num_latents, np.nan)
        prior = Prior(float("nan"), float("nan"), False)
        found.append(Reproducibility(unknown, unknown, unknown, prior))
    return found
